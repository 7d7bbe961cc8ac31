"""Cross-entropy against mixed targets.

Shapes: N images, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_resnet.augment import Choices


def mixed_targets(labels: Tensor, choices: Choices, classes: int, smoothing: float) -> Tensor:
    """Rows of target probabilities, float32 (N, K): lam * a + (1 - lam) * b, each row summing to 1.

    Args:
        labels: int64 (N,).
        smoothing: share of each target spread evenly over all classes.
    """
    own = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    own.scatter_(1, labels.unsqueeze(1), 1 - smoothing + smoothing / classes)
    if choices.partner is None or choices.lam is None:
        return own
    return torch.lerp(own[choices.partner], own, choices.lam)


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    choices: Choices,
    smoothing: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean over the batch of -sum_k weight_k target_k log softmax(logits)_k, in float32.

    Args:
        weights: of the classes, float32 (K,); None: 1. As torch's `weight`: without mixup the sum
            is divided by that of the labels' weights, under mixup by the number of images.
    """
    if choices.partner is None:  # the same, from the labels themselves
        return F.cross_entropy(logits.float(), labels, weights, label_smoothing=smoothing)
    targets = mixed_targets(labels, choices, logits.shape[1], smoothing)
    return F.cross_entropy(logits.float(), targets, weights)
