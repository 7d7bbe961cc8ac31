"""Images per second of the loaders alone, ready for the model: cropped, flipped, normalised.

Ours also draw their choices from (seed, step, sample) and mix up; the others do neither.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dist_resnet.base.errors import one_line
from dist_resnet.bench.measure import (
    Candidate,
    Timing,
    calibrate,
    fastest,
    figure,
    measure,
    speed_row,
)
from dist_resnet.bench.report import Report, Settings

BATCH_SIZES = (32, 128, 512)
SECONDS = 1.0  # a turn
Epoch = Callable[[int], Iterator[Any]]
"""So many batches, on the device."""


def run(settings: Settings) -> Report:
    """Measure all loaders at all batch sizes."""
    report = Report("loader", plot=("images per second", "images_per_second"))
    sizes = (8,) if settings.quick else BATCH_SIZES
    seconds = 0.02 if settings.quick else SECONDS
    report.settings = {
        "batch_sizes": list(sizes),
        "seconds_per_turn": seconds,
        "rounds": settings.rounds,
        "dataset": settings.config.data.dataset,
    }
    for size in sizes:
        _measure_size(report, settings, size, seconds)
    report.notes += [
        "ratio: to torchvision's transforms in the DataLoader at its better number of workers, at"
        " the same batch size; medians and quartiles of the ratios of each round",
        "ours: order and choices from (seed, step, sample); crop, flip, normalisation and mixup on"
        " the device. torchvision and FFCV's own pipeline: crop, flip and normalisation",
        "every turn is one epoch of as many batches as take about a second: workers neither start"
        " in it nor fetch ahead of it",
    ]
    return report


def _measure_size(report: Report, settings: Settings, size: int, seconds: float) -> None:
    candidates: list[Candidate] = []
    failed: list[Timing] = []
    for name, make in _loaders(settings, size).items():
        try:
            work = functools.partial(_work, make())
            count = calibrate(work, seconds, least=2)
        except Exception as error:  # as in `measure`
            failed.append(Timing(name, size, failure=one_line(error)))
        else:
            candidates.append(Candidate(name, count * size, functools.partial(work, count)))
    timings = measure(candidates, settings.rounds)
    torchvision = [timing for name, timing in timings.items() if name.startswith("torchvision")]
    reference = fastest(torchvision) if torchvision else None
    for timing in [*timings.values(), *failed]:
        report.add("images per second", speed_row(timing, reference, batch=size))
    for name, timing in timings.items():
        if reference is not None and name.startswith("ours"):
            labels = {"batch": size, "name": f"{name} / {reference.name}"}
            report.add("ratios", labels | figure("ratio", timing.ratios(reference)))


def _work(epoch: Epoch, batches: int) -> None:
    """Draw batches and wait for the device."""
    import torch

    taken = sum(1 for _ in epoch(batches))
    assert taken == batches, f"{taken} batches instead of {batches}"
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _loaders(settings: Settings, size: int) -> dict[str, Callable[[], Epoch]]:
    """By name; made when called, for each may fail in its own way."""
    from dist_resnet.bench.other_loaders import ArrayDataset, FfcvEpochs, TorchvisionEpochs
    from dist_resnet.distributed.group import start
    from dist_resnet.training.session import open_session, with_replicas

    config = with_replicas(settings.config, 1)
    config = replace(config, data=replace(config.data, batch_size_per_replica=size))
    session = open_session(config, start(config.parallel.device, config.parallel.timeout_seconds))
    data, device = session.dataset, session.world.device
    padding, flip = config.augment.crop_padding, bool(config.augment.flip)

    def torchvision(workers: int) -> Epoch:
        return TorchvisionEpochs(ArrayDataset(data, padding, flip), size, workers, device)

    return {
        "ours, ffcv": lambda: _ours(session, "ffcv"),
        "ours, resident": lambda: _ours(session, "resident"),
        # As a rank on one core; two threads and FFCV's are one too many for two cores.
        "ours, ffcv, 1 thread": lambda: _on_one_thread(_ours(session, "ffcv")),
        "ours, resident, 1 thread": lambda: _on_one_thread(_ours(session, "resident")),
        "torchvision, 0 workers": lambda: torchvision(0),
        "torchvision, 2 workers": lambda: torchvision(2),
        "ffcv, its own crop and flip": lambda: FfcvEpochs(data, size, padding, flip, device),
    }


def _on_one_thread(epoch: Epoch) -> Epoch:
    import torch

    def alone(batches: int) -> Iterator[Any]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from epoch(batches)
        finally:
            torch.set_num_threads(threads)

    return alone


def _ours(session: Any, kind: Any) -> Epoch:
    """What a step does with a batch before the model, and the stream that feeds it."""
    from dist_resnet.bench.our_loop import make_step, quiet
    from dist_resnet.config.plan import make_plan

    config = quiet(session.config)
    session = replace(session, config=replace(config, data=replace(config.data, loader=kind)))
    plan = make_plan(config, len(session.train_indices), 1)
    step, stream, numbers = make_step(session, plan), session.batches(plan), itertools.count()

    def epoch(batches: int) -> Iterator[Any]:
        for batch, number in zip(itertools.islice(stream, batches), numbers, strict=False):
            yield step.replica_pass.inputs(
                batch.images, batch.samples, step.keys[number], step.turn(number)
            )

    return epoch
