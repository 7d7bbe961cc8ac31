"""The same replicas on 1, 2 and 4 ranks: one trajectory."""

from pathlib import Path

import pytest
import torch

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import BF16, differences, final_state, metric_rows, run_job

EPOCH = 22  # steps in one of digits at a global batch of 64
STEPS = 3 * EPOCH


def settings(folder: Path, digits: Dataset, name: str, *extra: str) -> list[str]:
    return [
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.root={digits.folder.parent}",
        "data.dataset=digits",
        "parallel.replicas=4",
        "data.batch_size_per_replica=16",
        "train.epochs=5",
        "train.ema_decay=0.9",
        f"train.max_steps={STEPS}",
        "log.every_steps=11",
        "model.widths=[4,4,8]",
        "data.loader=resident",
        "wandb.mode=disabled",
        *extra,
    ]


def train(folder: Path, digits: Dataset, ranks: int, name: str, *extra: str) -> Path:
    outcome = run_job(ranks, settings(folder, digits, name, *extra), folder)
    assert outcome.code == 0, outcome.output
    return folder / name


@pytest.fixture(scope="module", params=["fp32", BF16])
def exact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digits: Dataset
) -> tuple[Path, tuple[str, str]]:
    """An exact run on one process, and what made it exact."""
    keys = ("parallel.reduction=exact", f"precision.dtype={request.param}")
    return train(tmp_path_factory.mktemp("exact"), digits, 0, "one", *keys), keys


@pytest.mark.timeout(400)
def test_exact_run_continued_on_other_numbers_of_ranks(
    tmp_path: Path, digits: Dataset, exact: tuple[Path, tuple[str, str]]
) -> None:
    """Begun on four, then fewer; equal at the end, so that no part differed.

    That covers any number of ranks from the first step on, too.
    """
    one, keys = exact
    for ranks, steps in ((4, EPOCH), (2, 2 * EPOCH), (0, STEPS)):
        switched = train(tmp_path, digits, ranks, "switched", *keys, f"train.max_steps={steps}")
    assert differences(one, switched) == []


@pytest.mark.timeout(300)
def test_fast_reduction_differs_by_rounding_only(tmp_path: Path, digits: Dataset) -> None:
    """Replicas side by side are summed otherwise than over ranks: seen before it has grown."""
    keys = ("precision.dtype=fp32", "parallel.threads=1", "train.max_steps=1", "log.every_steps=1")
    runs = [train(tmp_path, digits, ranks, f"on{ranks}", *keys) for ranks in (0, 4)]
    states = [final_state(run) for run in runs]
    for other in states[1:]:
        for name, value in states[0].items():
            if name.startswith("model.") and isinstance(value, torch.Tensor):
                difference = (value - other[name]).abs().max()
                assert difference <= 1e-5 * value.abs().max() + 1e-9, name
    losses = [metric_rows(run)[0]["train/loss"] for run in runs]
    assert losses[1:] == pytest.approx([losses[0]], rel=1e-6)
