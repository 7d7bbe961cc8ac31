"""What tells how a step went beside its loss: logged as `train/NAME`, the mean over the steps.

Shapes: N images, K classes.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dist_resnet.augment import Choices

Measure: TypeAlias = Callable[[Tensor, Tensor, Choices], Tensor]
"""Of logits (N, K), labels, int64 (N,), and the choices that the images were made by: the mean over
the images, float32, 0-dimensional. It must not wait for the device."""


def weighted_top1(logits: Tensor, labels: Tensor, choices: Choices) -> Tensor:
    """Mean over the batch of lam [prediction = a] + (1 - lam) [prediction = b], 0-dimensional."""
    predictions = logits.argmax(dim=1)
    hits = (predictions == labels).float()
    if choices.partner is not None and choices.lam is not None:
        hits = torch.lerp((predictions == labels[choices.partner]).float(), hits, choices.lam)
    return hits.mean()


MEASURES: dict[str, Measure] = {"top1": weighted_top1}
"""A further one is a line here."""
