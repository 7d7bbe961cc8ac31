"""FFCV as its own CIFAR example uses it: crop and flip on the CPU, inside its pipeline.

A peer of `data.ffcv_loader`, which lets FFCV decode only; hence the second door to ffcv. These
augmentations cannot be seeded, and mixup is not among what is measured here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_resnet.data.dataset import Dataset
from dist_resnet.data.ffcv_import import import_ffcv


class FfcvPipeline:
    """Batches of float32 (N, 3, H, W), cropped, flipped and normalised by FFCV's pipeline."""

    def __init__(
        self, data: Dataset, batch_size: int, padding: int, flip: bool, device: torch.device
    ) -> None:
        import_ffcv()
        from ffcv import fields, loader, transforms

        threads = torch.get_num_threads()
        images: list[Any] = [fields.decoders.SimpleRGBImageDecoder()]
        if flip:
            images.append(transforms.RandomHorizontalFlip())
        if padding:
            images.append(transforms.RandomTranslate(padding=padding))
        labels: list[Any] = [fields.decoders.IntDecoder(), transforms.ToTensor()]
        images.append(transforms.ToTensor())
        if device.type == "cuda":
            images.append(transforms.ToDevice(device, non_blocking=False))
            labels.append(transforms.ToDevice(device, non_blocking=False))
        images += [
            transforms.ToTorchImage(),
            transforms.Convert(torch.float32),
            _Normalise(data, device),
        ]
        self._batch = batch_size
        self._loader = loader.Loader(
            str(Path(data.train_path)),
            batch_size=batch_size,
            num_workers=1,
            os_cache=True,
            order=loader.OrderOption.RANDOM,
            drop_last=True,
            pipelines={"image": images, "label": [*labels, transforms.Squeeze(1)]},
        )
        torch.set_num_threads(threads)

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
            torch.set_num_threads(threads)  # FFCV sets it to its own number of workers
            for batch in epoch:
                yield batch
                left -= 1


class _Normalise(nn.Module):
    """torchvision's Normalize without its checks: FFCV's example uses that one."""

    def __init__(self, data: Dataset, device: torch.device) -> None:
        super().__init__()
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([v or 1.0 for v in data.std], device=device).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)
