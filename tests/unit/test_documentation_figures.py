"""Figures that the pages print are those of the benchmarks' files, the plan and the model."""

import math
import re
import shlex
from pathlib import Path

import pytest

from dist_resnet.config.load import load_config
from dist_resnet.config.plan import make_plan
from tests.helpers.jobs import ROOT
from tools.pages import filled

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
SCALING = (ROOT / "docs" / "scaling.md").read_text()


def table(head: str) -> list[list[str]]:
    """The rows of the one table of scaling.md whose first line has this in it."""
    (found,) = [t for t in re.findall(r"(?:^\|.*\n)+", SCALING, re.M) if head in t.split("\n")[0]]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_measured_tables_are_the_benchmarks(page: Path) -> None:
    text = page.read_text()
    assert filled(text, page.parent) == text
    least = {"docs/scaling.md": 2, "docs/recipes.md": 0}.get(str(page.relative_to(ROOT)), 0)
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


def test_what_an_all_reduce_is_said_to_cost_follows_from_the_formula() -> None:
    """The rows that are the model's, and the share of a step of 1,000 us that each row leaves."""
    base, extra, inside, across = map(float, re.search(
        r"(\d+) \+ (\d+) \+ 2 \(([\d.]+) \(g - 1\) \+ ([\d.]+) log2\(n\)\) us", SCALING
    ).groups())  # fmt: skip
    missed = int(re.search(r"the (\d+) us that it missed", SCALING)[1])
    modelled = 0
    for gpus, network, time, left, source in table("T_AR")[2:]:
        size, took = int(gpus.split()[0].replace(",", "")), int(time.split()[0])
        if source.startswith("the model"):
            latency = base + extra + 2 * (inside * 7 + across * math.log2(size / 8))
            modelled += 1
            assert took == round(latency + missed * (network == "TCPX")), gpus
        assert left == f"{100 * 1000 / (1000 + took):.0f}%", gpus
    assert modelled == 4
