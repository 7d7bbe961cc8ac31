"""What training knows of tracking: a tracker, which does nothing, and a safe fan-out to several."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_resnet.base.terminal import say

Row = Mapping[str, float | int]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Picture:
    """An image for W&B."""

    pixels: NDArray[np.uint8]
    """uint8 (height, width, 3)."""
    caption: str


Media = Mapping[str, int | Picture | list[list[int]]]
"""A row of pictures: "step", `Picture`s, and confusion matrices (K, K), rows the true classes."""


@dataclass(frozen=True)
class Artifact:
    """A file that W&B is to keep."""

    name: str
    kind: str
    """W&B's type: model, dataset."""
    path: Path
    metadata: Mapping[str, object]


class Tracker:
    """A place where figures go; this one drops them.

    Every rank but the first has it, so that no caller has to ask for its rank.
    """

    name = "null"

    def log(self, row: Row) -> None:
        """Take one row: "step", "epoch", "seconds" and metric keys such as "train/loss"."""

    def message(self, text: str) -> None:
        """Take one line meant for the person who watches."""

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """End the run; bounded in time."""


def say_on_stderr(text: str) -> None:
    """Write one line for the person who watches; a stderr that is closed ends nothing."""
    say(text, sys.stderr)


class Trackers(Tracker):
    """Fans out to several trackers and keeps their failures away from training.

    A tracker that raises is dropped for the rest of the run and reported once, in one line, through
    `say`: of the console, which keeps a live progress line whole.
    """

    def __init__(self, trackers: Sequence[Tracker], say: Say) -> None:
        self._live = list(trackers)
        self._say = say

    def log(self, row: Row) -> None:
        """Give the row to every tracker that still works."""
        self._each(lambda tracker: tracker.log(row))

    def message(self, text: str) -> None:
        """Give the line to every tracker that still works."""
        self._each(lambda tracker: tracker.message(text))

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Close every tracker that still works; a second call does nothing."""
        self._each(lambda tracker: tracker.close(exit_code, summary))
        self._live.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._live):
            try:
                call(tracker)
            except Exception as error:
                # Any exception, on purpose: hours of training are worth more than any tracker.
                self._live.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                with contextlib.suppress(Exception):
                    self._say(
                        f"tracking: {tracker.name} stopped and records no more: {reason};"
                        " training goes on"
                    )
