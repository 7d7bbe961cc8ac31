"""Evaluation: every image exactly once, the same figures on any number of ranks.

Shapes: N images, K classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.augment import Normalisation, normalise
from dist_resnet.base import watchdog
from dist_resnet.config.plugins import is_plugin, within_step
from dist_resnet.config.schema import ModelConfig
from dist_resnet.data.order import eval_batches
from dist_resnet.data.stream import Loader
from dist_resnet.distributed.group import World, all_reduce_sum
from dist_resnet.step.precision import autocast, repeatable_convolutions

BATCH_SIZE = 500
_TOP = 5


@dataclass(frozen=True)
class Mistakes:
    """Images that are taken for another class, those of the highest loss first."""

    positions: np.ndarray
    """int64 (M,): places in the evaluated set."""
    losses: list[float]
    """Cross-entropy of each in nats."""
    labels: list[int]
    """True classes."""
    guesses: list[int]
    """Predictions."""


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others."""

    precision: float
    """Share of the images that are taken for it that are of it."""
    recall: float
    """Share of its images that are recognised."""
    f1: float
    """Harmonic mean of the two."""
    images: int


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
    correct_top5: int
    """Images whose class is among the five likeliest; all of them up to five classes."""
    mistakes: Mistakes | None = None
    """The worst ones, where they were asked for."""

    @property
    def top1(self) -> float:
        return self.correct / self.images

    def class_scores(self) -> list[ClassScore]:
        """Precision, recall and F1 of each class; 0 where there is nothing to divide by."""
        images, guesses = self.confusion.sum(dim=1).tolist(), self.confusion.sum(dim=0).tolist()
        hits = self.confusion.diagonal().tolist()
        return [
            ClassScore(
                hit / (taken or 1), hit / (count or 1), 2 * hit / (taken + count or 1), count
            )
            for hit, count, taken in zip(hits, images, guesses, strict=True)
        ]

    def figures(self, classes: Sequence[str]) -> dict[str, float | int]:
        """Loss and accuracies by the names of their metrics.

        Top-5 only of more than five classes, where it says something; no class without images.
        `balanced` is the mean share that is recognised of a class.
        """
        found: dict[str, float | int] = {"val/loss": self.loss, "val/top1": self.top1}
        if len(classes) > _TOP:
            found["val/top5"] = self.correct_top5 / self.images
        scores = self.class_scores()
        recalls = [(n, s.recall) for n, s in zip(classes, scores, strict=True) if s.images]
        found["val/balanced"] = sum(recall for _, recall in recalls) / len(recalls)
        # Means over the classes that occur, be it as a prediction only.
        counts = (self.confusion.sum(dim=1) + self.confusion.sum(dim=0)).tolist()
        occurring = [score for score, count in zip(scores, counts, strict=True) if count]
        for name in ("precision", "recall", "f1"):
            total = sum(getattr(score, name) for score in occurring)
            found[f"val/{name}_macro"] = total / len(occurring)
        if self.correct_tta is not None:
            found["val/top1_tta"] = self.correct_tta / self.images
        return found | {f"val/per_class/{name}": recall for name, recall in recalls}


@dataclass
class Evaluator:
    """Evaluates a model on the images of one loader."""

    loader: Loader
    indices: np.ndarray
    """int64: which of the loader's images."""
    statistics: Normalisation
    precision: torch.dtype
    flip_tta: bool
    world: World
    classes: int
    channels_last: bool = True
    name: str = ModelConfig.name
    """Of the net, for the line about what it raises."""

    @torch.no_grad()
    def __call__(self, model: nn.Module, mistakes: int = 0) -> Evaluation:
        """Evaluate in evaluation mode; the mode before is restored. All ranks must call it.

        Args:
            mistakes: how many of the worst ones to find, the same on all ranks.
        """
        was_training = model.training
        model.eval()
        classes, device = self.classes, self.world.device
        num_batches = -(-len(self.indices) // self.loader.batch_size)
        # One entry a batch, summed in batch order: no sum depends on the number of ranks.
        losses = torch.zeros(num_batches, dtype=torch.float64, device=device)
        # Of the confusion; then correct among the five likeliest, and with mirror images.
        counts = torch.zeros(classes * classes + 2, dtype=torch.int64, device=device)
        each = torch.zeros(
            3, len(self.indices) if mistakes else 0, dtype=torch.float64, device=device
        )
        for number, labels, logits, mirrored in self._logits(model):
            losses[number] = F.cross_entropy(logits, labels, reduction="sum")
            guesses = logits.argmax(dim=1)
            cells = labels * classes + guesses
            counts[:-2] += torch.bincount(cells, minlength=classes * classes)
            likeliest = logits.topk(min(_TOP, classes), dim=1).indices
            counts[-2] += (likeliest == labels[:, None]).sum()
            if mistakes:
                first = number * self.loader.batch_size
                loss = F.cross_entropy(logits, labels, reduction="none")
                each[:, first : first + len(labels)] = torch.stack([loss, labels, guesses])
            if mirrored is not None:
                counts[-1] += ((logits + mirrored).argmax(dim=1) == labels).sum()
        model.train(was_training)
        all_reduce_sum(losses)
        all_reduce_sum(counts)
        confusion = counts[:-2].view(classes, classes).cpu()
        images = int(confusion.sum())
        assert images == len(self.indices), f"evaluated {images} of {len(self.indices)} images"
        return Evaluation(
            loss=float(losses.sum()) / images,
            correct=int(confusion.diagonal().sum()),
            images=images,
            correct_tta=int(counts[-1]) if self.flip_tta else None,
            confusion=confusion,
            correct_top5=int(counts[-2]),
            mistakes=_worst(each, mistakes) if mistakes else None,
        )

    def images(self, positions: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) on the host: the images at these places of the set, of one rank."""
        batches = self.loader.batches(self.indices[positions])
        parts = [images.cpu().clone() for images, _ in batches]  # a batch lives until the next
        return torch.cat(parts) if parts else torch.empty(0, 1, 1, 3, dtype=torch.uint8)

    def _logits(self, model: nn.Module) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """(batch number, labels, logits, logits of the mirror images) of this rank's batches."""
        rank, size = self.world.rank, self.world.size
        mine = eval_batches(self.indices, self.loader.batch_size, rank, size)
        if not mine:
            return
        batches = self.loader.batches(np.concatenate(mine))
        for turn, (images, labels) in enumerate(batches):
            watchdog.rearm()
            inputs = normalise(images, self.statistics)
            if not self.channels_last:
                inputs = inputs.contiguous()
            own = within_step("model.name", self.name) if is_plugin(self.name) else nullcontext()
            with own, autocast(inputs.device, self.precision), repeatable_convolutions():
                logits = model(inputs).float()
                mirrored = model(inputs.flip(3)).float() if self.flip_tta else None
            yield rank + turn * size, labels, logits, mirrored


def _worst(each: Tensor, count: int) -> Mistakes:
    """The `count` mistakes of highest loss, or as many as there are. A collective.

    Args:
        each: float64 (3, images): loss, class and prediction; zero where they are another rank's.
    """
    all_reduce_sum(each)
    losses, labels, guesses = each.cpu()
    wrong = torch.where(labels != guesses, losses, -1.0)
    order = torch.argsort(wrong, descending=True, stable=True)[:count]
    order = order[wrong[order] >= 0]
    return Mistakes(
        order.numpy(),
        losses[order].tolist(),
        labels[order].long().tolist(),
        guesses[order].long().tolist(),
    )
