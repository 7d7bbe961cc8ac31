"""From bytes to what a network is given.

Shapes: N images, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Statistics of the training set, laid out for rows of pixels on the device."""

    mean: Tensor
    """float32 (3 W,), on the scale 0 to 255."""
    scale: Tensor
    """float32 (3 W,): 1 / standard deviation."""

    @staticmethod
    def of(
        mean: Sequence[float], std: Sequence[float], width: int, device: torch.device
    ) -> "Normalisation":
        """From the three channels' statistics, for images `width` pixels wide."""
        # Whole rows of 3 W values: an inner loop of 3 cannot be vectorised.
        return Normalisation(
            torch.tensor(mean, device=device).repeat(width),
            # A channel that never varies has standard deviation 0.
            torch.tensor([1 / (value or 1.0) for value in std], device=device).repeat(width),
        )


def normalise(images: Tensor, statistics: Normalisation) -> Tensor:
    """uint8 (N, H, W, 3) to (pixel - mean) / std: float32 (N, 3, H, W) in channels-last order."""
    rows = images.flatten(2).float().sub_(statistics.mean).mul_(statistics.scale)
    return rows.view(images.shape).permute(0, 3, 1, 2)
