"""The loaders that ours are measured beside: torchvision's transforms in torch's DataLoader, and
FFCV as its own CIFAR example uses it.

FFCV's augmentations run inside its pipeline, on the CPU, where `data.ffcv_loader` lets FFCV decode
only; hence the second door to ffcv. They cannot be seeded.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset as Prepared
from dist_resnet.data.ffcv_import import import_ffcv


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
        steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.transform = transforms.Compose(steps)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def torch_loader(
    data: Dataset[Any],
    batch_size: int,
    workers: int,
    sampler: Sampler[int] | None,
    device: torch.device,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of full size; with workers, these stay alive from epoch to epoch."""
    return DataLoader(
        data, batch_size, shuffle=sampler is None, sampler=sampler, num_workers=workers,
        drop_last=True, persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip


class _Some(Sampler[int]):
    """So many random samples an epoch."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 1

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(self.size, (self.count,)).tolist())

    def __len__(self) -> int:
        return self.count


class TorchvisionEpochs:
    """Epochs of any number of batches from one DataLoader.

    Workers that fetch ahead would otherwise do so while another candidate is timed.
    """

    def __init__(
        self, data: ArrayDataset, batch_size: int, workers: int, device: torch.device
    ) -> None:
        self._sampler, self._batch, self._device = _Some(len(data)), batch_size, device
        self._loader = torch_loader(data, batch_size, workers, self._sampler, device)

    def __call__(self, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of so many batches, on the device."""
        self._sampler.count = batches * self._batch
        for images, labels in self._loader:
            yield tuple(t.to(self._device, non_blocking=True) for t in (images, labels))


class FfcvEpochs:
    """Batches of float32 (N, 3, H, W), cropped, flipped and normalised by FFCV's pipeline."""

    def __init__(
        self, data: Prepared, batch_size: int, padding: int, flip: bool, device: torch.device
    ) -> None:
        import_ffcv()
        from ffcv import fields, loader, transforms

        threads = torch.get_num_threads()
        to_device = [transforms.ToDevice(device, non_blocking=False)] * (device.type == "cuda")
        images = [
            fields.decoders.SimpleRGBImageDecoder(),
            *[transforms.RandomHorizontalFlip()] * flip,
            *[transforms.RandomTranslate(padding=padding)] * bool(padding),
            transforms.ToTensor(), *to_device, transforms.ToTorchImage(),
            transforms.Convert(torch.float32), _Normalise(data, device),
        ]  # fmt: skip
        labels = [fields.decoders.IntDecoder(), transforms.ToTensor(), *to_device]
        self._batch = batch_size
        self._loader = loader.Loader(
            str(data.train_path), batch_size=batch_size, num_workers=1, os_cache=True,
            order=loader.OrderOption.RANDOM, drop_last=True,
            pipelines={"image": images, "label": [*labels, transforms.Squeeze(1)]},
        )  # fmt: skip
        torch.set_num_threads(threads)  # FFCV sets it to its own number of workers

    def __call__(self, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches, over as many epochs as that takes."""
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.pipeline import Compiler

        loader, left = self._loader, batches
        while left > 0:
            # As loader.__iter__, which knows whole epochs only.
            order = loader.next_traversal_order()[: min(left, len(loader)) * self._batch]
            loader.next_epoch += 1
            threads = torch.get_num_threads()
            Compiler.set_num_threads(1)
            epoch = EpochIterator(loader, order)
            torch.set_num_threads(threads)
            yield from itertools.islice(epoch, left)
            left -= len(order) // self._batch


class _Normalise(nn.Module):
    """torchvision's Normalize without its checks: FFCV's example uses that one."""

    def __init__(self, data: Prepared, device: torch.device) -> None:
        super().__init__()
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([v or 1.0 for v in data.std], device=device).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)
