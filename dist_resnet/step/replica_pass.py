"""What surrounds the model in the forward pass of one or several replicas: images in, loss out.

Shapes: R replicas of N images each, one replica's after the other's; H W pixels, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_resnet.augment import Augmenter, ChoiceDrawer, Choices, Normalisation, within_kernels
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.kernels import support
from dist_resnet.step.loss import mixed_cross_entropy
from dist_resnet.step.measures import MEASURES


@dataclass(frozen=True)
class Objective:
    """What the backward pass starts from, and what is logged."""

    output: Tensor
    """What gradients are taken of."""
    gradient: Tensor | None
    """Of the objective by `output`; None: 1."""
    row: Tensor
    """float32 (1 + M,): loss and what `MEASURES` finds, each summed over the replicas."""


class ReplicaPass(Protocol):
    """Prepares the images of R replicas, and judges the logits made of them."""

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

    def objective(
        self, logits: Tensor, labels: Tensor, choices: Any, scale: Tensor | None
    ) -> Objective:
        """The sum of the replicas' losses.

        Args:
            logits: (R N, K).
            scale: float32, 0-dimensional: factor of the gradient alone; None: 1.
        """


@dataclass(frozen=True)
class ReplicaChoices:
    """The random choices of `TorchPass`: each replica's own."""

    parts: list[Choices]

    @property
    def keep(self) -> Tensor | None:
        """(R N, features): dropout's factors."""
        keeps = [part.keep for part in self.parts if part.keep is not None]
        return _joined(keeps) if keeps else None


class TorchPass:
    """By PyTorch's operations and, on a CPU, our C++: one replica after the other."""

    def __init__(
        self,
        config: AugmentConfig,
        smoothing: float,
        draw: Callable[[Tensor, Tensor, Tensor | None], Choices],
        statistics: Normalisation,
        replicas: int,
        weights: Tensor | None = None,
    ) -> None:
        self.smoothing, self.draw = smoothing, draw
        self.augment, self.replicas = Augmenter(config, statistics), replicas
        self.weights = weights

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
        losses = []
        found: list[list[Tensor]] = [[] for _ in MEASURES]
        for part, own, chosen in zip(
            _parted(logits, self.replicas),
            _parted(labels, self.replicas),
            choices.parts,
            strict=True,
        ):
            losses.append(mixed_cross_entropy(part, own, chosen, self.smoothing, self.weights))
            for values, measure in zip(found, MEASURES.values(), strict=True):
                values.append(measure(part.detach(), own, chosen))
        loss = _summed(losses)
        row = torch.stack([loss.detach(), *map(_summed, found)])
        return Objective(loss if scale is None else loss * scale, None, row)


class KernelPass:
    """By our Triton kernels, all replicas at once."""

    def __init__(
        self,
        config: AugmentConfig,
        smoothing: float,
        draw: ChoiceDrawer,
        statistics: Normalisation,
        replicas: int,
        precision: torch.dtype,
        weights: Tensor | None = None,
    ) -> None:
        self.config, self.smoothing, self.draw = config, smoothing, draw
        self.statistics, self.replicas, self.precision = statistics, replicas, precision
        self.weights = weights

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
        row = found.sum(dim=0)
        if len(MEASURES) > 1:  # no launch more for top-1 alone
            loss, top1 = row
            parts = self._parts(logits.detach(), labels, choices)
            row = torch.stack([loss, *(
                top1 if name == "top1" else _summed([measure(*part) for part in parts])
                for name, measure in MEASURES.items()
            )])  # fmt: skip
        return Objective(logits, gradient, row)

    def _parts(
        self, logits: Tensor, labels: Tensor, choices: Choices
    ) -> list[tuple[Tensor, Tensor, Choices]]:
        """What a `Measure` takes, of each replica."""
        size, parts = len(labels) // self.replicas, []
        for number in range(self.replicas):
            at, own = slice(number * size, (number + 1) * size), choices
            if choices.partner is not None and choices.lam is not None:
                partner = choices.partner[at] - number * size
                own = replace(choices, partner=partner, lam=choices.lam[number])
            parts.append((logits[at], labels[at], own))
        return parts


def build_pass(
    config: AugmentConfig,
    smoothing: float,
    draw: ChoiceDrawer,
    statistics: Normalisation,
    replicas: int,
    precision: torch.dtype,
    weights: Tensor | None = None,
) -> ReplicaPass:
    """The kernels' where they run and do all that is wanted, else PyTorch's.

    Args:
        weights: of the classes in the loss, float32 (K,); None: 1.
    """
    if support.usable(statistics.mean.device) and within_kernels(config):
        return KernelPass(config, smoothing, draw, statistics, replicas, precision, weights)
    return TorchPass(config, smoothing, draw, statistics, replicas, weights)


def torch_pass(own: ReplicaPass) -> ReplicaPass:
    """The pass by PyTorch's operations that does what `own` does."""
    if not isinstance(own, KernelPass):
        return own
    draw = own.draw.by_torch
    return TorchPass(own.config, own.smoothing, draw, own.statistics, own.replicas, own.weights)


def _parted(tensor: Tensor, replicas: int) -> Sequence[Tensor]:
    """Each replica's part; of one, the tensor itself: a view takes time in every step."""
    return [tensor] if replicas == 1 else tensor.chunk(replicas)


def _summed(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
