"""Sweeps: the command that wandb's agent makes of configs/sweep.yaml, and the grid without it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config, to_yaml
from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.folder import RunFolder
from dist_resnet.sweep.__main__ import _warns, main
from dist_resnet.sweep.grid import Trial, read_grid
from tests.helpers.jobs import ROOT, kill_tree, wait_for_step

SWEEP = ROOT / "configs" / "sweep.yaml"
QUICK = ["model.widths=[8,8,8]", "wandb.mode=disabled", "parallel.device=cpu", "train.epochs=1"]


def _content() -> dict[str, Any]:
    return dict(yaml.safe_load(SWEEP.read_text()))


def _small(folder: Path, **changes: Any) -> Path:
    """Two learning rates in plain processes; `changes` replace parts of it."""
    content = {
        "method": "grid",
        "metric": {"name": "val/top1", "goal": "maximize"},
        "command": ["${interpreter}", "-m", "dist_resnet.train", "${args_no_hyphens}"],
        "parameters": {"optim": {"parameters": {"lr": {"values": [0.02, 0.0001]}}}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "dist_resnet.sweep", *arguments],
            stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _expanded_by_wandb(command: list[str], values: dict[str, Any]) -> list[str]:
    """As wandb/wandb_agent.py puts a trial's values into the command, by its own helpers."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    words = utils.create_sweep_command(list(command))
    variables = utils.create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in values.items()}}
    )
    variables |= {"interpreter": [sys.executable], "program": ["unused"]}
    full: list[str] = []
    for word in words:
        name = word[2:-1] if word.startswith("${") else ""
        full += variables[name] if name else [word]
    return full


def test_the_agents_command_trains_the_digits(digits: Dataset, tmp_path: Path) -> None:
    # Nested parameters arrive as one dict a section.
    values = {"optim": {"lr": 0.02, "weight_decay": 0.0005}, "seed": 1}
    command = _expanded_by_wandb(_content()["command"], values)
    where = [f"data.root={digits.folder.parent}", f"run.dir={tmp_path}", "parallel.threads=1"]
    done = subprocess.run(
        [*command, *where, *QUICK], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optim"]["lr"] == 0.02
    assert config["optim"]["weight_decay"] == 0.0005
    assert (config["seed"], config["data"]["dataset"]) == (1, "digits")
    metric = _content()["metric"]["name"]
    assert 0 <= json.loads((run / "summary.json").read_text())[metric] <= 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # leaves it open
def test_wandb_accepts_the_file() -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    assert utils.load_sweep_config(str(SWEEP)) == _content()


def test_the_shipped_grid_is_what_the_agent_would_run() -> None:
    grid = read_grid(SWEEP, [])
    assert len({trial.folder for trial in grid.trials}) == len(grid.trials) == 8
    first = grid.trials[0]
    assert first.values == {"optim.lr": "0.02", "optim.weight_decay": "0.0005", "seed": "0"}
    nested = {"optim": {"lr": 0.02, "weight_decay": 0.0005}, "seed": 0}
    agents = _expanded_by_wandb(_content()["command"], nested)
    from dist_resnet.config.load import trajectory_hash

    hashes = [
        trajectory_hash(load_config(words[words.index("dist_resnet.train") + 1 :]))
        for words in (first.command, agents)
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "swept",
    [
        {"train": {"parameters": {"max_steps": {"values": [3, 6]}}}},
        {"eval": {"parameters": {"flip_tta": {"values": [True, False]}}}},
        {"data": {"parameters": {"loader": {"values": ["ffcv", "resident"]}}}},
        {"wandb": {"parameters": {"tags": {"values": [["a"], ["b"], []]}}}},
        {"train": {"parameters": {"early_stop": {"values": [True, False]}}}},
    ],
)
def test_no_two_trials_share_a_folder(swept: dict[str, Any], tmp_path: Path) -> None:
    file = _small(tmp_path, parameters=swept)
    file = file.rename(tmp_path / "a-quite-descriptive-name-of-a-sweep-of-this-key.yaml")
    trials = read_grid(file, []).trials
    assert len({trial.folder for trial in trials}) == len(trials) > 1


def test_a_sweep_does_not_take_another_ones_figures_for_its_own(tmp_path: Path) -> None:
    file = _small(tmp_path)
    names = [
        read_grid(file, extra).trials[0].folder.name
        for extra in ([], ["train.max_steps=3"], ["train.max_steps=6"], ["eval.flip_tta=true"],
                      ["data.root=elsewhere"], ["parallel.threads=1"])
    ]  # fmt: skip
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"seed": {"values": [1, 2, 1]}}, "seed=1 and seed=1 are one training"),
        ({"optim": {"parameters": {"lr": {"values": [0.1, 0.1]}}}}, "optim.lr=0.1 and"),
        ({"run": {"parameters": {"name": {"values": ["a", "b"]}}}}, "run.name=a"),
    ],
)
def test_trials_that_would_be_one_run_are_refused(
    parameters: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read_grid(_small(tmp_path, parameters=parameters), [])
    assert words in str(caught.value)


def test_values_within_mappings_and_lists_arrive_as_they_were_written(tmp_path: Path) -> None:
    args = {"depth": 2, "wide": False, "name": "2", "rate": 0.5, "none": None, "text": "a: b, [c]"}
    swept = {"model": {"parameters": {"name": {"value": "nets:small"}, "args": {"values": [args]}}}}
    extras = [{"name": "my:erase", "args": {"side": 3, "seen": [[1, 2], ["x y", "3"]]}}, "my:other"]
    swept["augment"] = {"parameters": {"extra": {"values": [extras]}}}
    (trial,) = read_grid(_small(tmp_path, parameters=swept), []).trials
    assert trial.config.model.args == args
    assert trial.config.augment.extra == extras
    again = load_config(trial.command[trial.command.index("dist_resnet.train") + 1 :])
    assert again.model.args == args


def test_a_mistyped_metric_is_told_after_the_first_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, runs = (
        _small(tmp_path, metric={"name": "val/top_1", "goal": "maximize"}),
        tmp_path / "runs",
    )
    first, _ = _finish(file, [f"run.dir={runs}"])
    grid = read_grid(file, [f"run.dir={runs}"])
    assert _warns(grid, first)
    assert "did you mean val/top1?" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"val/top_1: .* did you mean val/top1\?"):
        main([str(file), "--", f"run.dir={runs}"])
    assert "done already" in capsys.readouterr().out
    assert not _warns(replace(grid, metric="val/top1"), first)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_grid_goes_on(tiny: Dataset, tmp_path: Path) -> None:
    where = [f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}"]
    arguments = [
        str(_small(tmp_path)), "--", *where, *QUICK, f"run.dir={tmp_path / 'runs'}",
        "train.epochs=16", "eval.every_epochs=16", "data.batch_size_per_replica=4",
        "log.every_steps=5", "parallel.threads=1", "checkpoint.every_steps=100",
        "checkpoint.every_epochs=0",
    ]  # fmt: skip
    first, second = (trial.folder for trial in read_grid(Path(arguments[0]), arguments[2:]).trials)
    log = tmp_path / "log"
    job = _start(arguments, log)
    try:
        wait_for_step(second, 20, job, 120)
        (trainer,) = psutil.Process(job.pid).children()
        assert (first / "summary.json").exists(), log.read_text()[-2000:]
        assert not (second / "summary.json").exists()
        job.send_signal(signal.SIGKILL)
        # The kernel tells the trainer, which saves: it must not hold the folder for ever.
        psutil.wait_procs([trainer], timeout=240)
        assert not trainer.is_running()
    finally:
        kill_tree(job)
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    again = _start(arguments, log)
    try:
        assert again.wait(240) == 0, log.read_text()[-3000:]
    finally:
        kill_tree(again)
    text = log.read_text()
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    assert f"1 of 2, {first}: done already" in text
    assert "continued at step" in text
    head, *rows = text.splitlines()[-3:]
    assert head.split() == ["optim.lr", "val/top1", "state", "run"]
    shown = [float(row.split()[1]) for row in rows]
    figures = {f: json.loads((f / "summary.json").read_text())["val/top1"] for f in (first, second)}
    assert shown == sorted((round(f, 4) for f in figures.values()), reverse=True)
    assert {row.split()[-1] for row in rows} == {str(first), str(second)}


@pytest.mark.slow
def test_a_request_to_stop_saves_and_ends_the_grid(tiny: Dataset, tmp_path: Path) -> None:
    where = [f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}"]
    arguments = [
        str(_small(tmp_path)), "--", *where, *QUICK, f"run.dir={tmp_path / 'runs'}",
        "train.epochs=5000", "parallel.threads=1", "log.every_steps=5",
    ]  # fmt: skip
    first = read_grid(Path(arguments[0]), arguments[2:]).trials[0].folder
    job = _start(arguments, tmp_path / "log")
    try:
        wait_for_step(first, 5, job, 60)
        job.terminate()
        assert job.wait(240) == 75
    finally:
        kill_tree(job)
    assert json.loads((first / "status.json").read_text())["state"] == "preempted"
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_an_impossible_trial_is_a_row_and_the_others_run(
    tiny: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    swept = {"data": {"parameters": {"batch_size_per_replica": {"values": [8, 4096, 16]}}}}
    arguments = [
        str(_small(tmp_path, parameters=swept)), "--", f"data.root={tiny.folder.parent}",
        f"data.dataset={tiny.folder.name}", f"run.dir={tmp_path / 'runs'}", "train.max_steps=1",
        *QUICK,
    ]  # fmt: skip
    assert main(arguments) == 1
    head, *rows = capfd.readouterr().out.splitlines()[-4:]
    assert head.split() == ["data.batch_size_per_replica", "val/top1", "state", "run"]
    assert sorted(row.split()[0] for row in rows[:2]) == ["16", "8"]
    assert all(row.split()[2] == "done" for row in rows[:2])
    size, figure, state, _, *reason = rows[2].split()
    assert (size, figure, state) == ("4096", "-", "failed")
    assert "the training set has 53" in " ".join(reason)

    assert main(arguments) == 1
    text = capfd.readouterr().out
    assert text.count("done already") == 2
    assert "failed already: data.batch_size_per_replica=4096" in text
    assert "--retry-failed" in text
    assert main([arguments[0], "--retry-failed", *arguments[1:]]) == 1
    text = capfd.readouterr().out
    assert "failed already" not in text
    assert text.count("done already") == 2


def _finish(file: Path, arguments: list[str]) -> list[Trial]:
    """Leave in the folders of a grid's possible trials what trainings leave at their end."""
    trials = read_grid(file, arguments).trials
    for number, trial in enumerate(trials):
        if not trial.impossible:
            trial.folder.mkdir(parents=True)
            (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
            (trial.folder / "summary.json").write_text(
                json.dumps({"step": 3, "val/top1": 0.5 + number / 100})
            )
            RunFolder(trial.folder).set_status("done", 3, exit_code=0)
    return trials


def test_a_folder_in_which_another_run_has_ended_since_is_not_the_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, extra = _small(tmp_path), [f"run.dir={tmp_path / 'runs'}", "train.max_steps=3"]
    first, _ = _finish(file, extra)
    assert main([str(file), "--", *extra]) == 0
    RunFolder(first.folder).refuse("another command, with optim.lr=7", 2)
    assert main([str(file), "--", *extra]) == 0
    assert "optim.lr=7" not in capsys.readouterr().out
    # run.extend=true train.max_steps=9, by hand
    longer = replace(first.config, train=replace(first.config.train, max_steps=9))
    (first.folder / "config.yaml").write_text(to_yaml(longer))
    assert main([str(file), "--", *extra]) == 1
    text = capsys.readouterr().out
    assert "failed already" in text
    row = next(line for line in text.splitlines() if line.startswith("0.02 "))
    assert row.split()[1:3] == ["-", "failed"]
    assert "train.max_steps: 3 -> 9" in row


def test_a_combination_that_is_impossible_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = {"train.epochs": {"values": [1, 5]}, "schedule.warmup_epochs": {"values": [0, 2]}}
    file, extra = _small(tmp_path, parameters=swept), [f"run.dir={tmp_path / 'runs'}"]
    _finish(file, extra)
    assert main([str(file), "--", *extra]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[3] for row in rows] == ["done", "done", "done", "failed"]
    assert rows[3][:3] == ["2", "1", "-"]
    assert "schedule.warmup_epochs=2.0:" in rows[3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "bayes"}, "method=bayes"),
        ({"metric": {"name": "val/top1"}}, "goal"),
        ({"command": ["python", "x.py"]}, "command"),
        ({"parameters": {}}, "must name parameters"),
        ({"parameters": {"seed": {"min": 1, "max": 3}}}, "seed: needs values"),
        ({"parameters": {"optim": {"parameters": {"lrr": {"values": [1]}}}}}, "optim.lr"),
        ({"parameters": {"seed": {"values": [-2, -1]}}}, "seed=-2"),
    ],
)
def test_what_is_no_grid_is_refused_before_anything_starts(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        main([str(_small(tmp_path, **changes)), "--", f"run.dir={tmp_path / 'runs'}"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_command_line_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    for arguments in (["--dry"], [str(tmp_path / "none")], [str(broken)], [str(SWEEP), "seed=1"]):
        with pytest.raises(UserError) as caught:
            main(arguments)
        assert "\n" not in str(caught.value)


def test_the_last_of_several_arguments_counts(tmp_path: Path) -> None:
    plain, other, renamed = (
        read_grid(_small(tmp_path), extra).trials[0].folder
        for extra in ([], ["train.epochs=3"], ["wandb.mode=offline", "run.dir=elsewhere"])
    )
    assert plain.name != other.name  # other weights: another run
    assert (renamed.name, renamed.parent) == (plain.name, Path("elsewhere"))
