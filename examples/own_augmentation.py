"""An augmentation of your own: a function of a batch and of random numbers that it is given.

python -m dist_resnet.train configs/digits.yaml augment.extra=[examples.own_augmentation:tint]
"""

from torch import Tensor


def tint(images: Tensor, draws: Tensor, strength: float = 0.2) -> Tensor:
    """Add to each channel of each image a number of its own.

    Args:
        images: float32 (N, 3, H, W), normalised.
        draws: float32 (N, lanes) in [0, 1): functions of (seed, step, sample).
    """
    return images + (strength * (2 * draws - 1))[:, :, None, None]


tint.lanes = 3  # type: ignore[attr-defined]  # random numbers an image, by default 4
