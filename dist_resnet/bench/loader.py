"""Images per second of the loaders alone, ready for the model: cropped, flipped, normalised.

Ours also draw their choices from (seed, step, sample) and mix up; the others do neither.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from dist_resnet.bench.measure import (
    Candidate,
    Timing,
    calibrate,
    fastest,
    measure,
    one_line,
    paired_ratio,
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
            work = _work(make(), settings)
            count = calibrate(work, seconds, least=2)
        except Exception as error:  # as in `measure`
            failed.append(Timing(name, size, failure=one_line(error)))
        else:
            run = _bound(work, count)
            candidates.append(Candidate(name, count * size, run))
    timings = measure(candidates, settings.rounds)
    torchvision = [timing for name, timing in timings.items() if name.startswith("torchvision")]
    reference = fastest(torchvision) if torchvision else None
    for timing in [*timings.values(), *failed]:
        report.add("images per second", speed_row(timing, reference, batch=size))
    for name, timing in timings.items():
        if reference is None or not name.startswith("ours"):
            continue
        if ratio := paired_ratio(timing, reference):
            row = {
                "batch": size,
                "name": f"{name} / {reference.name}",
                "ratio": ratio.median,
                "ratio_quartiles": [ratio.lower, ratio.upper],
            }
            report.add("ratios", row)


def _bound(work: Callable[[int], None], count: int) -> Callable[[], None]:
    return lambda: work(count)


def _work(epoch: Epoch, settings: Settings) -> Callable[[int], None]:
    """Draw batches and wait for the device."""
    import torch

    from dist_resnet.machine.devices import cuda_count

    use_cuda = cuda_count(settings.config.parallel.device) > 0

    def work(batches: int) -> None:
        taken = sum(1 for _ in epoch(batches))
        assert taken == batches, f"{taken} batches instead of {batches}"
        if use_cuda:
            torch.cuda.synchronize()

    return work


def _loaders(settings: Settings, size: int) -> dict[str, Callable[[], Epoch]]:
    """By name; made when called, for each may fail in its own way."""
    from dist_resnet.bench.ffcv_pipeline import FfcvPipeline
    from dist_resnet.bench.torchvision_loader import ArrayDataset, CountedEpochs
    from dist_resnet.distributed.group import start
    from dist_resnet.training.session import open_session, with_replicas

    config = with_replicas(settings.config, 1)
    config = replace(config, data=replace(config.data, batch_size_per_replica=size))
    session = open_session(config, start(config.parallel.device, config.parallel.timeout_seconds))
    data, device, augment = session.dataset, session.world.device, config.augment

    def torchvision(workers: int) -> Callable[[], Epoch]:
        return lambda: CountedEpochs(
            ArrayDataset(data, augment.crop_padding, bool(augment.flip)), size, workers, device
        )

    return {
        "ours, ffcv": lambda: _ours(session, "ffcv"),
        "ours, resident": lambda: _ours(session, "resident"),
        # As a rank on one core; two threads and FFCV's are one too many for two cores.
        "ours, ffcv, 1 thread": lambda: _on_one_thread(_ours(session, "ffcv")),
        "ours, resident, 1 thread": lambda: _on_one_thread(_ours(session, "resident")),
        "torchvision, 0 workers": torchvision(0),
        "torchvision, 2 workers": torchvision(2),
        "ffcv, its own crop and flip": lambda: FfcvPipeline(
            data, size, augment.crop_padding, bool(augment.flip), device
        ),
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


def _ours(session: Any, kind: Literal["ffcv", "resident"]) -> Epoch:
    """What TrainStep does with a batch before the model, and the stream that feeds it."""
    from dist_resnet.augment import Augmenter, ChoiceDrawer
    from dist_resnet.base.randomness import step_keys, turn_keys
    from dist_resnet.bench.our_loop import open_batches, quiet
    from dist_resnet.config.plan import make_plan
    from dist_resnet.models.build import build_model
    from dist_resnet.models.dropout import dropouts, num_features, probability_of

    config = quiet(session.config)
    session = replace(session, config=replace(config, data=replace(config.data, loader=kind)))
    plan = make_plan(config, len(session.train_indices), 1)
    stream = open_batches(session, plan)
    device, statistics = session.world.device, session.normalisation()
    drops = dropouts(build_model(config.model, len(session.dataset.classes)))
    chance, features = probability_of(drops), num_features(drops)
    draw = ChoiceDrawer(config.augment, session.image_size, chance, features, device)
    augment = Augmenter(config.augment, statistics)
    keys = step_keys(config.seed, plan.total_steps, device)
    turns = turn_keys(config.seed, plan.total_steps, plan.steps_per_epoch, device)
    position = 0

    def epoch(batches: int) -> Iterator[Any]:
        nonlocal position
        for _ in range(batches):
            batch = next(stream)
            choices = draw(keys[position], batch.samples, turns[position])
            position += 1
            yield augment(batch.images, choices), batch.labels

    return epoch
