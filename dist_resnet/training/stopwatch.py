"""Where the time goes: training, evaluation, saving, and the wait for data within training."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_resnet.machine.nvml import Utilisation


class _IdleTime:
    """How long a GPU had nothing to do while the host waited.

    The host is ahead of the GPU: that it waits may only mean that the queue in between is full.
    """

    def __init__(self) -> None:
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Between two events: the GPU passes the first when it has done all that was launched."""
        if self._spare:
            done, begun = self._spare.pop()
        else:
            done, begun = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        done.record()
        yield
        begun.record()
        self._pending.append((done, begun))

    def take(self, wait: bool = False) -> float:
        """Seconds that it has passed since the last call; with `wait`, all up to now."""
        seconds = 0.0
        if wait and self._pending:
            self._pending[-1][1].synchronize()
        while self._pending and self._pending[0][1].query():
            done, begun = self._pending.popleft()
            seconds += done.elapsed_time(begun) / 1000
            self._spare.append((done, begun))
        return seconds


class Stopwatch:
    """Measures windows between two log rows, and the whole run across restarts."""

    def __init__(self, seconds_before: float, device: torch.device) -> None:
        """`seconds_before`: of the run, before this process continued it."""
        self._device = device
        self._origin = time.monotonic() - seconds_before
        self._steps = 0
        self._train_steps = 0
        self._train_seconds = 0.0
        on_gpu = device.type == "cuda"
        self._idle = _IdleTime() if on_gpu else None
        self._utilisation = Utilisation(device) if on_gpu else None
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
        """Around the request for one step's batch; a wait counts while the device is idle."""
        if self._idle is None:
            start = time.monotonic()
            yield
            self._waited += time.monotonic() - start
        else:
            with self._idle.around():
                yield
            self._waited += self._idle.take()
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: evaluation, saving."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def end_window(self, images_per_step: int) -> dict[str, float]:
        """The perf/ metrics since `start_window`, which is called anew; the device has finished.

        Empty where no step was made.
        """
        if not self._steps:
            return {}
        if self._idle is not None:
            self._waited += self._idle.take(wait=True)
        elapsed = max(time.monotonic() - self._window_start - self._paused, 1e-9)
        steps = self._steps
        row = {
            "perf/images_per_second": steps * images_per_step / elapsed,
            "perf/step_ms": 1000 * elapsed / steps,
            "perf/data_wait_fraction": self._waited / elapsed,
        }
        if self._utilisation is not None:
            row["perf/gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
            utilisation = self._utilisation.read()
            if utilisation is not None:
                row["perf/gpu_utilisation"] = utilisation
        self._train_steps += steps
        self._train_seconds += elapsed
        self.start_window()
        return row

    def images_per_second(self, images_per_step: int) -> float | None:
        """Over all windows of this process; None before the first."""
        if not self._train_seconds:
            return None
        return self._train_steps * images_per_step / self._train_seconds
