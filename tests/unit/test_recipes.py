"""Kept runs, their tables and curves, against run folders and tables written by hand."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dist_resnet.base.errors import UserError
from dist_resnet.config.effects import changes_trajectory
from dist_resnet.config.load import flatten, load_config, to_dict, to_yaml
from tools import pages
from tools.kept import condense, read_kept, write_kept
from tools.recipes import main, top1_curves

ROOT = Path(__file__).parents[2]
SUMMARY = {
    "epoch": 2.0, "val/top1": 0.75, "val/loss": 0.9, "gap/top1": 0.05, "train/top1": 0.8,
    "best/val/top1": 0.76, "val/class/cat/top1": 0.7, "eval_set": "test set", "parameters": 99,
    "world_size": 2, "replicas": 4, "wall_seconds": 1800.0, "git_commit": "0123456789" * 4,
    "diagnosis": [{"name": "late rise", "text": "..."}],
    "versions": {"torch": "2.14"}, "hardware": {"cpu": "Some CPU", "threads_per_rank": 1},
}  # fmt: skip
ROWS = [
    {"step": 5, "epoch": 0.5, "train/loss": 2.0, "train/lr": 0.1},
    {"step": 10, "epoch": 1.0, "val/top1": 0.6, "val/loss": 1.1, "gap/top1": -0.1},
    {"step": 20, "epoch": 2.0, "val/top1": 0.75, "val/loss": 0.9, "gap/top1": 0.05},
]


def _run(folder: Path, *pairs: str, **summary: object) -> Path:
    folder.mkdir()
    config = load_config(["train.epochs=2", "parallel.replicas=4", *pairs])
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "plan.json").write_text(json.dumps({"global_batch_size": 128}))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | summary))
    return folder


def test_a_run_condensed(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", "optim.lr=0.1", "run.dir=/secret", "model.widths=[4,8,8]")
    kept = condense(run, "group")
    assert kept["figures"] == {k: SUMMARY[k] for k in (
        "train/top1", "val/top1", "val/loss", "gap/top1", "best/val/top1")}  # fmt: skip
    assert kept["curve"] == {
        "epoch": [1.0, 2.0], "train/top1": [0.5, 0.8], "val/top1": [0.6, 0.75],
        "val/loss": [1.1, 0.9],
    }  # fmt: skip
    assert kept["command"] == (
        "torchrun --standalone --nproc_per_node=2 -m dist_resnet.train 'model.widths=[4,8,8]'"
        " optim.lr=0.1 train.epochs=2 parallel.replicas=4"
    )
    assert "secret" not in json.dumps(kept)
    assert str(tmp_path) not in json.dumps(kept)
    one = condense(_run(tmp_path / "b", world_size=1), "group")
    assert one["command"].startswith("python -m dist_resnet.train ")


def test_the_command_gives_the_configuration_back(tmp_path: Path) -> None:
    pairs = [
        "optim.nesterov=true", "schedule.milestones=[3,5]", "train.max_steps=7", "seed=3",
        "eval.flip_tta=true", "augment.flip=false", "train.step_mode=eager", "optim.lr=1e-3",
        "wandb.group=x",
    ]  # fmt: skip
    run = _run(tmp_path / "a", *pairs)
    command = condense(run, "g")["command"]
    again = dict(flatten(to_dict(load_config(shlex.split(command)[5:]))))
    wanted = dict(flatten(to_dict(load_config([str(run / "config.yaml")]))))
    for key, value in wanted.items():
        if changes_trajectory(key) or key in ("eval.flip_tta", "train.max_steps"):
            assert again[key] == value, key


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        condense(run, "g")
    (run / "config.yaml").write_text("optim: {lrr: 1}\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    with pytest.raises(UserError, match="lrr"):
        condense(run, "g")
    (run / "config.yaml").write_text(to_yaml(load_config([])))
    (run / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json lacks 'global_batch_size'"):
        condense(run, "g")
    with pytest.raises(UserError, match="no such run folder"):
        condense(tmp_path / "none", "g")
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="no run of the group 'g'"):
        read_kept(tmp_path / "kept", "g")
    for damaged in ('{"kind": "run"}', '{"kind":', "[]"):
        (tmp_path / "kept" / "x.json").write_text(damaged)
        with pytest.raises(UserError, match=r"x\.json: not a kept run"):
            read_kept(tmp_path / "kept", "g")


def test_another_run_of_the_same_name_is_not_overwritten(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    first = condense(_run(tmp_path / "one" / "run"), "g")
    other = condense(_run(tmp_path / "two" / "run", "seed=1"), "g")
    path = write_kept(first, tmp_path)
    assert write_kept(first, tmp_path) == path
    with pytest.raises(UserError, match="holds another run"):
        write_kept(other, tmp_path)
    assert json.loads(path.read_text())["settings"] == first["settings"]
    path.write_text("{")
    with pytest.raises(UserError, match="not a kept run"):
        write_kept(first, tmp_path)


def test_a_table_has_a_row_for_each_setting_over_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        _run(tmp_path / "a", "optim.lr=0.1"),
        _run(tmp_path / "b", "optim.lr=0.1", "seed=1", **{"val/top1": 0.77}),
        _run(tmp_path / "c", **{"val/top1_tta": 0.8}),
    ]
    monkeypatch.chdir(tmp_path)
    assert main(["keep", "rates", *map(str, runs)]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names == ["rates-a.json", "rates-b.json", "rates-c.json"]
    page = tmp_path / "page.md"
    page.write_text("x\n<!-- runs benchmarks/runs: rates -->\nold\n<!-- end -->\ny\n")
    assert pages.main([str(page)]) == 0
    start = "torchrun --standalone --nproc_per_node=2 -m dist_resnet.train"
    assert page.read_text() == (
        "x\n<!-- runs benchmarks/runs: rates -->\n"
        "3 runs, 1.5 hours in all; 2 x 1 threads of Some CPU; torch 2.14; at 0123456; percent, of"
        " the last epoch; mean ± standard deviation over seeds:\n\n"
        "| optim.lr | epochs | global batch | n | seeds | test top-1 | with mirror images"
        " | train top-1 | gap | halfway | hours |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| default | 2 | 128 | 1 | 0 | 75.00 | 80.00 | 80.00 | 5.00 | 60.00 | 0.50 |\n"
        "| 0.1 | 2 | 128 | 2 | 0, 1 | 76.00 ± 1.41 |  | 80.00 ± 0.00 | 5.00 ± 0.00 | 60.00 ± 0.00"
        " | 0.50 |\n\n"
        "Row by row, the first seed:\n\n```\n"
        f"{start} train.epochs=2 parallel.replicas=4\n"
        f"{start} optim.lr=0.1 train.epochs=2 parallel.replicas=4\n"
        "```\n<!-- end -->\ny\n"
    )


def test_rows_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    pairs = ["data.batch_size_per_replica=512", "data.batch_size_per_replica=1024", "seed=2"]
    runs = [condense(_run(tmp_path / pair, pair), "g") for pair in pairs]
    table = pages.of_runs(runs).split("\n\n")[1].splitlines()
    assert [line.split(" ")[1] for line in table[2:]] == ["default", "512", "1024"]


def test_a_chart_is_well_formed_and_ends_where_the_run_does(tmp_path: Path) -> None:
    root = ElementTree.fromstring(top1_curves([condense(_run(tmp_path / "a <b>"), "g")]))
    paths = [
        (p.get("class"), p.get("d", "")) for p in root.iter("{http://www.w3.org/2000/svg}path")
    ]
    lines = [[tuple(map(float, p.split())) for p in re.split("[ML]", d)[1:]]
             for kind, d in paths if kind.startswith("line") and "L" in d]  # fmt: skip
    grid = [float(d.split()[1].split("H")[0]) for kind, d in paths if kind == "grid"]
    # Marks are 0.1 apart: evaluation ends at 0.75, between the two topmost; training at 0.8.
    evaluated, trained = (line[-1] for line in lines)
    assert evaluated[1] == pytest.approx(sum(sorted(grid)[:2]) / 2, abs=0.1)
    assert trained[1] == pytest.approx(min(grid), abs=0.1)
    assert evaluated[0] == trained[0] == 406


def test_kept_runs_were_made_by_committed_code() -> None:
    files = sorted((ROOT / "benchmarks" / "runs").glob("*.json"))
    assert files
    for path in files:
        assert re.fullmatch("[0-9a-f]{40}", json.loads(path.read_text())["commit"]), path.name


@pytest.mark.parametrize(
    ("config", "group"),
    [
        ("resnet20", "recipe"),
        ("resnet20_fast", "fast"),
        ("resnet20_8gpu", "large"),
        ("resnet20_best", "best"),
    ],
)
def test_a_recipe_is_what_was_run(config: str, group: str) -> None:
    """But for what the machine settled, the evaluations, the seed and fast's shorter runs."""
    free = ("seed", "train.epochs", "train.step_mode", "precision.dtype", "eval.every_epochs")
    values = flatten(to_dict(load_config([str(ROOT / "configs" / f"{config}.yaml")])))
    wanted = {key: value for key, value in values if changes_trajectory(key) and key not in free}
    for run in read_kept(ROOT / "benchmarks" / "runs", group):
        pairs = [word for word in shlex.split(run["command"]) if "=" in word and word[0] != "-"]
        found = dict(flatten(to_dict(load_config(pairs))))
        wanted["parallel.replicas"] = found["parallel.replicas"]
        assert {key: found[key] for key in wanted} == wanted, run["name"]
