"""What a person watches: one live line on a terminal, plain lines anywhere else."""

import contextlib
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

from dist_resnet.base.terminal import say, shows_live_line
from dist_resnet.tracking.tracker import Row, Tracker

EVERY_SECONDS = 10.0  # plain lines: at most 360 an hour, however short a step is
# A stream that has closed, or cannot hold the text: a line for people ends nothing.
_LOST = contextlib.suppress(OSError, ValueError)
WINDOW_ROWS = 128  # at a row each 50 steps: 6,400 steps, which hold several evaluations


class Console(Tracker):
    """Shows progress, loss, accuracy, throughput and time left.

    A terminal gets one line that is rewritten; evaluations and messages scroll above it. Anything
    else (a log file, a cluster's output) gets a line a row, at most one in `every_seconds`, and
    every evaluation. A row is an evaluation if it has "val/loss" or "val/top1"; "val/images", where
    a row has it, tells over how many images.

    A run that is continued is given its `best` val/top1 before `start_step`.
    """

    name = "console"

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        *,
        best: float | None = None,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._stream = stream or sys.stderr or io.StringIO()
        self._every = every_seconds
        self._clock = clock
        self._time_left = _TimeLeft(total_steps, start_step, clock())
        self._last_line = float("-inf")
        self._best = best
        self._val = ""
        self._bar: tqdm[None] | None = None
        with _LOST:
            if shows_live_line(self._stream):
                self._bar = tqdm(
                    total=total_steps,
                    initial=start_step,
                    file=self._stream,
                    dynamic_ncols=True,
                    mininterval=0.0,  # rows come once in many steps; each is worth showing
                    bar_format="{percentage:3.0f}%|{bar:8}| {desc}",
                )

    def log(self, row: Row) -> None:
        """Show a row of training or of an evaluation."""
        step = int(row.get("step", 0))
        self._time_left.update(step, self._clock())
        if "val/top1" in row or "val/loss" in row:
            self._evaluation(row)
        if "train/loss" in row or "train/top1" in row:
            self._training(step, row)

    def message(self, text: str) -> None:
        """Show one line."""
        if self._bar is None:
            say(text, self._stream)
            return
        with _LOST:
            self._bar.write(text, file=self._stream)

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Leave the last state of the live line on the screen."""
        if self._bar is not None:
            with _LOST:
                self._bar.close()
            self._bar = None

    def _evaluation(self, row: Row) -> None:
        parts = [f"epoch {row.get('epoch', 0):g}"]
        top1 = row.get("val/top1")
        if top1 is not None:
            best = self._best is None or top1 > self._best
            self._best = max(top1, self._best or 0.0)
            self._val = f"val {top1:.2%}"
            parts.append(f"val top1 {top1:.2%}")
            parts.append("best so far" if best else f"best {self._best:.2%}")
        if "val/loss" in row:
            parts.append(f"val loss {row['val/loss']:.4f}")
        if "gap/top1" in row:
            parts.append(f"train minus val {100 * row['gap/top1']:+.2f}%")
        if "val/images" in row:
            parts.append(f"({int(row['val/images']):,} images)")
        self.message("  ".join(parts))

    def _training(self, step: int, row: Row) -> None:
        live = self._bar is not None
        left = self._time_left.seconds()
        eta = [] if left is None or step >= self._total else [f"eta {duration(left)}"]
        parts = [f"step {step:,}/{self._total:,}"]
        if live:  # a narrow terminal cuts the end off: what matters most comes first
            parts += eta
        parts.append(f"epoch {row.get('epoch', 0):.1f}")
        if "train/loss" in row:
            parts.append(f"loss {row['train/loss']:.3f}")
        if "train/top1" in row:
            parts.append(f"top1 {row['train/top1']:.1%}")
        if live and self._val:
            parts.append(self._val)
        if not live and "train/lr" in row:
            parts.append(f"lr {row['train/lr']:.4g}")
        if "perf/images_per_second" in row:
            parts.append(f"{row['perf/images_per_second']:,.0f} img/s")
        if self._bar is not None:
            self._bar.n = step
            with _LOST:
                self._bar.set_description_str("  ".join(parts))
            return
        now, parts = self._clock(), parts + eta
        if now - self._last_line >= self._every or step >= self._total:
            self._last_line = now
            self.message("  ".join(parts))


class _TimeLeft:
    """Seconds left, from the mean pace of the last rows with evaluations and checkpoints in it.

    The first stretch holds what never comes again (compilation, the first batch: up to a minute
    before step 50), so it counts only until there is a second one.
    """

    def __init__(self, total: int, step: int, now: float) -> None:
        self._total = total
        self._seen: deque[tuple[int, float]] = deque([(step, now)], maxlen=WINDOW_ROWS)
        self._warm = False

    def update(self, step: int, now: float) -> None:
        """Note that `step` was reached; an evaluation's row moves the time of its step."""
        if step == self._seen[-1][0] and len(self._seen) > 1:
            self._seen[-1] = (step, now)
        else:
            self._seen.append((step, now))
        if not self._warm and len(self._seen) == 3:
            self._seen.popleft()
            self._warm = True

    def seconds(self) -> float | None:
        """Seconds to the end, None before the first stretch is over."""
        (first, began), (last, now) = self._seen[0], self._seen[-1]
        if last <= first or now <= began:
            return None
        return (self._total - last) * (now - began) / (last - first)


def duration(seconds: float) -> str:
    """Seconds as a person says it: 45s, 12m03s, 3h05m, 2d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"
