"""The training batches of one rank, from any step on."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.config.plan import Plan
from dist_resnet.data.beton import read_back
from dist_resnet.data.order import rank_order


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step: its replicas' batches one after the other."""

    images: Tensor
    """uint8 (replicas per rank * batch, H, W, 3)."""
    labels: Tensor
    """int64 (replicas per rank * batch,)."""
    samples: Tensor
    """int64 (replicas per rank * batch,): indices in the training set."""


class Loader(Protocol):
    """Where batches come from."""

    batch_size: int

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class ResidentLoader:
    """The batches of `FfcvLoader`, bit for bit, from the device's memory: 150 MiB of CIFAR-10."""

    def __init__(self, path: Path, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        split = read_back(path)
        self.images = torch.from_numpy(split.images[:]).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)

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


def open_loader(kind: str, path: Path, batch_size: int, device: torch.device) -> Loader:
    """The configured loader of one .beton file.

    Args:
        kind: `data.loader`.

    Raises:
        UserError: FFCV cannot be imported.
    """
    if kind == "resident":
        return ResidentLoader(path, batch_size, device)
    try:  # here, as numba and FFCV take a second, which --help and --print-config need not
        from dist_resnet.data.ffcv_loader import FfcvLoader
    except ImportError as error:
        raise UserError(f"cannot import ffcv ({error}); run `make setup`") from error
    return FfcvLoader(path, batch_size, device)


def training_batches(
    loader: Loader,
    seed: int,
    indices: np.ndarray,
    plan: Plan,
    rank: int,
    start: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """Batches of steps `start` to the last, without replaying any before.

    A batch may be overwritten when the next one is asked for.
    """
    step = start
    while step < plan.total_steps:
        epoch, first = divmod(step, plan.steps_per_epoch)
        last = min(plan.steps_per_epoch, first + plan.total_steps - step)
        order = rank_order(seed, epoch, first, indices, plan, rank)[: last - first]
        samples = torch.from_numpy(order).to(device)
        for row, (images, labels) in enumerate(loader.batches(order)):
            yield Batch(images, labels, samples[row])
        step += last - first
