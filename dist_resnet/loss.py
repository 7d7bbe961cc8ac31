"""Cross-entropy and accuracy against mixed targets.

Shapes: N images, K classes.
"""

import torch
from torch import Tensor

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


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_k target_k log softmax(logits)_k, in float32."""
    return -(targets * torch.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def weighted_correct(logits: Tensor, labels: Tensor, choices: Choices) -> Tensor:
    """Sum over the batch of lam [prediction = a] + (1 - lam) [prediction = b], 0-dimensional."""
    hits = (logits.argmax(dim=1) == labels).float()
    if choices.partner is None or choices.lam is None:
        return hits.sum()
    others = (logits.argmax(dim=1) == labels[choices.partner]).float()
    return torch.lerp(others, hits, choices.lam).sum()
