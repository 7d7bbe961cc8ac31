"""Tables of the pages are those of the committed JSON."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dist_resnet.base.errors import UserError
from tools.effects import effects_table, standard_error
from tools.pages import filled, main

ROOT = Path(__file__).parents[2]
FACTS = {
    "command": "python -m dist_resnet.bench loader",
    "commit": "0123456789ab",
    "hardware": {"cpu": "Some CPU", "cores": 8, "threads_per_rank": 8},
    "versions": {"python": "3.11", "torch": "2.14", "ffcv": "1.0.2", "wandb": "0.31"},
}
ROWS = [
    {"table": "speed", "name": "ours", "images_per_second": 1234.5, "rounds": 3}
    | {"images_per_second_quartiles": [1200.0, 1300.0]},
    {"table": "speed", "name": "other", "failure": "not installed"},
    {"table": "else", "name": "x"},
]
TEXT = "before\n<!-- bench b/x.json: speed -->\nstale\n<!-- end -->\nafter\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.json").write_text(json.dumps({"facts": FACTS, "rows": ROWS}))
    return tmp_path


def test_a_block_is_its_table_and_where_it_comes_from(folder: Path) -> None:
    made = filled(TEXT, folder)
    assert made == (
        "before\n<!-- bench b/x.json: speed -->\n"
        "`python -m dist_resnet.bench loader` at 0123456; 8 cores of Some CPU; python 3.11,"
        " torch 2.14, ffcv 1.0.2, wandb 0.31; median [quartiles]:\n\n"
        "| name | images per second | rounds | failure |\n| --- | --- | --- | --- |\n"
        "| ours | 1,234 [1,200, 1,300] | 3 |  |\n| other |  |  | not installed |\n"
        "<!-- end -->\nafter\n"
    )
    assert filled(made, folder) == made
    (folder / "README.md").write_text(TEXT)
    assert main([str(folder / "README.md")]) == 0
    assert (folder / "README.md").read_text() == made


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="has no table 'slow'"):
        filled(TEXT.replace("speed", "slow"), folder)
    with pytest.raises(UserError, match=r"y\.json: not a benchmark's JSON"):
        filled(TEXT.replace("x.json", "y.json"), folder)
    with pytest.raises(UserError, match="see --help"):
        main([])
    with pytest.raises(UserError, match=r"none\.md: No such file"):
        main([str(folder / "none.md")])


def test_figures_were_measured_on_committed_code_by_an_idle_machine() -> None:
    files = {
        path.name: json.loads(path.read_text()) for path in (ROOT / "benchmarks").glob("*.json")
    }
    assert len(files) > 1
    for visit in files.pop("gpu.json")["visits"]:  # made by the card's script, not by the bench
        assert re.fullmatch("[0-9a-f]{40}", visit["commit"])
    for name, content in files.items():
        facts = content["facts"]
        assert re.fullmatch("[0-9a-f]{40}", facts["commit"]), name
        assert facts["other_load_cores"]["during"] < 0.3, name


DESIGN = [(a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c) for a, b, c in product((0, 1), repeat=3)]
WORTH = (0.02, -0.01, 0.001, 0.0, 0.0006, -0.0006, 0.0002)


def _designed(design: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Runs whose accuracy is a sum of what each factor is worth; the first factor has two keys."""
    runs = []
    for levels in design:
        settings: dict[str, Any] = {f"f{n}": 2 + 8 * on for n, on in enumerate(levels) if n or on}
        settings |= {"seed": 0, "with.f0": not levels[0]}
        top1 = 0.9 + sum(worth * on for worth, on in zip(WORTH, levels, strict=True))
        runs.append({"settings": settings, "figures": {"val/top1": top1, "val/loss": 1 - top1}})
    return runs


def test_effects_of_a_design_are_what_its_factors_are_worth() -> None:
    head, *factors, error = effects_table(_designed(DESIGN))
    assert head[:3] == ["factor", "from", "to"]
    rows = {row[0]: row[1:] for row in factors}
    assert rows.pop("f0, with.f0") == ["default, True", "10, False", "+2.00", "-0.0200"]
    for number, worth in enumerate(WORTH[1:], 1):
        assert rows.pop(f"f{number}") == ["2", "10", f"{100 * worth:+.2f}", f"{-worth:+.4f}"]
    assert not rows
    assert error[1:3] == ["", ""]
    assert error[3:] == ["0.09", "0.0009"]


def test_the_error_of_an_effect_leaves_the_large_ones_out() -> None:
    assert standard_error([0.1, -0.1, 0.2, 0.05, 3.0]) == pytest.approx(1.5 * 0.1)


def test_what_is_no_two_level_design_is_refused() -> None:
    with pytest.raises(UserError, match="not balanced in these runs"):
        effects_table(_designed([DESIGN[n] for n in (0, 1, 3, 4)]))
    runs = _designed(DESIGN)
    with pytest.raises(UserError, match="no factor"):
        effects_table(runs[:1])
    runs[0]["settings"]["f3"] = [7]
    with pytest.raises(UserError, match="f3 has 3 values"):
        effects_table(runs)


def test_levels_are_in_the_order_of_numbers() -> None:
    runs = _designed(DESIGN)
    for run in runs:
        run["settings"]["f1"] = -run["settings"]["f1"]
        run["settings"]["seed"] = len(run["settings"])
    rows = {row[0]: row[1:] for row in effects_table(runs)}
    assert rows["f1"] == ["-10", "-2", "+1.00", "-0.0100"]
