"""A refused command leaves a run as it was; run.extend continues one as a recorded fork."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_resnet.base.errors import DistResnetError, UserError
from dist_resnet.config.builtins import OPTIMIZERS
from dist_resnet.config.load import load_config, named_keys
from dist_resnet.config.plan import make_plan, rates
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.fork import starting_point
from tests.helpers.checkpoints import checkpoint_of
from tests.helpers.jobs import Outcome, final_state, metric_rows, run_job
from tests.helpers.own_runs import Runs


def test_a_refused_command_leaves_a_run_as_it_was(runs: Runs) -> None:
    assert runs() == 0
    assert runs.json("status.json")["state"] == "done"
    for settings, words in (
        (["train.epochs=4"], "train.epochs: 3 -> 4"),
        (["train.epochs=4"], "run.extend=true"),
        (["optim.lr=0.1"], "optim.lr: 0.05 -> 0.1"),
        (["run.resume=never"], "run.resume=never"),
        (["data.dataset=none"], "none"),
        (["run.resume=none.pt"], "none.pt"),
        (["run.overwrite=true", "data.dataset=none"], "none"),
        (["run.overwrite=true", "run.resume=none.pt"], "none.pt"),
        (["data.val_split=1000"], "data.val_split"),
        (["train.max_steps=5"], "step 18 already"),
        (["run.extend=true", "train.epochs=2"], "step 18 already"),
    ):
        assert words in runs.refused(*settings)
        assert runs.json(".refused")["exit_code"] == 2
    assert runs() == 0  # complete already
    assert runs("run.overwrite=true", "train.epochs=1") == 0
    assert runs.json("status.json") == {"state": "done", "step": 6, "reason": "", "exit_code": 0}
    assert not (runs.path / ".refused").exists()


def test_a_first_command_that_is_refused_says_so_in_its_status(runs: Runs) -> None:
    with pytest.raises(UserError):
        runs("data.val_split=1000")
    status = runs.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "run.extend=true" in runs.refused("run.extend=true")


def test_a_fork_holds_out_no_images_that_were_trained_on(runs: Runs) -> None:
    assert runs("data.val_split=12", "train.epochs=1") == 0
    for keys, told in (
        (["data.val_split=13"], "data.val_split: 12 -> 13"),
        (["seed=1", "data.val_split=12"], "seed: 0 -> 1"),
        (["seed=1", "data.val_split=3"], "data.val_split: 12 -> 3; seed: 0 -> 1"),
    ):
        words = runs.refused("run.extend=true", "train.epochs=2", *keys)
        assert words == (
            f"run.extend=true: {told}: images held out so were trained on until here; leave that "
            "as it was, or set data.val_split=0"
        )
    # Of the same seed fewer are some of these; then the others have been trained on.
    assert runs("run.extend=true", "train.epochs=2", "data.val_split=3") == 0
    assert "12" in runs.refused("run.extend=true", "train.epochs=3", "data.val_split=12")
    assert runs("run.extend=true", "train.epochs=3", "data.val_split=0", "seed=1") == 0


@pytest.mark.parametrize("begun", [[], ["train.max_steps=8"]])
def test_more_epochs_after_the_end(runs: Runs, begun: list[str]) -> None:
    assert runs(*begun) == 0
    step = 8 if begun else 18
    before, history = final_state(runs.path), metric_rows(runs.path)
    assert runs("run.extend=true", "train.epochs=5") == 0
    status, summary, plan = (runs.json(f"{n}.json") for n in ("status", "summary", "plan"))
    assert (status["state"], status["step"], summary["step"]) == ("done", 30, 30)
    fork = {"step": step, "changed": ["train.epochs: 3 -> 5"]}
    assert [{k: f[k] for k in fork} for f in plan["forks"]] == [fork]
    # Weights go on, the schedule is the new plan's.
    rows = metric_rows(runs.path)
    kept = [row for row in rows if row["step"] <= step]
    assert kept == history
    config = load_config([*runs.common, "train.epochs=5", "parallel.replicas=1"])
    wanted = rates(config, make_plan(config, 53, 1))
    logged = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert [logged[n + 1] for n in range(step, 30)] == pytest.approx(wanted[step:])
    after = final_state(runs.path)
    assert any(not torch.equal(v, after[k]) for k, v in before.items() if k.startswith("model."))
    # The same command again, and the plain one: nothing more to do, and nothing forgotten.
    assert runs("run.extend=true", "train.epochs=5") == 0
    assert runs("train.epochs=5") == 0
    assert runs.json("plan.json")["forks"] == plan["forks"]


def test_a_fork_is_the_same_whether_or_not_it_is_stopped(runs: Runs) -> None:
    assert runs() == 0
    shutil.copytree(runs.path, runs.path.with_name("copy"))
    assert runs("run.extend=true", "train.epochs=5") == 0
    whole = final_state(runs.path)
    other = ["run.name=copy", "run.extend=true", "train.epochs=5"]
    assert runs(*other, "train.max_steps=21", "checkpoint.every_steps=1") == 0
    assert runs(*other) == 0
    parts = final_state(runs.path.with_name("copy"))
    assert all(torch.equal(v, parts[k]) for k, v in whole.items() if k.startswith("model."))


def test_other_keys_change_only_by_name(runs: Runs) -> None:
    assert runs("optim.lr=0.01") == 0
    line = runs.refused("run.extend=true", "train.epochs=5")
    assert "optim.lr: 0.01 -> 0.05" in line
    assert "names" in line
    assert runs("run.extend=true", "train.epochs=5", "optim.lr=0.05", "train.ema_decay=0.9") == 0
    (fork,) = runs.json("plan.json")["forks"]
    assert fork["changed"] == [
        "optim.lr: 0.01 -> 0.05", "train.ema_decay: 0.0 -> 0.9", "train.epochs: 3 -> 5",
    ]  # fmt: skip


def test_named_keys_come_from_files_and_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.1}\nseed: 3\n")
    named = named_keys([str(tmp_path / "a.yaml"), "train.epochs=3"])
    assert named == {"optim.lr", "seed", "train.epochs"}


def test_another_dataset_is_no_fork() -> None:
    config = load_config(["run.extend=true", "data.dataset=other"])
    saved = checkpoint_of(config=load_config(["data.dataset=one"]), fingerprint="a")
    with pytest.raises(UserError, match="the same data"):
        starting_point(saved, config, "b", ["data.dataset"])


def test_a_call_of_sys_exit_is_no_complete_training(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_resnet.step.train_step.TrainStep.__call__", lambda *_: sys.exit(0))
    with pytest.raises(DistResnetError, match=r"sys\.exit\(0\)") as caught:
        runs("train.step_mode=eager")
    assert caught.value.exit_code == 1
    status = runs.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)


def test_the_interpreters_end_is_told(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", kept.append)

    def ends(_: object, __: object, ___: object, folder: RunFolder) -> None:
        (tell,) = kept
        tell()  # Python ends; the thread that trains goes on for a moment
        folder.set_status("running", 9)

    monkeypatch.setattr("dist_resnet.training.run._run_in", ends)
    runs()
    status = runs.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "the interpreter ended" in status["reason"]


def test_torchrun_extends_too(runs: Runs, tmp_path: Path) -> None:
    assert runs() == 0
    settings = [*runs.common, "parallel.replicas=1", "run.extend=true", "train.epochs=4"]
    outcome: Outcome = run_job(1, settings, tmp_path)
    assert outcome.code == 0, outcome.output
    assert "fork: at step 18, train.epochs: 3 -> 4" in outcome.output
    assert runs.json("summary.json")["step"] == 24


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("sgd", "muon", True), ("sgd", "torch.optim:AdamW", False), ("my:A", "my:A", True),
        ("sgd", "lion", False), ("lion", "muon", False), ("lion", "lion", True),
    ],
)  # fmt: skip
def test_another_optimizer_begins_with_no_state(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str, kept: bool
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lion", "further:BuiltIn")
    saved = checkpoint_of(config=load_config([f"optim.name={before}"]))
    config = load_config(["run.extend=true", f"optim.name={after}", "optim.lr=0.2"])
    fork = starting_point(saved, config, "", ["optim.name", "optim.lr"])
    assert bool(fork.state.optimizer) == kept
    assert fork.state.model.keys() == saved.state.model.keys()
