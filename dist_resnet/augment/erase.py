"""Rectangles that are set to the mean: cutout and random erasing, of (N, 3, H, W)."""

import math

import torch
from torch import Tensor

from dist_resnet.base.randomness import whole_below

_ATTEMPTS = 10  # as torchvision: if no rectangle fits, the image stays whole


def cutout(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """Zero the square of `side` pixels around (top, left), clipped, in each of (N, 3, H, W)."""
    return _fill(images, top - side // 2, left - side // 2, side, side)


def erasing(
    images: Tensor,
    draws: Tensor,
    probability: float = 0.5,
    smallest: float = 0.02,
    largest: float = 0.33,
) -> Tensor:
    """Zero a random rectangle of some images (Zhong et al. 2017).

    Args:
        images: float32 (N, 3, H, W), normalised, so that 0 is the training set's mean.
        draws: float32 (N, 23) in [0, 1).
        probability: of an image to lose a rectangle.
        smallest, largest: share of the image's area; its ratio of height to width is between 0.3
            and 1 / 0.3, both as torchvision's RandomErasing has them.
    """
    height, width = images.shape[2:]
    box, there = rectangles(draws[:, 1:], height, width, smallest, largest)
    there = there & (draws[:, 0] < probability)
    top, left, rows, columns = box.unbind(1)
    return _fill(images, top, left, torch.where(there, rows, 0).unsqueeze(1), columns.unsqueeze(1))


erasing.lanes = 3 + 2 * _ATTEMPTS  # type: ignore[attr-defined]


def rectangles(
    draws: Tensor, height: int, width: int, smallest: float, largest: float
) -> tuple[Tensor, Tensor]:
    """Random erasing's rectangles.

    Args:
        draws: float32 (N, 22): the place, and area and ratio of ten attempts.

    Returns:
        int64 (N, 4), rows of top, left, height and width; bool (N,), whether an attempt fits.
    """
    # In double precision, where the last bit of an exponential cannot change a whole number.
    area, ratio = draws[:, 2:].double().chunk(2, dim=1)
    root = (height * width * (smallest + (largest - smallest) * area)).sqrt()
    low, high = math.log(0.3), math.log(3.3)
    stretch = (0.5 * (low + (high - low) * ratio)).exp()
    rows, columns = (root * stretch).round().long(), (root / stretch).round().long()
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    rows, columns = rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0]
    top = whole_below(draws[:, 0], height - rows + 1)
    left = whole_below(draws[:, 1], width - columns + 1)
    return torch.stack([top, left, rows, columns], dim=1), fits.any(dim=1)


def _fill(
    images: Tensor, top: Tensor, left: Tensor, rows: int | Tensor, columns: int | Tensor
) -> Tensor:
    """Zero the pixels from (top, left), int64 (N,), on; sizes are numbers or int64 (N, 1)."""
    height, width = images.shape[2:]

    def inside(first: Tensor, size: int | Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - first.unsqueeze(1)
        return (offset >= 0) & (offset < size)

    hole = inside(top, rows, height).unsqueeze(2) & inside(left, columns, width).unsqueeze(1)
    # By rows of pixels: masked as (N, 3, H, W), the result would no longer be channels-last.
    return images.permute(0, 2, 3, 1).masked_fill(hole.unsqueeze(3), 0.0).permute(0, 3, 1, 2)
