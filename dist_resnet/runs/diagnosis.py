"""What the curves of a run say: findings with their figures, and the rule that each follows.

Pure functions of the rows of metrics.jsonl. Accuracies are shares in [0, 1]. A rise over a part of
a run is the mean over the second half of its evaluations minus the mean over the first half.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

Row = Mapping[str, float | int | None]

LARGE_GAP = 0.05
LOW_RATE = 0.1
"""A learning rate below this share of its peak is low."""
LATE_RISE = 0.01
BEFORE = 3
"""Evaluations before the low rates whose median the late rise starts from."""
PLATEAU, PLATEAU_TRAIN_RISE = 0.002, 0.01
PLATEAU_PART, PLATEAU_EVALUATIONS = 1 / 3, 6
STILL_RISING, STILL_RISING_PART = 0.005, 0.1
DECLINE = 0.005
REMEDIES = {
    "overfitting": "more mixup or dropout may help",
    "underfitting": "train longer, or with less regularisation",
    "decline at low learning rate": "the best checkpoint may serve better, and more regularisation"
    " may help",
}
"""What a finding advises, by its name."""
_LOWERED = (
    "train/top1 is measured while the weights still move, on augmented images; mixup and dropout,"
    " where they are on, lower it further"
)


@dataclass(frozen=True)
class Point:
    """One evaluation and the epoch of training before it."""

    train: float
    val: float
    rate: float | None
    """Learning rate of the last logged step; None: none was logged."""
    images: int | None
    """Images evaluated."""

    @property
    def gap(self) -> float:
        return self.train - self.val


def diagnose(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The findings {name, text} of a run, finished or not; empty before its first evaluation.

    Args:
        rows: of metrics.jsonl, in order. Evaluations that were not finite are left out.
    """
    points = evaluated_points(rows)
    if not points:
        return []
    peak = max((_number(row, "train/lr") or 0.0 for row in rows), default=0.0)
    found = ((name, rule(points, peak)) for name, rule in RULES.items())
    return [{"name": name, "text": text} for name, text in found if text is not None]


def decline_threshold(top1: float, images: int | None) -> float:
    """How far accuracy must have fallen to `top1` on so many images for a clear decline."""
    # On a few hundred images, one more or one less is no decline.
    noise = 2 * math.sqrt(top1 * (1 - top1) / images) if images else 0.0
    return max(DECLINE, noise)


def evaluated_points(rows: Sequence[Row]) -> list[Point]:
    """The evaluations among the rows, each with the learning rate last logged before it."""
    points, rate = [], None
    for row in rows:
        rate = rate if row.get("train/lr") is None else _number(row, "train/lr")
        val, gap = _number(row, "val/top1"), _number(row, "gap/top1")
        if val is not None and gap is not None:
            images = _number(row, "val/images")
            points.append(Point(val + gap, val, rate, None if images is None else int(images)))
    return points


def _gap(points: Sequence[Point], peak: float) -> str:
    last = points[-1]
    verdict = "large" if last.gap > LARGE_GAP else "negative" if last.gap < 0 else "moderate"
    text = (
        f"{verdict}: train/top1 {last.train:.4f} minus val/top1 {last.val:.4f} is {last.gap:+.4f}"
        f" at the last evaluation (rule: large above {LARGE_GAP}, negative below 0)"
    )
    return f"{text}; {_LOWERED}" if last.gap < 0 else text


def _late_rise(points: Sequence[Point], peak: float) -> str | None:
    late = _low_rate_part(points, peak)
    before = points[: len(points) - len(late)]
    if not late or not before:
        return None
    start = median(point.val for point in before[-BEFORE:])
    gain = late[-1].val - start
    if gain < LATE_RISE:
        return None
    return (
        f"val/top1 gains {gain:+.4f}, from {start:.4f} to {late[-1].val:.4f}, in the last"
        f" {len(late)} of {len(points)} evaluations, where the learning rate is below"
        f" {LOW_RATE:.0%} of its peak {peak:g} (rule: at least {LATE_RISE:+} over the median of the"
        f" {BEFORE} evaluations before them, fewer where there are fewer)"
    )


def _overfitting(points: Sequence[Point], peak: float) -> str | None:
    if len(points) < PLATEAU_EVALUATIONS:
        return None
    part = _last_part(points, PLATEAU_PART)
    train, val = _rise(part, lambda point: point.train), _rise(part, lambda point: point.val)
    # At a high learning rate validation stands still by chance: that alone is no overfitting.
    if points[-1].gap <= 0 or val >= PLATEAU or train < PLATEAU_TRAIN_RISE:
        return None
    return (
        f"over the last {len(part)} of {len(points)} evaluations train/top1 moves {train:+.4f} and"
        f" val/top1 {val:+.4f}: {REMEDIES['overfitting']} (rule: train above"
        f" val and rising at least {PLATEAU_TRAIN_RISE:+}, val below {PLATEAU:+}, over the last"
        f" third, {PLATEAU_EVALUATIONS} evaluations or more)"
    )


def _underfitting(points: Sequence[Point], peak: float) -> str | None:
    part = _last_part(points, STILL_RISING_PART)
    if len(part) < 2:
        return None
    train, val = _rise(part, lambda point: point.train), _rise(part, lambda point: point.val)
    if points[-1].gap >= 0 or min(train, val) < STILL_RISING:
        return None
    return (
        f"train/top1 {points[-1].train:.4f} is below val/top1 {points[-1].val:.4f}, and over the"
        f" last {len(part)} of {len(points)} evaluations both still rise, by {train:+.4f} and"
        f" {val:+.4f}: {REMEDIES['underfitting']} (rule: train below val, both at"
        f" least {STILL_RISING:+} over the last tenth, 2 evaluations or more); {_LOWERED}"
    )


def _decline(points: Sequence[Point], peak: float) -> str | None:
    late = _low_rate_part(points, peak)
    if not late:
        return None
    best, last = max(point.val for point in late), late[-1]
    threshold = decline_threshold(last.val, last.images)
    if best - last.val < threshold:
        return None
    return (
        f"val/top1 falls from {best:.4f} to {last.val:.4f} ({last.val - best:+.4f}) while the"
        f" learning rate is below {LOW_RATE:.0%} of its peak {peak:g}:"
        f" {REMEDIES['decline at low learning rate']} (rule: at least {DECLINE} and two"
        f" standard errors, here {threshold:.4f})"
    )


Rule = Callable[[Sequence[Point], float], str | None]
RULES: dict[str, Rule] = {
    "generalisation gap": _gap,
    "late rise": _late_rise,
    "overfitting": _overfitting,
    "underfitting": _underfitting,
    "decline at low learning rate": _decline,
}
"""By name: from the evaluations and the peak learning rate to the line, or None: does not apply."""


def _low_rate_part(points: Sequence[Point], peak: float) -> Sequence[Point]:
    """The evaluations at the end of the run at a low rate; a warm-up's do not count."""
    start = len(points)
    while start and (rate := points[start - 1].rate) is not None and rate < LOW_RATE * peak:
        start -= 1
    return points[start:]


def _last_part(points: Sequence[Point], share: float) -> Sequence[Point]:
    return points[-max(2, math.ceil(share * len(points))) :]


def _rise(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    half = len(points) // 2
    return fmean(map(value, points[half:])) - fmean(map(value, points[:half]))


def _number(row: Row, key: str) -> float | None:
    """The value of `key`, or None where it is missing, null (not finite) or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None
