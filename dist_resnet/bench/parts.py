"""Where a step's time goes: the real step, its parts wrapped in timers; and its operators."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from dist_resnet.data.stream import Batch
from dist_resnet.step.train_step import TrainStep

_AUGMENTING = ("augment", "index", "pad", "where", "lerp", "flip", "sub_", "aten::mul")
_GROUPS: dict[str, tuple[str, ...]] = {
    "convolution": ("conv",),
    "BatchNorm, ReLU and addition, fused": ("_NormAct",),
    "BatchNorm": ("batch_norm",),
    "ReLU and additions": ("relu", "threshold", "aten::add"),
    "casts and copies": ("copy_", "_to_copy", "aten::to", "clone", "contiguous"),
    "crop, flip, normalise, mixup": _AUGMENTING,
    "optimizer": ("sgd",),
    "matrix products": ("mm", "linear"),
}


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start
            return result

        return timed


@contextmanager
def _timers(step: TrainStep, clock: _Clock) -> Iterator[None]:
    """Timers around what `step` calls, taken away afterwards."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, part: str) -> None:
            wrapped = clock.wrap(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))

        put(step.replica_pass, "inputs", "choices and augmentation")
        put(step.replica_pass, "objective", "loss")
        put(step, "forward", "forward")
        put(step, "update", "optimizer and totals")
        put(step.reduction, "add", "reduction")
        put(step.reduction, "finish", "reduction")
        put(torch.autograd, "grad", "backward")
        put(torch.autograd, "backward", "backward")
        yield


def parts_of_step(step: TrainStep, draw: Callable[[], Batch], steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step in each part, over `steps` steps, and its share of the whole."""
    clock = _Clock(step.device)
    with _timers(step, clock):
        step(draw())
        clock.seconds.clear()
        start = clock.now()
        for _ in range(steps):
            before = clock.now()
            batch = draw()
            clock.seconds["data"] = clock.seconds.get("data", 0.0) + clock.now() - before
            step(batch)
        total = clock.now() - start
    parts = clock.seconds | {"the rest: host, statistics": total - sum(clock.seconds.values())}
    rows = [
        {"name": name, "ms_per_step": 1000 * s / steps, "percent": 100 * s / total}
        for name, s in sorted(parts.items(), key=lambda item: -item[1])
    ]
    return [*rows, {"name": "whole step", "ms_per_step": 1000 * total / steps, "percent": 100.0}]


def operators_of_step(
    step: TrainStep, draw: Callable[[], Batch], steps: int
) -> list[dict[str, Any]]:
    """Shares of the operators in a step's time, grouped, and how often each is called."""
    from torch.profiler import DeviceType, ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step(draw())
    # Our kernel for CPUs is no operator of torch's, and has no name of its own there.
    named = record_function("augment")(step.replica_pass.inputs)
    with (
        mock.patch.object(step.replica_pass, "inputs", named),
        profile(activities=activities, acc_events=True) as profiler,  # else torch 2.11 warns
    ):
        for _ in range(steps):
            step(draw())
    groups: dict[str, list[float]] = {}
    on_gpu = len(activities) > 1
    for event in profiler.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue  # an operator's device time is its kernels', which are there themselves
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entry = groups.setdefault(_group(event.key), [0.0, 0.0])
        entry[0] += own
        entry[1] += event.count if own else 0
    total = sum(entry[0] for entry in groups.values()) or 1.0
    return [
        {"name": name, "percent": 100 * own / total, "calls_per_step": calls / steps}
        for name, (own, calls) in sorted(groups.items(), key=lambda item: -item[1][0])
    ]


def _group(operator: str) -> str:
    return next(
        (name for name, parts in _GROUPS.items() if any(part in operator for part in parts)),
        "other",
    )
