"""Figures that the pages print are those of the benchmarks' files, the plan and the model."""

import re
import shlex
from pathlib import Path

import pytest

from dist_resnet.bench.network import NETWORKS
from dist_resnet.bench.readme import with_tables
from dist_resnet.config.load import load_config
from dist_resnet.config.plan import make_plan
from tests.helpers.jobs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
SCALING = (ROOT / "docs" / "scaling.md").read_text()


def table(head: str) -> list[list[str]]:
    """The rows of the one table of scaling.md whose first line has this in it."""
    (found,) = [t for t in re.findall(r"(?:^\|.*\n)+", SCALING, re.M) if head in t.split("\n")[0]]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_measured_tables_are_the_benchmarks(page: Path) -> None:
    text = page.read_text()
    assert with_tables(text, page.parent) == text
    least = {"README.md": 4, "docs/scaling.md": 2}.get(str(page.relative_to(ROOT)), 0)
    assert text.count("<!-- bench ") >= least


def test_the_three_sizes_are_what_their_commands_plan() -> None:
    """50,000 images: no data set is needed for that."""
    names, *rows = table("a laptop")
    printed = {row[0]: row[1:] for row in rows if not row[0].startswith("---")}
    commands = re.findall(r"^python -m dist_resnet\.train (.+) --print-config$", SCALING, re.M)
    assert len(commands) == len(names) - 1 == 3
    for number, words in enumerate(commands):
        config = load_config([w.replace("configs", f"{ROOT}/configs") for w in shlex.split(words)])
        plan = make_plan(config, 50_000, 1)
        assert printed["`parallel.replicas=auto`"][number] == str(plan.replicas)
        assert printed["processes"][number] == str(plan.replicas)
        assert printed["global batch"][number] == f"{plan.global_batch_size:,}"
        assert printed["steps an epoch (50,000 images)"][number] == str(plan.steps_per_epoch)
        assert printed["peak rate, `optim.lr_scaling=linear`"][number] == f"{plan.peak_lr:g}"
        assert printed["`schedule.warmup_epochs`"][number] == f"{config.schedule.warmup_epochs:g}"


def test_what_an_all_reduce_is_said_to_take_is_what_the_bench_predicts_with() -> None:
    by_name = {network.name.split("; ")[1]: network for network in NETWORKS}
    said = {}
    for gpus, network, time, _ in table("T_AR")[2:]:
        replicas, microseconds = int(gpus.split()[0]), int(time.split()[0])
        for name in by_name if network == "NVSwitch" else [network]:
            assert abs(by_name[name].all_reduce(replicas) - microseconds) < 1
        said.setdefault(replicas, set()).add(microseconds)
    # The share of a step that such a step loses.
    for step, text in ((1000, ("2 to 3%", "7 to 18%")), (250, ("9%", "24 to 47%"))):
        lost = {n: sorted(100 * t / (step + t) for t in ts) for n, ts in said.items()}
        nodes = f"{lost[32][0]:.0f} to {lost[32][-1]:.0f}%"
        assert text[1] == nodes
        assert int(lost[8][0]) == int(text[0].split()[0].rstrip("%"))
        assert all(part in " ".join(SCALING.split()) for part in text)
