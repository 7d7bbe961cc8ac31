"""The training batches of one rank, from any step on."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_resnet.config.plan import Plan
from dist_resnet.data.order import as_samples, rank_order


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


def open_loader(kind: str, path: Path, batch_size: int, device: torch.device) -> Loader:
    """The configured loader of one .beton file.

    Args:
        kind: `data.loader`.
    """
    # Imported here: numba and FFCV take a second, which --help and --print-config need not.
    if kind == "resident":
        from dist_resnet.data.resident_loader import ResidentLoader

        return ResidentLoader(path, batch_size, device)
    from dist_resnet.data.ffcv_loader import FfcvLoader

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
        samples = as_samples(order, device)
        for row, (images, labels) in enumerate(loader.batches(order)):
            yield Batch(images, labels, samples[row])
        step += last - first
