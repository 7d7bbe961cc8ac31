"""When a run ends: at its last step, or early where accuracy declines at a low learning rate."""

from collections.abc import Iterator

import pytest
import torch

from dist_resnet.config.plan import make_plan
from dist_resnet.data.stream import Batch
from dist_resnet.runs.diagnosis import diagnose
from dist_resnet.step.state import build_state
from dist_resnet.training.evaluation import Evaluation
from dist_resnet.training.loop import Trainer
from dist_resnet.training.stopwatch import Stopwatch
from tests.helpers.training import BATCH, CLASSES, CPU, batch_of, small_config, train_step

EPOCHS, STEPS = 8, 2
# Warm-up, a high rate, and from epoch 4 on a low one.
RATES = [1e-5, 1e-4, *[1e-2] * 4, *[9e-4] * 10]


class Watcher:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.messages: list[str] = []

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(dict(row))

    def message(self, text: str) -> None:
        self.messages.append(text)


def _evaluation(correct: int, images: int) -> Evaluation:
    return Evaluation(1.0, correct, images, None, torch.eye(CLASSES, dtype=torch.int64), correct)


def _fitted(correct: list[int], *pairs: str, images: int = 10_000) -> tuple[Trainer, Watcher]:
    """A trainer after `fit`, its evaluations scripted."""
    config = small_config(f"train.epochs={EPOCHS}", "log.every_steps=1", *pairs)
    plan = make_plan(config, BATCH * STEPS, 1)
    step = train_step(config, 1)
    step.rates = RATES
    script, watcher = iter(correct), Watcher()

    def batches() -> Iterator[Batch]:
        for number in range(plan.total_steps):
            yield batch_of(number, 1)

    trainer = Trainer(
        config=config, plan=plan, state=step.state, train_step=step, batches=batches(),  # type: ignore[arg-type]
        evaluate=lambda model: _evaluation(next(script), images),  # type: ignore[arg-type]
        classes=tuple("abcde"), tracker=watcher, watch=Stopwatch(0.0, CPU), writer=None,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit()
    return trainer, watcher


DECLINE = [1000, 8000, 8100, 9000, 8951, 8949, 8800, 9100]
"""Falls by half a percent and two standard errors (0.61 here) in the seventh epoch only."""


def test_a_decline_at_a_low_rate_ends_the_run_where_that_was_asked_for() -> None:
    trainer, watcher = _fitted(DECLINE, "train.early_stop=true")
    assert trainer.state.step == 7 * STEPS
    assert trainer.state.stopped_early
    assert len([row for row in watcher.rows if "val/top1" in row]) == 7
    (line,) = watcher.messages
    assert "from 0.9000" in line
    assert "step 14 of 16" in line


def test_it_is_off_by_default() -> None:
    trainer, watcher = _fitted(DECLINE)
    assert trainer.state.step == EPOCHS * STEPS
    assert not trainer.state.stopped_early
    assert not watcher.messages


@pytest.mark.parametrize(
    ("correct", "images"),
    [
        ([9000, 5000, 8000, 9000, 9000, 9000, 9000, 9000], 10_000),  # at a high rate, after warm-up
        ([100, 200, 300, 300, 296, 295, 295, 295], 400),  # within noise: 1.3%, two errors are 4.4%
        ([1000, 8000, 8100, 9000, 9000, 9000, 9000, 8000], 10_000),  # at the end anyway
    ],
    ids=["high rate", "few images", "last epoch"],
)
def test_what_is_no_early_end(correct: list[int], images: int) -> None:
    trainer, watcher = _fitted(correct, "train.early_stop=true", images=images)
    assert trainer.state.step == EPOCHS * STEPS
    assert not trainer.state.stopped_early
    assert not watcher.messages


def test_the_best_at_a_high_rate_is_not_compared_with() -> None:
    """The highest of many noisy evaluations at a high rate says little; then it only rises."""
    rising = [1000, 9000, 8000, 8900, 8920, 8930, 8940, 8950]
    trainer, watcher = _fitted(rising, "train.early_stop=true")
    assert trainer.state.step == EPOCHS * STEPS
    assert "decline at low learning rate" not in {f["name"] for f in diagnose(watcher.rows)}


def test_the_diagnosis_finds_the_decline_that_ended_a_run() -> None:
    _, watcher = _fitted(DECLINE, "train.early_stop=true")
    assert "decline at low learning rate" in {f["name"] for f in diagnose(watcher.rows)}


def test_a_run_continued_beyond_its_early_end_forgets_it() -> None:
    trainer, _ = _fitted(DECLINE, "train.early_stop=true", "log.every_steps=4")
    trainer.batches = (batch for batch in [batch_of(14, 1)])
    trainer._train_on_next_batch()
    assert trainer.state.step == 15
    assert not trainer.state.stopped_early


def test_the_last_steps_of_an_early_end_are_logged() -> None:
    _, watcher = _fitted(DECLINE, "train.early_stop=true", "log.every_steps=4")
    assert [row["step"] for row in watcher.rows if "train/loss" in row] == [4, 8, 12, 14]


def test_an_early_end_survives_a_checkpoint() -> None:
    trainer, _ = _fitted(DECLINE, "train.early_stop=true")
    again = build_state(trainer.config, CLASSES, torch.float32, CPU)
    again.restore(trainer.state.snapshot())
    assert again.stopped_early
    assert again.best_at_low_rate == 0.9
