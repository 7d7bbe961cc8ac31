"""The diagnosis, on curves made so that it is known; each rule fires once and just not once."""

from collections.abc import Sequence

import pytest

from dist_resnet.runs.diagnosis import Row, diagnose

HIGH, LOW = 0.05, 0.004  # below a tenth of the peak


def rows_of(
    train: Sequence[float],
    val: Sequence[float],
    rates: Sequence[float] | None = None,
    images: int | None = 10_000,
) -> list[Row]:
    """metrics.jsonl of a run: a training row, then an evaluation, each epoch."""
    rows: list[Row] = []
    for epoch, (of_train, of_val) in enumerate(zip(train, val, strict=True), 1):
        rate = HIGH if rates is None else rates[epoch - 1]
        base = {"step": 100 * epoch, "epoch": float(epoch)}
        rows.append(base | {"train/loss": 1.0, "train/lr": rate})
        evaluation = base | {"val/top1": of_val, "gap/top1": of_train - of_val}
        rows.append(evaluation if images is None else evaluation | {"val/images": images})
    return rows


def names(rows: Sequence[Row]) -> set[str]:
    return {finding["name"] for finding in diagnose(rows)}


def text(rows: Sequence[Row], name: str) -> str:
    return next(finding["text"] for finding in diagnose(rows) if finding["name"] == name)


def test_nothing_is_said_before_the_first_evaluation() -> None:
    assert diagnose([]) == []
    assert diagnose([{"step": 50, "train/lr": 0.05, "train/loss": 2.3}]) == []
    diverged: Row = {"step": 100, "epoch": 1.0, "val/top1": None, "gap/top1": None}
    assert diagnose([diverged]) == []


@pytest.mark.parametrize(
    ("train", "verdict"), [(0.851, "large"), (0.849, "moderate"), (0.799, "negative")]
)
def test_the_gap_and_its_verdict(train: float, verdict: str) -> None:
    line = text(rows_of([train], [0.8]), "generalisation gap")
    assert line.startswith(f"{verdict}: train/top1 {train:.4f} minus val/top1 0.8000 is ")
    assert f"{train - 0.8:+.4f}" in line
    assert "0.05" in line  # the rule
    assert ("mixup and dropout" in line) == (verdict == "negative")


@pytest.mark.parametrize(("end", "fires"), [(0.811, True), (0.809, False)])
def test_late_rise(end: float, fires: bool) -> None:
    # The median before is 0.80, whatever the outlier; a warm-up at a low rate is no late phase.
    rates = [0.001, HIGH, HIGH, HIGH, LOW, LOW]
    rows = rows_of([0.9] * 6, [0.3, 0.80, 0.60, 0.82, 0.805, end], rates)
    assert ("late rise" in names(rows)) == fires
    if fires:
        line = text(rows, "late rise")
        assert "+0.0110, from 0.8000 to 0.8110, in the last 2 of 6" in line
        assert "below 10% of its peak 0.05" in line
        assert "+0.01" in line


def test_no_late_rise_while_the_rate_is_high() -> None:
    assert "late rise" not in names(rows_of([0.9] * 4, [0.5, 0.6, 0.7, 0.8]))


@pytest.mark.parametrize(
    ("train", "val", "count", "fires"),
    [
        (0.011, 0.0019, 6, True),
        (0.009, 0.0019, 6, False),
        (0.011, 0.0021, 6, False),
        (0.011, 0.0019, 5, False),
    ],
)
def test_overfitting(train: float, val: float, count: int, fires: bool) -> None:
    # The last third of six evaluations is two: their rise is their difference.
    rows = rows_of([0.9] * (count - 1) + [0.9 + train], [0.8] * (count - 1) + [0.8 + val])
    assert ("overfitting" in names(rows)) == fires
    if fires:
        line = text(rows, "overfitting")
        assert "last 2 of 6 evaluations train/top1 moves +0.0110 and val/top1 +0.0019" in line
        assert "more mixup or dropout" in line
        assert "at least +0.01, val below +0.002" in line


def test_training_below_validation_is_no_overfitting() -> None:
    assert "overfitting" not in names(rows_of([0.7] * 5 + [0.72], [0.8] * 6))


@pytest.mark.parametrize(
    ("train", "val", "level", "fires"),
    [
        (0.006, 0.006, 0.70, True),
        (0.004, 0.006, 0.70, False),
        (0.006, 0.004, 0.70, False),
        (0.006, 0.006, 0.81, False),  # training above validation
    ],
)
def test_underfitting(train: float, val: float, level: float, fires: bool) -> None:
    # The last tenth of 40 evaluations is four: the mean of two minus that of the two before.
    rows = rows_of([level] * 38 + [level + train] * 2, [0.8] * 38 + [0.8 + val] * 2)
    assert ("underfitting" in names(rows)) == fires
    if fires:
        line = text(rows, "underfitting")
        assert "train/top1 0.7060 is below val/top1 0.8060" in line
        assert "last 4 of 40 evaluations both still rise, by +0.0060 and +0.0060" in line
        assert "less regularisation" in line


@pytest.mark.parametrize(("last", "fires"), [(0.8939, True), (0.8951, False)])
def test_decline_at_low_learning_rate(last: float, fires: bool) -> None:
    # Two standard errors of 20,000 images at 0.894 are 0.0044: the rule's 0.005 decides.
    rates = [HIGH, HIGH, LOW, LOW]
    rows = rows_of([0.95] * 4, [0.7, 0.95, 0.9, last], rates, images=20_000)
    assert ("decline at low learning rate" in names(rows)) == fires
    if fires:
        line = text(rows, "decline at low learning rate")
        assert "falls from 0.9000 to 0.8939 (-0.0061)" in line
        assert "here 0.0050" in line


@pytest.mark.parametrize(("images", "fires"), [(100_000, True), (360, False), (None, True)])
def test_few_images_make_no_decline(images: int | None, fires: bool) -> None:
    rows = rows_of([0.95] * 3, [0.7, 0.9, 0.88], [HIGH, LOW, LOW], images)
    assert ("decline at low learning rate" in names(rows)) == fires


def test_evaluations_that_are_not_finite_are_left_out() -> None:
    rows = rows_of([0.9], [0.8])
    broken: Row = {"step": 200, "epoch": 2.0, "val/top1": None, "gap/top1": None}
    assert diagnose([*rows, broken]) == diagnose(rows)


def test_a_finding_is_one_line() -> None:
    rows = rows_of([0.5, 0.6], [0.6, 0.7], [HIGH, LOW])
    assert len(diagnose(rows)) > 1
    assert all(set(f) == {"name", "text"} and "\n" not in f["text"] for f in diagnose(rows))
