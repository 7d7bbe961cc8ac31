"""The whole set in the device's memory: 150 MiB of uint8 for CIFAR-10's 50,000 images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_resnet.data.ffcv_loader import FfcvLoader

_FILL_BATCH = 1000


class ResidentLoader:
    """The batches of `FfcvLoader`, bit for bit, indexed out of memory."""

    def __init__(self, path: Path, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        source = FfcvLoader(path, _FILL_BATCH, torch.device("cpu"))
        parts = [(i.clone(), t.clone()) for i, t in source.batches(np.arange(len(source)))]
        self.images = torch.cat([images for images, _ in parts]).to(device)
        self.labels = torch.cat([labels for _, labels in parts]).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """As `FfcvLoader.batches`; the batches stay valid."""
        flat = np.ascontiguousarray(indices.reshape(-1))
        if flat.size == 0:
            return
        if int(flat.min()) < 0 or int(flat.max()) >= len(self):
            raise IndexError(f"samples {flat.min()} to {flat.max()} of a dataset of {len(self)}")
        order = torch.from_numpy(flat).to(self.labels.device)
        for chosen in order.split(self.batch_size):
            yield self.images[chosen], self.labels[chosen]
