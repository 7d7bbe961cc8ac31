"""A run goes on from any one checkpoint: the step is the only position."""

import json
import shutil
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.checkpoint import read_checkpoint
from dist_resnet.runs.store import CheckpointStore
from tests.helpers.jobs import differences, final_state, metric_rows, run_job

MIDDLE = 28  # of 40 steps; an epoch of digits has 44 at batch 32


def settings(folder: Path, digits: Dataset, name: str, *extra: str) -> list[str]:
    return [
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.root={digits.folder.parent}",
        "data.dataset=digits",
        "data.val_split=100",
        "train.max_steps=40",
        "train.ema_decay=0.9",
        "checkpoint.every_steps=7",
        "checkpoint.keep=9",
        "log.every_steps=9",
        "model.widths=[4,4,4]",
        "data.loader=resident",
        "wandb.mode=disabled",
        "parallel.threads=1",
        *extra,
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    outcome = run_job(0, settings(folder, digits, "whole"), folder)
    assert outcome.code == 0, outcome.output
    return folder / "whole"


def middle_of(run: Path) -> Path:
    (found,) = (run / "checkpoints").glob(f"step-{MIDDLE:08d}-*.pt")
    return found


def made_elsewhere(checkpoint: Path, folder: Path) -> Path:
    """A copy that says that another processor computed it."""
    content = read_checkpoint(checkpoint)
    content.machine["cpu"] = "Z80"
    return CheckpointStore(folder, 1).save(content, best=False)


def test_from_a_mid_epoch_checkpoint_alone(tmp_path: Path, digits: Dataset, whole: Path) -> None:
    """By the other loader, and told that it was made elsewhere: the bits are the same."""
    alone = made_elsewhere(middle_of(whole), tmp_path)
    keys = settings(tmp_path, digits, "again", f"run.resume={alone}", "data.loader=ffcv")
    outcome = run_job(0, keys, tmp_path)
    assert outcome.code == 0, outcome.output
    assert f"continued at step {MIDDLE}" in outcome.output
    assert "not bit for bit the undisturbed run (cpu: Z80 -> " in outcome.output
    assert set(differences(whole, tmp_path / "again")) <= {"metrics.jsonl"}
    later = [row for row in metric_rows(whole) if row["step"] > MIDDLE]
    assert metric_rows(tmp_path / "again") == later


def test_a_run_taken_back_sets_its_later_checkpoints_aside(
    tmp_path: Path, digits: Dataset, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "whole")
    path = middle_of(tmp_path / "whole")
    keys = settings(tmp_path, digits, "whole", f"run.resume={path}")
    outcome = run_job(0, keys, tmp_path)
    assert outcome.code == 0, outcome.output
    assert differences(whole, tmp_path / "whole") == []
    assert list((tmp_path / "whole" / "checkpoints").glob("step-00000035-*.superseded"))


def test_never_refuses_a_folder_with_a_run_and_overwrite_begins_it_anew(
    tmp_path: Path, digits: Dataset, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "whole")
    refused = run_job(0, settings(tmp_path, digits, "whole", "run.resume=never"), tmp_path)
    assert refused.code == 2
    assert "run.resume=never" in refused.output
    assert "run.overwrite=true" in refused.output
    (tmp_path / "whole" / "notes.txt").write_text("the user's own")
    again = run_job(0, settings(tmp_path, digits, "whole", "run.overwrite=true"), tmp_path)
    assert again.code == 0, again.output
    assert "continued" not in again.output
    assert differences(whole, tmp_path / "whole") == []
    assert (tmp_path / "whole" / "notes.txt").exists()


def test_damaged_newest_checkpoint_is_told_and_the_one_before_used(
    tmp_path: Path, digits: Dataset, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoints"
    for path in folder.glob("*-00000040-*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    (flipped,) = folder.glob("step-00000035-*.pt")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (tmp_path / "whole" / "summary.json").unlink()
    outcome = run_job(0, settings(tmp_path, digits, "whole"), tmp_path)
    assert outcome.code == 0, outcome.output
    assert f"continued at step {MIDDLE}" in outcome.output
    assert "not bit for bit" not in outcome.output
    assert outcome.output.count("using the one before it") >= 2
    assert differences(whole, tmp_path / "whole") == []


def test_a_refused_checkpoint_leaves_the_run_as_it_was(
    tmp_path: Path, digits: Dataset, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "whole")
    before = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    keys = [f"run.resume={middle_of(whole)}", "optim.lr=0.2"]
    outcome = run_job(0, settings(tmp_path, digits, "whole", *keys), tmp_path)
    assert outcome.code == 2
    assert "optim.lr: 0.05 -> 0.2" in outcome.output
    assert sorted((tmp_path / "whole" / "checkpoints").iterdir()) == before


def test_an_early_end_comes_where_it_came_whatever_happened(
    tmp_path: Path, digits: Dataset
) -> None:
    """And Muon, of which every rank computes the whole, gives the same bits on one and two."""
    keys = [
        "train.early_stop=true", "train.max_steps=null", "train.epochs=5", "schedule.name=step",
        "schedule.milestones=[1,2]", "parallel.replicas=2", "parallel.reduction=exact",
        "optim.name=muon", "optim.nesterov=true", "checkpoint.every_epochs=0",
    ]  # fmt: skip

    def job(ranks: int, name: str, *extra: str) -> str:
        arguments = ["decline", "0", "0", *settings(tmp_path, digits, name, *keys, *extra)]
        outcome = run_job(ranks, arguments, tmp_path, 100, "tests.helpers.faulty_train")
        assert outcome.code == 0, outcome.output
        return outcome.output

    assert "train.early_stop: val/top1 has fallen" in job(2, "two")
    whole, one = tmp_path / "two", tmp_path / "one"
    last = final_state(whole)["step."]
    assert last < 5 * metric_rows(whole)[-1]["step"] / metric_rows(whole)[-1]["epoch"]
    (middle,) = (whole / "checkpoints").glob(f"step-{MIDDLE:08d}-*.pt")
    job(0, "one", f"run.resume={middle}")
    assert set(differences(whole, one)) <= {"metrics.jsonl"}
    (one / "summary.json").unlink()  # killed between the last checkpoint and the summary
    before = final_state(one), metric_rows(one)
    assert "continued at step" in job(0, "one")
    assert json.loads((one / "summary.json").read_text())["stopped_early"]
    assert metric_rows(one) == before[1]
    assert final_state(one).keys() == before[0].keys()
    assert set(differences(whole, one)) <= {"metrics.jsonl"}
    assert "complete already" in job(0, "one")
