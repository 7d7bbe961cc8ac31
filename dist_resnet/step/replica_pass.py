"""What surrounds the model in the forward pass of one or several replicas: images in, loss out.

Shapes: R replicas of N images each, one replica's after the other's; H W pixels, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dist_resnet.augment import Augmenter, ChoiceDrawer, Choices, Normalisation, within_kernels
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.kernels import support
from dist_resnet.step.loss import mixed_cross_entropy
from dist_resnet.step.measures import MEASURES

Part: TypeAlias = tuple[Tensor, Tensor, Choices]
"""Of one replica: logits, labels and random choices."""


@dataclass(frozen=True)
class Objective:
    """What the backward pass starts from, and what is logged."""

    output: Tensor
    """What gradients are taken of."""
    gradient: Tensor | None
    """Of the objective by `output`; None: 1."""
    row: Tensor
    """float32 (1 + M,): loss and what `MEASURES` finds, each summed over the replicas."""


@dataclass
class ReplicaPass(ABC):
    """Prepares the images of R replicas, and judges the logits made of them."""

    config: AugmentConfig
    smoothing: float
    draw: ChoiceDrawer
    statistics: Normalisation
    replicas: int
    precision: torch.dtype
    weights: Tensor | None = None
    """float32 (K,): of the classes in the loss; None: 1."""

    @abstractmethod
    def inputs(
        self, images: Tensor, samples: Tensor, key: Tensor, turn: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Augmented images, (R N, 3, H, W), and the random choices, whose `keep` is dropout's.

        Args:
            images: uint8 (R N, H, W, 3).
            samples: int64 (R N,), indices in the training set.
            key: int64, 0-dimensional, of the step.
            turn: int64, 0-dimensional, of its epoch; None where nothing asks for it.
        """

    @abstractmethod
    def objective(
        self, logits: Tensor, labels: Tensor, choices: Any, scale: Tensor | None
    ) -> Objective:
        """The sum of the replicas' losses.

        Args:
            logits: (R N, K).
            scale: float32, 0-dimensional: factor of the gradient alone; None: 1.
        """

    def by_torch(self) -> "ReplicaPass":
        """What does the same by PyTorch's operations."""
        return self


@dataclass(frozen=True)
class ReplicaChoices:
    """The random choices of `TorchPass`: each replica's own."""

    parts: list[Choices]

    @property
    def keep(self) -> Tensor | None:
        """(R N, features): dropout's factors."""
        keeps = [part.keep for part in self.parts if part.keep is not None]
        return _joined(keeps) if keeps else None


@dataclass
class TorchPass(ReplicaPass):
    """By PyTorch's operations and, on a CPU, our C++: one replica after the other."""

    def __post_init__(self) -> None:
        self.augment = Augmenter(self.config, self.statistics)

    def inputs(
        self, images: Tensor, samples: Tensor, key: Tensor, turn: Tensor | None = None
    ) -> tuple[Tensor, ReplicaChoices]:
        chosen = [self.draw(key, part, turn) for part in _parted(samples, self.replicas)]
        parts = zip(_parted(images, self.replicas), chosen, strict=True)
        made = [self.augment(part, c) for part, c in parts]
        return _joined(made), ReplicaChoices(chosen)

    def objective(
        self, logits: Tensor, labels: Tensor, choices: ReplicaChoices, scale: Tensor | None
    ) -> Objective:
        rows, own = _parted(logits, self.replicas), _parted(labels, self.replicas)
        parts = list(zip(rows, own, choices.parts, strict=True))
        loss = _summed([mixed_cross_entropy(*part, self.smoothing, self.weights) for part in parts])
        row = torch.stack([loss.detach(), *_measured(parts)])
        return Objective(loss if scale is None else loss * scale, None, row)


class KernelPass(ReplicaPass):
    """By our Triton kernels, all replicas at once."""

    def inputs(
        self, images: Tensor, samples: Tensor, key: Tensor, turn: Tensor | None = None
    ) -> tuple[Tensor, Choices]:
        from dist_resnet.kernels import images as kernels  # Triton is not everywhere

        config, draw = self.config, self.draw
        cropped, cut, mixed = config.crop_padding, config.cutout, config.mixup_alpha
        integers, flip, lam, keep = kernels.draw_choices(
            key,
            samples,
            self.replicas,
            2 * cropped + 1 if cropped else 0,
            (draw.height, draw.width) if cut else (0, 0),
            draw.lam_table,
            draw.features,
            draw.dropout,
        )
        top, left, cut_top, cut_left, partner = integers.unbind()
        made = kernels.augment(
            images,
            (top, left, cropped) if cropped else None,
            draw.flips(flip, samples, turn) if config.flip else None,
            (cut_top, cut_left, cut) if cut else None,
            (partner, lam) if mixed else None,
            self.statistics.mean,
            self.statistics.scale,
            self.precision,
        )
        return made, Choices(
            partner=partner if mixed else None,
            lam=lam if mixed else None,
            keep=keep if draw.features else None,
        )

    def objective(
        self, logits: Tensor, labels: Tensor, choices: Choices, scale: Tensor | None
    ) -> Objective:
        from dist_resnet.kernels.loss import loss_and_gradient

        mixup = None
        if choices.partner is not None and choices.lam is not None:
            mixup = choices.partner, choices.lam
        found, gradient = loss_and_gradient(
            logits.detach(), labels, mixup, self.smoothing, scale, self.replicas, self.weights
        )
        row = found.sum(dim=0) if self.replicas > 1 else found[0]  # a sum is a launch
        if len(MEASURES) > 1:  # no launch more for top-1 alone
            row = torch.stack([row[0], *_measured(self._parts(logits, labels, choices))])
        return Objective(logits, gradient, row)

    def by_torch(self) -> TorchPass:
        return TorchPass(**{field.name: getattr(self, field.name) for field in fields(self)})

    def _parts(self, logits: Tensor, labels: Tensor, choices: Choices) -> list[Part]:
        size, parts = len(labels) // self.replicas, []
        for number in range(self.replicas):
            at, own = slice(number * size, (number + 1) * size), choices
            if choices.partner is not None and choices.lam is not None:
                partner = choices.partner[at] - number * size
                own = replace(choices, partner=partner, lam=choices.lam[number])
            parts.append((logits[at], labels[at], own))
        return parts


def pass_kind(config: AugmentConfig, device: torch.device) -> type[ReplicaPass]:
    """The kernels' where they run and do all that is wanted, else PyTorch's."""
    return KernelPass if support.usable(device) and within_kernels(config) else TorchPass


def _measured(parts: Sequence[Part]) -> list[Tensor]:
    """What each of `MEASURES` finds, summed over the replicas."""
    parts = [(logits.detach(), labels, choices) for logits, labels, choices in parts]
    return [_summed([measure(*part) for part in parts]) for measure in MEASURES.values()]


def _parted(tensor: Tensor, replicas: int) -> Sequence[Tensor]:
    """Each replica's part; of one, the tensor itself: a view takes time in every step."""
    return [tensor] if replicas == 1 else tensor.chunk(replicas)


def _summed(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
