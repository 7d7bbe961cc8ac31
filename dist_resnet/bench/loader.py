"""Images per second of the loaders alone, ready for the model: cropped, flipped, normalised.

Ours also draw their choices from (seed, step, sample) and mix up; the others do neither.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dist_resnet.bench.measure import Run, calibrate, fastest, measure, speed_row
from dist_resnet.bench.other_loaders import (
    ArrayDataset,
    Epoch,
    ffcv_epochs,
    torchvision_epochs,
)
from dist_resnet.bench.our_loop import make_step, opened
from dist_resnet.bench.report import Report, Settings
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import World, start

BATCH_SIZES = (32, 128, 512)
SECONDS = 1.0  # a turn


def run(settings: Settings) -> Report:
    """Measure all loaders at all batch sizes."""
    report = Report("loader", plot=("images per second", "images_per_second"))
    sizes = (8,) if settings.quick else BATCH_SIZES
    seconds = 0.02 if settings.quick else SECONDS
    report.settings = {"batch_sizes": list(sizes), "seconds_per_turn": seconds}
    parallel = settings.config.parallel
    world = start(parallel.device, parallel.timeout_seconds)
    for size in sizes:
        loaders = _loaders(_changed(settings.config, batch_size_per_replica=size), world)
        candidates = {name: partial(_ready, make, size, seconds) for name, make in loaders.items()}
        timings = measure(candidates, settings.rounds)
        reference = fastest([t for name, t in timings.items() if name.startswith("torchvision")])
        for timing in timings.values():
            report.add("images per second", speed_row(timing, reference, batch=size))
    report.notes += [
        "ratio: to torchvision's transforms in the DataLoader at its better number of workers, at"
        " the same batch size; medians and quartiles of the ratios of each round",
        "ours: order and choices from (seed, step, sample); crop, flip, normalisation and mixup on"
        " the device. torchvision and FFCV's own pipeline: crop, flip and normalisation",
        "every turn is one epoch of as many batches as take about a second: workers neither start"
        " in it nor fetch ahead of it",
    ]
    return report


def _ready(make: Callable[[], Epoch], size: int, seconds: float) -> tuple[int, Run]:
    epoch = make()

    def draw(batches: int) -> None:
        taken = sum(1 for _ in epoch(batches))
        assert taken == batches, f"{taken} batches instead of {batches}"

    count = calibrate(draw, seconds, least=2)
    return count * size, partial(draw, count)


def _loaders(config: Config, world: World) -> dict[str, Callable[[], Epoch]]:
    """By name; made when called, for each may fail in its own way."""
    size, augment, device = config.data.batch_size_per_replica, config.augment, world.device
    data = opened(config, world)[0].dataset
    return {
        "ours, ffcv": lambda: _ours(config, world, "ffcv"),
        "ours, resident": lambda: _ours(config, world, "resident"),
        # As a rank on one core; two threads and FFCV's are one too many for two cores.
        "ours, ffcv, 1 thread": lambda: _on_one_thread(_ours(config, world, "ffcv")),
        "ours, resident, 1 thread": lambda: _on_one_thread(_ours(config, world, "resident")),
        "torchvision, 0 workers": lambda: torchvision_epochs(
            ArrayDataset(data, augment), size, 0, device
        ),
        "torchvision, 2 workers": lambda: torchvision_epochs(
            ArrayDataset(data, augment), size, 2, device
        ),
        "ffcv, its own crop and flip": lambda: ffcv_epochs(data, size, augment, device),
    }


def _on_one_thread(epoch: Epoch) -> Epoch:
    def alone(batches: int) -> Iterator[Any]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from epoch(batches)
        finally:
            torch.set_num_threads(threads)

    return alone


def _ours(config: Config, world: World, loader: str) -> Epoch:
    """What a step does with a batch before the model, and the stream that feeds it."""
    session, plan = opened(_changed(config, loader=loader), world)
    step, stream, numbers = make_step(session, plan), session.batches(plan), itertools.count()

    def epoch(batches: int) -> Iterator[Any]:
        for batch, number in zip(itertools.islice(stream, batches), numbers, strict=False):
            key, turn = step.keys[number], step.turn(number)
            yield step.replica_pass.inputs(batch.images, batch.samples, key, turn)

    return epoch


def _changed(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))
