"""Candidates that take turns, and the ratios of their speeds within a round.

A ratio of two medians would compare one candidate's good minutes with another's bad ones; here
every round gives one ratio, and what is reported is the median of these and their quartiles.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_resnet.base.errors import DistResnetError, one_line
from dist_resnet.base.tables import quartiles

Run = Callable[[], float | None]
"""Takes one turn; returns its seconds where it knows better than whoever called it."""
Candidate = Callable[[], tuple[int, Run]]
"""Makes ready: how many images a turn processes (for what has none, how often it does it), and how
to take one."""


@dataclass
class Timing:
    """What was measured of one candidate."""

    name: str
    images: int = 1
    """Of one turn."""
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


def wait_for_device() -> None:
    """Return when a GPU has done what it was given."""
    import torch  # not above: a worker sets its environment first

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, once the device has done what it was given."""
    wait_for_device()
    return time.perf_counter()


def measure(
    candidates: Mapping[str, Candidate], rounds: int, clock: Callable[[], float] = now
) -> dict[str, Timing]:
    """Time all candidates, in turn, `rounds` times; forth and back, so that none is always first.

    Each has made ready and taken one turn before. One that raises is given up, and why is kept in
    its timing; the others go on.
    """
    timings = {name: Timing(name) for name in candidates}
    runs: dict[str, Run] = {}

    def make_ready(timing: Timing) -> None:
        timing.images, runs[timing.name] = candidates[timing.name]()
        runs[timing.name]()

    def take_turn(timing: Timing) -> None:
        start = clock()
        told = runs[timing.name]()
        took = clock() - start
        timing.seconds.append(took if told is None else told)

    forth = list(timings.values())
    _attempt(make_ready, forth)
    for number in range(rounds):
        _attempt(take_turn, forth if number % 2 == 0 else forth[::-1])
    return timings


def _attempt(action: Callable[[Timing], None], timings: Sequence[Timing]) -> None:
    for timing in timings:
        if timing.failure is None:
            try:
                action(timing)
            except Exception as error:  # each may fail in its own way; the table says how
                timing.failure = reason(error)


def reason(error: Exception) -> str:
    """Why something was given up, in one line."""
    return str(error) if isinstance(error, DistResnetError) else one_line(error)


def calibrate(work: Callable[[int], None], seconds: float, least: int = 1) -> int:
    """How often `work` has to be done to take about `seconds`, at least `least` times.

    Args:
        work: called with a number of repetitions; the first call may be slow (compilation, threads
            that start) and does not count.
    """
    work(least)
    count = least
    while True:
        start = now()
        work(count)
        elapsed = now() - start
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
