"""Candidates that take turns, and the ratios of their speeds within a round.

A ratio of two medians would compare one candidate's good minutes with another's bad ones; here
every round gives one ratio, and what is reported is the median of these and their quartiles.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_resnet.base.errors import one_line
from dist_resnet.base.tables import quartiles


@dataclass(frozen=True)
class Candidate:
    """Something whose speed is measured."""

    name: str
    images: int
    """How many images one call of `run` processes; for what has none, how often it does it."""
    run: Callable[[], None]
    """Processes them; returns when the device is done."""


@dataclass
class Timing:
    """What was measured of one candidate."""

    name: str
    images: int
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    failure: str | None = None
    """Why it was given up, in one line."""

    @property
    def speeds(self) -> list[float]:
        """Images per second of each round; empty: nothing was measured."""
        return [] if self.failure else [self.images / seconds for seconds in self.seconds]

    @property
    def images_per_second(self) -> float | None:
        """Median over the rounds; None: nothing was measured."""
        return statistics.median(self.speeds) if self.speeds else None

    def ratios(self, reference: "Timing") -> list[float]:
        """How many times as fast it was as `reference`, in each round."""
        pairs = zip(self.speeds, reference.speeds, strict=False)
        return [own / other for own, other in pairs]


def measure(
    candidates: Sequence[Candidate],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all candidates, in turn, `rounds` times; forth and back, so that none is always first.

    A candidate that raises is given up, and why is kept in its timing; the others go on.

    Args:
        warm_up: calls of each candidate before the first round, not timed.
    """
    timings = {c.name: Timing(c.name, c.images) for c in candidates}
    assert len(timings) == len(candidates), "two candidates of one name"
    for candidate in candidates:
        for _ in range(warm_up):
            _attempt(candidate, timings[candidate.name], clock)
        timings[candidate.name].seconds.clear()
    for number in range(rounds):
        for candidate in candidates if number % 2 == 0 else reversed(candidates):
            _attempt(candidate, timings[candidate.name], clock)
    return timings


def _attempt(candidate: Candidate, timing: Timing, clock: Callable[[], float]) -> None:
    if timing.failure:
        return
    start = clock()
    try:
        candidate.run()
    except Exception as error:  # a peer may fail in its own ways; the table says how
        timing.failure = one_line(error)
    else:
        timing.seconds.append(clock() - start)


def calibrate(work: Callable[[int], None], seconds: float, least: int = 1) -> int:
    """How often `work` has to be done to take about `seconds`, at least `least` times.

    Args:
        work: called with a number of repetitions; the first call may be slow (compilation, threads
            that start) and does not count.
    """
    work(least)
    count = least
    while True:
        start = time.perf_counter()
        work(count)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 4 or count >= 1 << 20:
            return max(least, round(count * seconds / max(elapsed, 1e-9)))
        count *= 4


def figure(key: str, values: Sequence[float]) -> dict[str, Any]:
    """Part of a table's row: the median of `values` and their quartiles; or that there are none."""
    if not values:
        return {"failure": "not measured"}
    lower, median, upper = quartiles(values)
    return {key: median, f"{key}_quartiles": [lower, upper]}


def speed_row(timing: Timing, reference: Timing | None = None, **labels: Any) -> dict[str, Any]:
    """One row of a table of speeds: medians, quartiles, and the paired ratio to `reference`."""
    row = {**labels, "name": timing.name}
    if not timing.speeds:
        return row | {"failure": timing.failure or "not measured"}
    row |= figure("images_per_second", timing.speeds) | {"rounds": len(timing.speeds)}
    if reference is not None and (ratios := timing.ratios(reference)):
        row |= figure("ratio", ratios) | {"ratio_to": reference.name}
    return row


def fastest(timings: Sequence[Timing]) -> Timing:
    """The one with the highest median; the first if nothing was measured."""
    return max(timings, key=lambda timing: timing.images_per_second or 0.0)
