"""Where a step's time goes: the real step, its parts wrapped in timers; and its operators."""

import time
from collections.abc import Callable
from contextlib import ExitStack
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


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _timed(part: str, function: Callable[..., Any], seconds: dict[str, float]) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now()
        result = function(*args, **kwargs)
        seconds[part] = seconds.get(part, 0.0) + now() - start
        return result

    return timed


def parts_of_step(step: TrainStep, draw: Callable[[], Batch], steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step in each part, over `steps` steps, and its share of the whole."""
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name, part in (
            (step.replica_pass, "inputs", "choices and augmentation"),
            (step.replica_pass, "objective", "loss"),
            (step, "forward", "forward"),
            (step, "update", "optimizer and totals"),
            (step.reduction, "add", "reduction"),
            (step.reduction, "finish", "reduction"),
            (torch.autograd, "grad", "backward"),
            (torch.autograd, "backward", "backward"),
        ):
            timer = _timed(part, getattr(owner, name), seconds)
            stack.enter_context(mock.patch.object(owner, name, timer))
        step(draw())
        seconds.clear()
        draw, start = _timed("data", draw, seconds), now()
        for _ in range(steps):
            step(draw())
        total = now() - start
    parts = seconds | {"the rest: host, statistics": total - sum(seconds.values())}
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
