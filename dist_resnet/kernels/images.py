"""Random choices and augmentation on a GPU: two launches in place of 56.

`by_torch` of `augment.ChoiceDrawer` and `augment.Augmenter` are the definitions: the choices have
the same bits, the images the same values but for the last bit of mixup's products.

Shapes: R replicas of N images, H W pixels, F features under dropout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SAMPLES = 64  # that one program draws for
_PIXELS = 1024  # values that one program makes
_DROPOUT_LANE = tl.constexpr(7)


def draw_choices(
    key: Tensor,
    samples: Tensor,
    replicas: int,
    shifts: int,
    cut: tuple[int, int],
    quantiles: Tensor | None,
    features: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The choices of R N images, each replica's as if it were drawn alone.

    Args:
        key: int64, 0-dimensional, of the step.
        samples: int64 (R N,).
        shifts: places of the crop in a direction; 0: no crop.
        cut: height and width of the images; (0, 0): no cutout.
        quantiles: of mixup's weight, float32 (65,536,); None: no mixup.
        features: that dropout drops with this probability; may be 0.

    Returns:
        int64 (5, R N), rows of top, left, cut_top, cut_left and partner (a place among all R N);
        bool (R N,), flip; float32 (R,), lam; float32 (R N, F), keep. What is off has no meaning.
    """
    total = len(samples)
    count = total // replicas
    integers = samples.new_empty(5, total)
    flip = samples.new_empty(total, dtype=torch.bool)
    lam = samples.new_empty(replicas, dtype=torch.float32)
    keep = samples.new_empty(total, features, dtype=torch.float32)
    _draw[(triton.cdiv(count, _SAMPLES), replicas)](
        key, samples, quantiles, integers, flip.view(torch.uint8), lam, keep, count, total,
        shifts, *cut, features, round(dropout * (1 << 32)), 1 / (1 - dropout),
        MIXUP=quantiles is not None, BLOCK=_SAMPLES, LANES=triton.next_power_of_2(max(features, 1)),
    )  # fmt: skip
    return integers, flip, lam, keep


def augment(
    images: Tensor,
    crop: tuple[Tensor, Tensor, int] | None,
    flip: Tensor | None,
    cutout: tuple[Tensor, Tensor, int] | None,
    mixup: tuple[Tensor, Tensor] | None,
    mean: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Crop, flip, cutout, normalisation and mixup: uint8 (R N, H, W, 3) to (R N, 3, H, W).

    Args:
        crop, cutout: rows, columns, and the padding or the side.
        mixup: partner, a place among all images, and each replica's weight.
        mean, scale: float32 (3 W,), as `augment.Normalisation`.
        dtype: of the result, which is in channels-last order.
    """
    images = images.contiguous()
    count, height, width, channels = images.shape
    result = torch.empty(images.shape, dtype=dtype, device=images.device)
    top, left, padding = crop or (None, None, 0)
    cut_top, cut_left, side = cutout or (None, None, 0)
    partner, lam = mixup or (None, None)
    per_replica = count if lam is None else count // lam.numel()
    _augment[(count, triton.cdiv(height * width * channels, _PIXELS))](
        images, result, top, left, None if flip is None else flip.view(torch.uint8), cut_top,
        cut_left, partner, lam, mean, scale, height, width, padding, side, per_replica,
        CROP=crop is not None, FLIP=flip is not None, CUT=cutout is not None,
        MIX=mixup is not None, BLOCK=_PIXELS,
    )  # fmt: skip
    return result.permute(0, 3, 1, 2)


@triton.jit
def _splitmix(state, index):
    """`randomness.splitmix64` on unsigned 64-bit integers."""
    bits = state + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _lane(state, lane):
    """A draw in [0, 2^32): the upper half of output `lane`."""
    return (_splitmix(state, lane) >> 32).to(tl.int64)


@triton.jit
def _draw(
    key, samples, quantiles, integers, flip, lam, keep, count, total, shifts, height, width,
    features, dropped, kept_factor,
    MIXUP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The choices of BLOCK images of a replica; its first program draws lam too."""
    replica = tl.program_id(1)
    start = replica * count
    root = tl.load(key).to(tl.uint64)
    zero = tl.zeros((BLOCK,), tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    at = start + place
    state = _splitmix(root, tl.load(samples + at, mask=there, other=0))
    tl.store(integers + at, (_lane(state, zero) * shifts) >> 32, mask=there)
    tl.store(integers + total + at, (_lane(state, zero + 1) * shifts) >> 32, mask=there)
    tl.store(flip + at, (_lane(state, zero + 2) < 2147483648).to(tl.uint8), mask=there)
    tl.store(integers + 2 * total + at, (_lane(state, zero + 3) * height) >> 32, mask=there)
    tl.store(integers + 3 * total + at, (_lane(state, zero + 4) * width) >> 32, mask=there)
    if MIXUP:
        # The image drawn as number k, counted stably, is the partner of image k.
        own = _lane(state, zero + 5)
        rank = zero
        for other in range(0, count, BLOCK):
            position = other + tl.arange(0, BLOCK)
            present = position < count
            theirs = tl.load(samples + start + position, mask=present, other=0)
            draw = _lane(_splitmix(root, theirs), zero + 5)
            tie = (draw[None, :] == own[:, None]) & (position[None, :] < place[:, None])
            before = ((draw[None, :] < own[:, None]) | tie) & present[None, :]
            rank += tl.sum(before.to(tl.int64), 1)
        tl.store(integers + 4 * total + start + rank, at.to(tl.int64), mask=there)
        if tl.program_id(0) == 0:
            first = _splitmix(root, tl.load(samples + start))
            quantile = (_splitmix(first, tl.full((), 6, tl.int64)) >> 48).to(tl.int64)
            tl.store(lam + replica, tl.load(quantiles + quantile))
    if features > 0:
        feature = tl.arange(0, LANES)
        lanes = (feature + _DROPOUT_LANE).to(tl.int64)
        draws = _lane(state[:, None], lanes[None, :])
        factors = tl.where(draws >= dropped, kept_factor, 0.0)
        mask = there[:, None] & (feature < features)[None, :]
        tl.store(keep + at[:, None] * features + feature[None, :], factors, mask=mask)


@triton.jit
def _pixels(
    images, top, left, flip, cut_top, cut_left, mean, scale, image, row, column, channel, inside,
    height, width, padding, side, CROP: tl.constexpr, FLIP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Normalised values of one augmented image at (row, column, channel)."""
    from_row, from_column = row, column
    if FLIP:
        from_column = tl.where(tl.load(flip + image) != 0, width - 1 - column, column)
    there = inside
    if CROP:
        from_row += tl.load(top + image).to(tl.int32) - padding
        from_column += tl.load(left + image).to(tl.int32) - padding
        there = there & (from_row >= 0) & (from_row < height)
        there = there & (from_column >= 0) & (from_column < width)
    at = ((image.to(tl.int64) * height + from_row) * width + from_column) * 3 + channel
    value = tl.load(images + at, mask=there, other=0).to(tl.float32)
    value = value - tl.load(mean + column * 3 + channel, mask=inside, other=0.0)
    value = value * tl.load(scale + column * 3 + channel, mask=inside, other=0.0)
    if CUT:
        down = row - tl.load(cut_top + image).to(tl.int32) + side // 2
        across = column - tl.load(cut_left + image).to(tl.int32) + side // 2
        hole = (down >= 0) & (down < side) & (across >= 0) & (across < side)
        value = tl.where(hole, 0.0, value)
    return value


@triton.jit
def _augment(
    images, result, top, left, flip, cut_top, cut_left, partner, lam, mean, scale,
    height, width, padding, side, per_replica,
    CROP: tl.constexpr, FLIP: tl.constexpr, CUT: tl.constexpr, MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of one image."""
    image = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < height * width * 3
    row, column, channel = place // (width * 3), place // 3 % width, place % 3
    value = _pixels(
        images, top, left, flip, cut_top, cut_left, mean, scale, image, row, column, channel,
        inside, height, width, padding, side, CROP, FLIP, CUT,
    )  # fmt: skip
    if MIX:
        weight = tl.load(lam + image // per_replica)
        other = _pixels(
            images, top, left, flip, cut_top, cut_left, mean, scale,
            tl.load(partner + image).to(tl.int32), row, column, channel,
            inside, height, width, padding, side, CROP, FLIP, CUT,
        )  # fmt: skip
        difference = value - other  # as torch.lerp, which keeps both ends exact
        near, far = other + weight * difference, value - difference * (1 - weight)
        value = tl.where(weight < 0.5, near, far)
    at = image.to(tl.int64) * height * width * 3 + place
    tl.store(result + at, value.to(result.dtype.element_ty), mask=inside)
