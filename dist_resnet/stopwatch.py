"""Where the time goes: training, evaluation, saving, and the wait for data within training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Measures windows between two log rows, and the whole run across restarts."""

    def __init__(self, seconds_before: float, device: torch.device) -> None:
        """`seconds_before`: of the run, before this process continued it."""
        self._device = device
        self._origin = time.monotonic() - seconds_before
        self._steps = 0
        self._train_steps = 0
        self._train_seconds = 0.0
        self.start_window()

    def seconds(self) -> float:
        """Wall seconds of the run so far, the time between restarts left out."""
        return time.monotonic() - self._origin

    def start_window(self) -> None:
        self._window_start = time.monotonic()
        self._paused = self._waited = 0.0
        self._steps = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the request for one step's batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: evaluation, saving."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def end_window(self, images_per_step: int) -> dict[str, float]:
        """The perf/ metrics since `start_window`, which is called anew."""
        elapsed = max(time.monotonic() - self._window_start - self._paused, 1e-9)
        steps = max(self._steps, 1)
        row = {
            "perf/images_per_second": steps * images_per_step / elapsed,
            "perf/step_ms": 1000 * elapsed / steps,
            "perf/data_wait_fraction": self._waited / elapsed,
        }
        if self._device.type == "cuda":
            row["perf/gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        self._train_steps += steps
        self._train_seconds += elapsed
        self.start_window()
        return row

    def images_per_second(self, images_per_step: int) -> float | None:
        """Over all windows of this process; None before the first."""
        if not self._train_seconds:
            return None
        return self._train_steps * images_per_step / self._train_seconds
