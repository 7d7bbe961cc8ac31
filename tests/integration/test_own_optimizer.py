"""Optimizers of one's own in whole trainings: killed, continued, on one and two ranks, refused."""

import json
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import HELD, differences, kill_tree, launch_held, run_job, wait_for_step

SAVED = 10  # the last step with a checkpoint before HELD
OWN = {
    "AdamW": ["optim.name=torch.optim:AdamW", "optim.lr=0.002"],
    "RMSprop": [
        "optim.name=torch.optim:RMSprop", "optim.lr=0.0005", "optim.args.momentum=0.9",
        "optim.clip_norm=1.0", "optim.bias_lr_factor=2",
    ],
}  # fmt: skip


def settings(folder: Path, digits: Dataset, name: str, *extra: str) -> list[str]:
    return [
        f"run.dir={folder}", f"run.name={name}", f"data.root={digits.folder.parent}",
        "data.dataset=digits", "data.batch_size_per_replica=16", "train.max_steps=20",
        "checkpoint.every_steps=5", "log.every_steps=50", "wandb.mode=disabled",
        "parallel.replicas=2", "parallel.reduction=exact", "parallel.threads=1",
        "model.widths=[4,4,4]", "data.loader=resident", *extra,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OWN))
def test_killed_on_one_rank_and_continued_on_two(
    name: str, tmp_path: Path, digits: Dataset
) -> None:
    whole = run_job(0, settings(tmp_path, digits, "whole", *OWN[name]), tmp_path)
    assert whole.code == 0, whole.output
    keys = settings(tmp_path, digits, "killed", *OWN[name])
    job = launch_held(0, keys, tmp_path / "held.log")
    try:
        assert SAVED < HELD
        wait_for_step(tmp_path / "killed", SAVED, job, 100)
    finally:
        kill_tree(job)  # with SIGKILL
    again = run_job(2, keys, tmp_path)
    assert again.code == 0, again.output
    assert f"continued at step {SAVED}" in again.output
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_what_needs_a_closure_is_refused_on_both_ranks(tmp_path: Path, digits: Dataset) -> None:
    keys = settings(tmp_path, digits, "job", "optim.name=torch.optim:LBFGS")
    outcome = run_job(2, keys, tmp_path)
    assert outcome.code == 1  # torchrun's own, whatever its workers'
    line = "dist_resnet: optim.name=torch.optim:LBFGS: its step() needs a closure"
    assert line in outcome.output
    assert json.loads((tmp_path / "job" / "status.json").read_text())["exit_code"] == 2
