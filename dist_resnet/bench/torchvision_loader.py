"""What everyone writes: torchvision's transforms, one image at a time, and torch's DataLoader."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset as Prepared


class ArrayDataset(Dataset[tuple[Any, int]]):
    """As torchvision.datasets.CIFAR10: an array in memory, a PIL image for the transforms."""

    def __init__(self, prepared: Prepared, padding: int, flip: bool) -> None:
        from torchvision import transforms

        split = read_back(prepared.train_path)
        self.images = np.asarray(split.images)
        self.labels: list[int] = split.labels.tolist()
        steps: list[Any] = []
        if padding:
            steps.append(transforms.RandomCrop((prepared.height, prepared.width), padding=padding))
        if flip:
            steps.append(transforms.RandomHorizontalFlip())
        mean = [value / 255 for value in prepared.mean]
        std = [(value or 1.0) / 255 for value in prepared.std]
        self.transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
        )

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def torch_loader(
    data: Dataset[Any],
    batch_size: int,
    workers: int,
    sampler: Sampler[int] | None = None,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of full size; with workers, these stay alive from epoch to epoch."""
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


class CountedEpochs:
    """Epochs of any number of batches from one DataLoader.

    Workers that fetch ahead would otherwise do so while another candidate is timed.
    """

    def __init__(
        self, data: Dataset[Any], batch_size: int, workers: int, device: torch.device
    ) -> None:
        self._sampler = RandomSampler(_Sized(data), replacement=True, num_samples=1)
        self._batch = batch_size
        self._device = device
        pin = device.type == "cuda"
        self._loader = torch_loader(data, batch_size, workers, self._sampler, pin)

    def __call__(self, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of so many batches, on the device."""
        self._sampler._num_samples = batches * self._batch
        for images, labels in self._loader:
            yield (
                images.to(self._device, non_blocking=True),
                labels.to(self._device, non_blocking=True),
            )


class _Sized:
    """All that RandomSampler asks of a data set."""

    def __init__(self, data: Any) -> None:
        self._length = len(data)

    def __len__(self) -> int:
        return self._length
