"""Evaluation: every image exactly once, the same figures on any number of ranks.

Shapes: N images, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_resnet import watchdog
from dist_resnet.augment import Normalisation, normalise
from dist_resnet.data.order import eval_batches
from dist_resnet.data.stream import Loader
from dist_resnet.distributed import World, all_reduce_sum
from dist_resnet.models.resnet import ResNet

BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """Figures over one whole set."""

    loss: float
    """Mean cross-entropy in nats."""
    correct: int
    images: int
    correct_tta: int | None
    """Correct images when logits are averaged over each image and its mirror image."""
    confusion: Tensor
    """int64 (K, K): rows are true classes, columns predictions."""

    @property
    def top1(self) -> float:
        return self.correct / self.images

    @property
    def top1_tta(self) -> float | None:
        return None if self.correct_tta is None else self.correct_tta / self.images

    def per_class(self) -> list[float]:
        """Share of each class's images that are recognised; 0 for a class without images."""
        counts = self.confusion.sum(dim=1).clamp(min=1).double()
        return (self.confusion.diagonal() / counts).tolist()


class Evaluator:
    """Evaluates a model on the images of one loader."""

    def __init__(
        self,
        loader: Loader,
        indices: np.ndarray,
        statistics: Normalisation,
        precision: torch.dtype,
        flip_tta: bool,
        world: World,
    ) -> None:
        self.loader = loader
        self.indices = indices
        self.statistics = statistics
        self.precision = precision
        self.flip_tta = flip_tta
        self.world = world

    @torch.no_grad()
    def __call__(self, model: ResNet) -> Evaluation:
        """Evaluate in evaluation mode; the mode before is restored. All ranks must call it."""
        was_training = model.training
        model.eval()
        classes = model.head.out_features
        device = self.world.device
        num_batches = -(-len(self.indices) // self.loader.batch_size)
        # One entry a batch, summed in batch order: no sum depends on the number of ranks.
        losses = torch.zeros(num_batches, dtype=torch.float64, device=device)
        counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=device)
        for number, labels, logits, mirrored in self._logits(model):
            losses[number] = F.cross_entropy(logits, labels, reduction="sum")
            cells = labels * classes + logits.argmax(dim=1)
            counts[:-1] += torch.bincount(cells, minlength=classes * classes)
            if mirrored is not None:
                counts[-1] += ((logits + mirrored).argmax(dim=1) == labels).sum()
        model.train(was_training)
        all_reduce_sum(losses)
        all_reduce_sum(counts)
        confusion = counts[:-1].view(classes, classes).cpu()
        images = int(confusion.sum())
        assert images == len(self.indices), f"evaluated {images} of {len(self.indices)} images"
        return Evaluation(
            loss=float(losses.sum()) / images,
            correct=int(confusion.diagonal().sum()),
            images=images,
            correct_tta=int(counts[-1]) if self.flip_tta else None,
            confusion=confusion,
        )

    def _logits(self, model: ResNet) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """(batch number, labels, logits, logits of the mirror images) of this rank's batches."""
        rank, size = self.world.rank, self.world.size
        mine = eval_batches(self.indices, self.loader.batch_size, rank, size)
        if not mine:
            return
        batches = self.loader.batches(np.concatenate(mine))
        for turn, (images, labels) in enumerate(batches):
            watchdog.rearm()
            inputs = normalise(images, self.statistics)
            with torch.autocast(
                inputs.device.type, self.precision, enabled=self.precision != torch.float32
            ):
                logits = model(inputs).float()
                mirrored = model(inputs.flip(3)).float() if self.flip_tta else None
            yield rank + turn * size, labels, logits, mirrored
