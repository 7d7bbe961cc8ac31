"""The loaders that ours are measured beside: torchvision's transforms in torch's DataLoader, and
FFCV as its own CIFAR example uses it.

FFCV's augmentations run inside its pipeline, on the CPU, where `data.ffcv_loader` lets FFCV decode
only; hence the second door to ffcv. They cannot be seeded.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dist_resnet.config.schema import AugmentConfig
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset as Prepared

Epoch = Callable[[int], Iterator[Any]]
"""So many batches, on the device."""


class ArrayDataset(Dataset[tuple[Any, int]]):
    """As torchvision.datasets.CIFAR10: an array in memory, a PIL image for the transforms."""

    def __init__(self, prepared: Prepared, augment: AugmentConfig) -> None:
        from torchvision import transforms

        split = read_back(prepared.train_path)
        self.images = np.asarray(split.images)
        self.labels: list[int] = split.labels.tolist()
        steps: list[Any] = []
        if augment.crop_padding:
            size = prepared.height, prepared.width
            steps.append(transforms.RandomCrop(size, padding=augment.crop_padding))
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        mean, std = [value / 255 for value in prepared.mean], [v / 255 for v in _std(prepared)]
        steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.transform = transforms.Compose(steps)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def torch_loader(
    data: Dataset[Any], workers: int, device: torch.device, **batching: Any
) -> DataLoader[tuple[Tensor, Tensor]]:
    """torch's, whose workers stay alive from epoch to epoch.

    Args:
        batching: what it takes besides, to put samples into batches.
    """
    return DataLoader(
        data, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda", **batching,
    )  # fmt: skip


def torchvision_epochs(
    data: ArrayDataset, batch_size: int, workers: int, device: torch.device
) -> Epoch:
    """Random samples, in epochs of any number of batches from one DataLoader.

    Workers that fetch ahead would otherwise do so while another candidate is timed.
    """
    order: list[list[int]] = []
    loader = torch_loader(data, workers, device, batch_sampler=order)

    def epoch(batches: int) -> Iterator[tuple[Tensor, ...]]:
        order[:] = torch.randint(len(data), (batches, batch_size)).tolist()
        for images, labels in loader:
            yield tuple(t.to(device, non_blocking=True) for t in (images, labels))

    return epoch


def ffcv_epochs(
    data: Prepared, batch_size: int, augment: AugmentConfig, device: torch.device
) -> Epoch:
    """Batches of float32 (N, 3, H, W), cropped, flipped and normalised by FFCV's pipeline."""
    from dist_resnet.data.ffcv_loader import import_ffcv

    import_ffcv()
    from ffcv import fields, loader, transforms

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
        str(data.train_path), batch_size=batch_size, num_workers=1, os_cache=True,
        order=loader.OrderOption.SEQUENTIAL, drop_last=True,
        pipelines={"image": images, "label": [*labels, transforms.Squeeze(1)]},
    )  # fmt: skip
    torch.set_num_threads(threads)  # FFCV sets it to its own number of workers
    samples = made.indices

    def epoch(batches: int) -> Iterator[Any]:
        """Over as many of the data set's epochs as that takes, the last one cut short."""
        while batches > 0:
            count = min(batches, len(made)) * batch_size
            made.traversal_order.indices = np.random.permutation(samples)[:count]
            threads = torch.get_num_threads()
            found = iter(made)
            torch.set_num_threads(threads)
            for batch in found:
                yield batch
                batches -= 1

    return epoch


class _Normalise(nn.Module):
    """torchvision's Normalize without its checks: FFCV's example uses that one."""

    def __init__(self, data: Prepared, device: torch.device) -> None:
        super().__init__()
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(_std(data), device=device).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)


def _std(data: Prepared) -> list[float]:
    """Per channel, on the scale 0 to 255; 1 where a channel never varies."""
    return [value or 1.0 for value in data.std]
