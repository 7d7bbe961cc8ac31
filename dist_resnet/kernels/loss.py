"""Cross-entropy against mixed targets on a GPU: value, accuracy and gradient in one launch, not 45.

`loss.mixed_cross_entropy` and `measures.weighted_top1` are the definitions.

Shapes: R replicas of N images, K classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # logits that a program holds at a time


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    mixup: tuple[Tensor, Tensor] | None,
    smoothing: float,
    scale: Tensor | None,
    replicas: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and weighted top-1 of each replica, and the gradient of the losses' sum.

    Args:
        logits: (R N, K) of any floating type.
        labels: int64 (R N,).
        mixup: partner, int64 (R N,), a place among all images, and lam, float32 (R,).
        scale: float32, 0-dimensional: factor of the gradient alone; None: 1.
        weights: of the classes, float32 (K,); None: 1.

    Returns:
        float32 (R, 2), each replica's mean loss and mean top-1; and the gradient, like `logits`.
    """
    logits = logits.contiguous()
    total, classes = logits.shape
    padded = triton.next_power_of_2(classes)
    found = torch.empty(replicas, 2, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits)
    partner, lam = mixup or (None, None)
    divisor = None  # of each replica's sum; None: its number of images
    if weights is not None and mixup is None:
        divisor = weights[labels].view(replicas, -1).sum(dim=1)
    block = max(1, min(_TILE // padded, triton.next_power_of_2(total // replicas)))
    _loss[(replicas,)](
        logits, labels, partner, lam, scale, weights, divisor, found, gradient, total // replicas,
        smoothing, MIX=mixup is not None, SCALED=scale is not None, WEIGHTED=weights is not None,
        CLASSES=classes, PADDED=padded, BLOCK=block,
    )  # fmt: skip
    return found, gradient


@triton.jit
def _loss(
    logits, labels, partner, lam, scale, weights, divisor, found, gradient, count, smoothing,
    MIX: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, CLASSES: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a replica: the mean over its images, and their gradient."""
    replica = tl.program_id(0)
    klass = tl.arange(0, PADDED)
    own = 1.0
    if MIX:
        own = tl.load(lam + replica)
    share = 1.0 / count
    if WEIGHTED:
        weight = tl.load(weights + klass, mask=klass < CLASSES, other=0.0)[None, :]
        if not MIX:
            share = 1.0 / tl.load(divisor + replica)
    factor = share
    if SCALED:
        factor *= tl.load(scale)
    losses, hits = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        there = row < count
        at = replica * count + row
        mask = there[:, None] & (klass < CLASSES)[None, :]
        place = at.to(tl.int64)[:, None] * CLASSES + klass[None, :]
        values = tl.load(logits + place, mask=mask, other=float("-inf")).to(tl.float32)
        values = tl.where(there[:, None], values, 0.0)
        highest, guess = tl.max(values, 1, return_indices=True)
        shifted = values - highest[:, None]
        exponentials = tl.exp(shifted)
        sums = tl.sum(exponentials, 1)
        label = tl.load(labels + at, mask=there, other=0)
        target = tl.where(klass[None, :] == label[:, None], own, 0.0)
        hit = tl.where(guess == label, own, 0.0)
        if MIX:
            second = tl.load(labels + tl.load(partner + at, mask=there, other=0))
            target += tl.where(klass[None, :] == second[:, None], 1 - own, 0.0)
            hit += tl.where(guess == second, 1 - own, 0.0)
        target = target * (1 - smoothing) + smoothing / CLASSES
        shares = exponentials / sums[:, None]
        if WEIGHTED:
            target *= weight
            shares *= tl.sum(target, 1)[:, None]
        log_likelihood = shifted - tl.log(sums)[:, None]
        # A target of 0 takes nothing of a class that is infinitely unlikely.
        parts = tl.where(mask & (target != 0), target * log_likelihood, 0.0)
        losses += tl.where(there, -tl.sum(parts, 1), 0.0)
        hits += tl.where(there, hit, 0.0)
        slope = (shares - target) * factor
        tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=mask)
    mean = tl.sum(losses, 0) / count
    if WEIGHTED:
        mean = tl.sum(losses, 0) * share
    tl.store(found + 2 * replica, mean)
    tl.store(found + 2 * replica + 1, tl.sum(hits, 0) / count)
