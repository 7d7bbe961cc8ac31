"""Where a step's time goes, by torch.profiler: the real step, its parts under names of their own;
and its operators.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile, record_function

from dist_resnet.bench.measure import now, wait_for_device
from dist_resnet.data.stream import Batch
from dist_resnet.step.train_step import TrainStep

Rows = list[dict[str, Any]]
_AUGMENTATION = "choices and augmentation"
_GROUPS: dict[str, tuple[str, ...]] = {
    "convolution": ("conv",),
    "BatchNorm, ReLU and addition, fused": ("_NormAct",),
    "BatchNorm": ("batch_norm",),
    "ReLU and additions": ("relu", "threshold", "aten::add"),
    "casts and copies": ("copy_", "_to_copy", "aten::to", "clone", "contiguous"),
    "crop, flip, normalise, mixup": (
        _AUGMENTATION, "index", "pad", "where", "lerp", "flip", "sub_", "aten::mul",
    ),
    "optimizer": ("sgd",),
    "matrix products": ("mm", "linear"),
}  # fmt: skip


def profiled(step: TrainStep, draw: Callable[[], Batch], steps: int) -> tuple[Rows, Rows]:
    """Of `steps` steps on what `draw` gives: their parts, and their operators.

    Returns:
        Milliseconds a step in each part, and its share of the whole. Shares of the operators in
        their own time, grouped, and how often each is called in a step.
    """
    methods = [
        (step.replica_pass, "inputs", _AUGMENTATION),
        (step.replica_pass, "objective", "loss"),
        (step, "forward", "forward"),
        (step, "update", "optimizer and totals"),
        (step.reduction, "add", "reduction"),
        (step.reduction, "finish", "reduction"),
        (torch.autograd, "grad", "backward"),
        (torch.autograd, "backward", "backward"),
    ]
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    draw = _named("data", draw)
    with ExitStack() as stack:
        for owner, name, part in methods:
            named = _named(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, named))
        step(draw())
        # acc_events: else torch 2.11 warns
        profiler = stack.enter_context(profile(activities=activities, acc_events=True))
        start = now()
        for _ in range(steps):
            step(draw())
        seconds = now() - start
    events, names = profiler.key_averages(), {"data", *(part for _, _, part in methods)}
    return _parts(events, names, steps, seconds), _operators(events, names, steps, on_gpu)


def _named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            result = function(*args, **kwargs)
            wait_for_device()
        return result

    return named


def _parts(events: Any, names: Collection[str], steps: int, seconds: float) -> Rows:
    found = {
        event.key: event.cpu_time_total / 1e6
        for event in events
        if event.key in names and event.device_type == DeviceType.CPU
    }
    found["the rest: host, statistics"] = seconds - sum(found.values())
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [
        {"name": name, "ms_per_step": 1000 * part / steps, "percent": 100 * part / seconds}
        for name, part in [*ordered, ("whole step", seconds)]
    ]


def _operators(events: Any, names: Collection[str], steps: int, on_gpu: bool) -> Rows:
    groups: dict[str, list[float]] = {}
    for event in events:
        # Our kernel for CPUs is no operator of torch's: its time is that of the part itself.
        if event.key in names and (on_gpu or event.key != _AUGMENTATION):
            continue
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
