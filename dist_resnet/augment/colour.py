"""Brightness and contrast."""

from torch import Tensor

from dist_resnet.augment.normalisation import Normalisation

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R 601-2), as torchvision has them."""


def jitter(
    images: Tensor,
    draws: Tensor,
    statistics: Normalisation,
    brightness: float = 0.0,
    contrast: float = 0.0,
) -> Tensor:
    """Scale each image's brightness, then its contrast, as torchvision's ColorJitter.

    Args:
        images: float32 (N, 3, H, W), normalised by `statistics`.
        draws: float32 (N, 2) in [0, 1).
        brightness, contrast: s: the factor is uniform between 1 - s and 1 + s.
    """
    mean, scale = (t[:3].view(3, 1, 1) for t in (statistics.mean, statistics.scale))
    lighter, stronger = (
        (1 + strength * (2 * draws[:, lane] - 1)).view(-1, 1, 1, 1)
        for lane, strength in enumerate((brightness, contrast))
    )
    pixels = ((images / scale + mean) * lighter).clamp(0, 255)
    red, green, blue = (weight * part for weight, part in zip(GREY, pixels.unbind(1), strict=True))
    # Summed as whole numbers, which have one sum whatever the size of the batch.
    total = ((red + green + blue) * 256).round().long().sum(dim=(1, 2))
    average = (total / (256.0 * images.shape[2] * images.shape[3])).view(-1, 1, 1, 1)
    pixels = (stronger * pixels + (1 - stronger) * average).clamp(0, 255)
    return (pixels - mean) * scale


jitter.lanes = 2  # type: ignore[attr-defined]
