"""Random choices and augmentation of a batch on a CPU, each in one pass.

torch takes some 60 operations for them, 0.6 ms at batch 32. The results are the same, bit for bit;
only behind the last whole vector of a tensor torch rounds mixup's sums once more.
`by_torch` of `augment.ChoiceDrawer` and `augment.Augmenter` are the definitions.
"""

import ctypes
import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.native.build import load

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_FLOAT = ctypes.c_float
_CHOICES: list[Any] = [
    _POINTER, _POINTER, *[_COUNT] * 4, _POINTER, _COUNT, _COUNT, _FLOAT, *[_POINTER] * 4,
]  # fmt: skip
_AUGMENT: list[Any] = [
    *[_POINTER] * 3, *[_COUNT] * 3, _POINTER, _POINTER, _COUNT, *[_POINTER] * 3, _COUNT,
    *[_POINTER] * 4, ctypes.c_int,
]  # fmt: skip


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can take `tensor`: on a CPU, compiled already or now."""
    return tensor.device.type == "cpu" and _library() is not None


def draw_choices(
    key: Tensor,
    samples: Tensor,
    shifts: int,
    cut: tuple[int, int],
    quantiles: Tensor | None,
    features: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The choices of N images, all that `augment.ChoiceDrawer` draws.

    Args:
        shifts: places of the crop in a direction; 0: no crop.
        cut: height and width of the images; (0, 0): no cutout.
        quantiles: of mixup's weight, float32 (65,536,); None: no mixup.
        features: that dropout drops with this probability; may be 0.

    Returns:
        int64 (5, N), rows of top, left, cut_top, cut_left, partner; bool (N,), flip; float32, lam;
        float32 (N, features), keep. What is off has no meaning.
    """
    assert key.dtype == samples.dtype == torch.int64
    samples = samples.contiguous()
    count = len(samples)
    integers, flip = torch.empty(5, count, dtype=torch.int64), torch.empty(count, dtype=torch.bool)
    lam, keep = torch.empty(()), torch.empty(count, features)
    _required().draw_choices(
        key.data_ptr(),
        samples.data_ptr(),
        count,
        shifts,
        *cut,
        _address(quantiles),
        features,
        round(dropout * (1 << 32)),
        1 / (1 - dropout),
        integers.data_ptr(),
        flip.data_ptr(),
        lam.data_ptr(),
        keep.data_ptr(),
    )
    return integers, flip, lam, keep


def augment(
    images: Tensor,
    crop: tuple[Tensor, Tensor, int] | None,
    flip: Tensor | None,
    cutout: tuple[Tensor, Tensor, int] | None,
    mixup: tuple[Tensor, Tensor] | None,
    mean: Tensor,
    scale: Tensor,
) -> Tensor:
    """Crop, flip, normalise, cut out, mix up: uint8 (N, H, W, 3) to float32 (N, 3, H, W).

    Args:
        crop: rows and columns of the padded images, int64 (N,), and the padding.
        flip: bool (N,).
        cutout: centre rows and columns, int64 (N,), and the side.
        mixup: partners, int64 (N,), and the weight, float32.
        mean, scale: float32 (3 W,).

    Returns:
        In channels-last order.
    """
    assert images.dtype == torch.uint8
    count, height, width, _ = images.shape
    images = images.contiguous()
    cropped, out = torch.empty_like(images), torch.empty(images.shape)
    top, left, padding = crop or (None, None, 0)
    cut_top, cut_left, side = cutout or (None, None, 0)
    partner, lam = mixup or (None, None)
    _required().augment(
        images.data_ptr(),
        cropped.data_ptr(),
        out.data_ptr(),
        count,
        height,
        width,
        _address(top),
        _address(left),
        padding,
        _address(flip),
        _address(cut_top),
        _address(cut_left),
        side,
        _address(partner),
        _address(lam),
        mean.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return out.permute(0, 3, 1, 2)


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _required() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask usable() first"
    return library


@cache
def _library() -> ctypes.CDLL | None:
    # An x86 processor without fused products and sums would call a function for each.
    if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return None
    try:
        library = load("batch")
    except UserError:  # torch's operations do the same, slower
        return None
    library.draw_choices.argtypes, library.augment.argtypes = _CHOICES, _AUGMENT
    library.draw_choices.restype = library.augment.restype = None
    return library
