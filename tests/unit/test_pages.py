"""Tables of the pages are those of the committed JSON."""

import json
import re
from pathlib import Path

import pytest

from dist_resnet.base.errors import UserError
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
