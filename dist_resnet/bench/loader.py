"""Images per second of the loaders alone, ready for the model: cropped, flipped, normalised.

Ours also draw their choices from (seed, step, sample) and mix up. torchvision's transforms in
torch's DataLoader, and FFCV as its own CIFAR example uses it, do neither.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_resnet.bench.measure import Run, calibrate, fastest, measure, speed_row
from dist_resnet.bench.our_loop import make_step, opened
from dist_resnet.bench.reference_loop import ArrayDataset, torch_loader
from dist_resnet.bench.report import Report, Settings
from dist_resnet.config.schema import Config
from dist_resnet.data.dataset import Dataset
from dist_resnet.distributed.group import World, start

BATCH_SIZES = (32, 128, 512)
SECONDS = 1.0  # a turn

Epoch = Callable[[int], Iterator[Any]]
"""So many batches, on the device."""


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
    made: dict[str, Callable[[], Epoch]] = {}
    # As a rank on one core, too: two threads and FFCV's are one too many for two cores.
    for suffix, alone in (("", False), (", 1 thread", True)):
        for loader in ("ffcv", "resident"):
            made[f"ours, {loader}{suffix}"] = partial(_ours, config, world, loader, alone)
    for workers in (0, 2):
        name = f"torchvision, {workers} workers"
        made[name] = partial(_torchvision, config, world, workers)
    return made | {"ffcv, its own crop and flip": partial(_ffcv, config, world)}


def _ours(config: Config, world: World, loader: str, alone: bool) -> Epoch:
    """What a step does with a batch before the model, and the stream that feeds it.

    Args:
        alone: on one thread.
    """
    session, plan = opened(_changed(config, loader=loader), world)
    step, stream, numbers = make_step(session, plan), session.batches(plan), itertools.count()

    def epoch(batches: int) -> Iterator[Any]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if alone else threads)
        try:
            for batch, number in zip(itertools.islice(stream, batches), numbers, strict=False):
                key, turn = step.keys[number], step.turn(number)
                yield step.replica_pass.inputs(batch.images, batch.samples, key, turn)
        finally:
            torch.set_num_threads(threads)

    return epoch


def _torchvision(config: Config, world: World, workers: int) -> Epoch:
    """Random samples, in epochs of any number of batches from one DataLoader.

    Workers that fetch ahead would otherwise do so while another candidate is timed.
    """
    data = ArrayDataset(opened(config, world)[0].dataset, config.augment)
    size, order = config.data.batch_size_per_replica, list[list[int]]()
    loader = torch_loader(data, workers, world.device, batch_sampler=order)

    def epoch(batches: int) -> Iterator[Any]:
        order[:] = torch.randint(len(data), (batches, size)).tolist()
        for images, labels in loader:
            yield tuple(t.to(world.device, non_blocking=True) for t in (images, labels))

    return epoch


def _ffcv(config: Config, world: World) -> Epoch:
    """Batches of float32 (N, 3, H, W), cropped, flipped and normalised by FFCV's pipeline.

    Its augmentations run on the CPU, where `data.ffcv_loader` lets FFCV decode only; hence this
    second door to ffcv. They cannot be seeded.
    """
    from dist_resnet.data.ffcv_loader import import_ffcv  # numba takes half a second

    import_ffcv()
    from ffcv import fields, loader, transforms

    data, augment = opened(config, world)[0].dataset, config.augment
    size, device = config.data.batch_size_per_replica, world.device
    threads = torch.get_num_threads()
    to_device = [transforms.ToDevice(device, non_blocking=False)] * (device.type == "cuda")
    images = [
        fields.decoders.SimpleRGBImageDecoder(),
        *[transforms.RandomHorizontalFlip()] * bool(augment.flip),
        *[transforms.RandomTranslate(padding=augment.crop_padding)] * bool(augment.crop_padding),
        transforms.ToTensor(), *to_device, transforms.ToTorchImage(),
        transforms.Convert(torch.float32), _Normalise(data, device),
    ]  # fmt: skip
    labels = [fields.decoders.IntDecoder(), transforms.ToTensor(), *to_device]
    made = loader.Loader(
        str(data.train_path), batch_size=size, num_workers=1, os_cache=True,
        order=loader.OrderOption.SEQUENTIAL, drop_last=True,
        pipelines={"image": images, "label": [*labels, transforms.Squeeze(1)]},
    )  # fmt: skip
    torch.set_num_threads(threads)  # FFCV sets it to its own number of workers
    samples = made.indices

    def epoch(batches: int) -> Iterator[Any]:
        """Over as many of the data set's epochs as that takes, the last one cut short."""
        while batches > 0:
            count = min(batches, len(made)) * size
            made.traversal_order.indices = np.random.permutation(samples)[:count]
            threads = torch.get_num_threads()
            found = iter(made)
            torch.set_num_threads(threads)
            for batch in found:
                yield batch
                batches -= 1

    return epoch


def _changed(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))


class _Normalise(nn.Module):
    """torchvision's Normalize, which FFCV's example uses, without its checks in every batch."""

    def __init__(self, data: Dataset, device: torch.device) -> None:
        super().__init__()
        std = [value or 1.0 for value in data.std]  # where a channel never varies
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)
