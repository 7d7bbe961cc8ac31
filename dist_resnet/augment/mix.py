"""Pairs of images as one: mixup and CutMix.

Shapes: N images of one replica, H W pixels.
"""

import torch
from scipy.special import betaincinv
from torch import Tensor

LAM_QUANTILES = 1 << 16


def beta_quantiles(alpha: float) -> Tensor:
    """float32 (65,536,): the Beta(alpha, alpha) quantiles at the centres of equal probabilities.

    A draw looks its weight up here, so that every device finds the same bits.
    """
    centres = (torch.arange(LAM_QUANTILES, dtype=torch.float64) + 0.5) / LAM_QUANTILES
    return torch.from_numpy(betaincinv(alpha, alpha, centres.numpy())).float()


def mixup(images: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """lam * image + (1 - lam) * its partner (Zhang et al. 2017)."""
    return torch.lerp(images[partner], images, lam)


def outside_box(lam: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Where CutMix (Yun et al. 2019) keeps an image's own pixels: bool (H, W).

    Args:
        lam: float32, 0-dimensional: share of the image that is kept, were the box not clipped.
        row, column: int64, 0-dimensional: centre of the box.
    """
    share = (1 - lam).sqrt()

    def inside(centre: Tensor, length: int) -> Tensor:
        half = (share * length).long() // 2
        offset = torch.arange(length, device=lam.device) - centre
        return (offset >= -half) & (offset < half)

    return ~(inside(row, height).unsqueeze(1) & inside(column, width))
