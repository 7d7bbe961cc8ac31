"""What pixels are normalised by: the training set's own statistics, ImageNet's, or given ones."""

from typing import Any

from dist_resnet.data.content import Channels
from dist_resnet.data.dataset import Dataset

# Of RGB in 0..1, as torchvision's reference training has them.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def channel_scale(chosen: list[Any] | str, dataset: Dataset) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel on the scale 0 to 255.

    Args:
        chosen: `data.normalisation`.
    """
    if chosen == "dataset":
        return dataset.mean, dataset.std
    mean, std = IMAGENET if isinstance(chosen, str) else chosen
    return _to_255(mean), _to_255(std)


def _to_255(values: Any) -> Channels:
    red, green, blue = (255 * float(value) for value in values)
    return red, green, blue
