"""What counts as waiting for data: on a CPU the host's wait, on a GPU the time it had no work."""

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from dist_resnet.machine import nvml
from dist_resnet.tracking.wandb_notices import STARVED
from dist_resnet.training import stopwatch
from dist_resnet.training.stopwatch import Stopwatch

IMAGES = 32


@dataclass
class Gpu:
    """Executes in order what was launched, on the host's clock."""

    now: float = 0.0
    free_at: float = 0.0
    events: int = 0

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds


@dataclass
class Event:
    """As torch.cuda.Event, on `gpu`."""

    gpu: ClassVar[Gpu]
    at: float = field(default=-1.0)

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing, "elapsed_time needs it"
        self.gpu.events += 1

    def record(self) -> None:
        self.gpu.launch(0.0)
        self.at = self.gpu.free_at

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query()
        assert end.query(), "torch raises"
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Event.gpu = Gpu()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 << 20)
    monkeypatch.setattr(stopwatch, "Utilisation", lambda _: Busy())
    return made


class Busy:
    def read(self) -> float | None:
        return 0.75


def windows(gpu: Gpu, device: str, wait: float, work: float, ahead: int = 0) -> list[float]:
    """perf/data_wait_fraction of windows of 50 steps.

    Args:
        wait: seconds until the loader gives the next batch, or with `ahead` at most that long:
            until the GPU is no more than `ahead` steps behind, as FFCV's ring of buffers does it.
        work: the GPU's seconds for a step.
    """
    watch, found = Stopwatch(0.0, torch.device(device)), []
    for _ in range(4):
        for _ in range(50):
            with watch.waiting_for_data():
                held = gpu.free_at - ahead * work - gpu.now if ahead else wait
                gpu.now += max(0.0, held)
            gpu.now += 0.0001  # launching
            gpu.launch(work)
        gpu.now = max(gpu.now, gpu.free_at)  # reading the means waits for the device
        row = watch.end_window(IMAGES)
        found.append(row["perf/data_wait_fraction"])
    return found


def test_on_a_cpu_every_wait_counts(gpu: Gpu) -> None:
    assert windows(gpu, "cpu", wait=0.0009, work=0.0) == pytest.approx([0.9] * 4)


def test_a_full_queue_is_no_lack_of_data(gpu: Gpu) -> None:
    """The host waits nine tenths of the time for a GPU that always has work."""
    for share in windows(gpu, "cuda", wait=0.0, work=0.001, ahead=3):
        assert share < 0.01 < STARVED
    assert gpu.events < 20, "events are used again"


def test_a_gpu_without_work_is(gpu: Gpu) -> None:
    for share in windows(gpu, "cuda", wait=0.01, work=0.001):
        assert share == pytest.approx((0.01 - 0.001 + 0.0001) / 0.0101, rel=0.05)


def test_only_the_part_of_a_wait_without_work_counts(gpu: Gpu) -> None:
    """The loader needs a tenth more than the GPU: a tenth is lost, not all of it."""
    for share in windows(gpu, "cuda", wait=0.0011, work=0.0010):
        assert share == pytest.approx(0.0001 / 0.0012, rel=0.3)


def test_the_time_of_an_evaluation_counts_as_nothing(gpu: Gpu) -> None:
    watch = Stopwatch(0.0, torch.device("cuda"))
    with watch.waiting_for_data():
        gpu.now += 1.0
    gpu.launch(1.0)
    gpu.now = gpu.free_at
    with watch.pause():
        gpu.now += 100.0
    with watch.waiting_for_data():
        gpu.now += 2.0
    row = watch.end_window(IMAGES)
    assert row["perf/data_wait_fraction"] == pytest.approx(3 / 4)
    assert row["perf/step_ms"] == pytest.approx(2000)


def test_memory_and_utilisation_are_logged_on_a_gpu(gpu: Gpu) -> None:
    rows = []
    for device in ("cuda", "cpu"):
        watch = Stopwatch(0.0, torch.device(device))
        assert watch.end_window(IMAGES) == {}, "of no step"
        with watch.waiting_for_data():
            pass
        rows.append(watch.end_window(IMAGES))
    assert (rows[0]["perf/gpu_memory_mb"], rows[0]["perf/gpu_utilisation"]) == (3, 0.75)
    assert not [key for key in rows[1] if "gpu" in key]


class Library:
    """libnvidia-ml.so.1, with one GPU."""

    def __init__(self, name: bytes, percent: int, mig: bool = False) -> None:
        self.name, self.percent, self.mig = name, percent, mig

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        handle._obj.value = 17
        return 0 if name == self.name else 2

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        assert handle.value == 17
        rates._obj.gpu = self.percent
        return 3 if self.mig else 0


@pytest.mark.parametrize(
    ("library", "share"),
    [
        (Library(b"GPU-ab-12", 83), 0.83),
        (Library(b"GPU-other", 83), None),
        (Library(b"GPU-ab-12", 83, mig=True), None),
        (None, None),
    ],
)
def test_utilisation_is_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, library: Library | None, share: float | None
) -> None:
    class Properties:
        uuid = "ab-12"

    def load(name: str) -> Library:
        assert name == "libnvidia-ml.so.1"
        if library is None:
            raise OSError(name)
        return library

    monkeypatch.setattr(nvml.ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    assert nvml.Utilisation(torch.device("cuda", 0)).read() == share
