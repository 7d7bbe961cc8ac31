"""Convolution, BatchNorm, addition and ReLU on a GPU, made for few channels and small images.

cuDNN's kernels for these sizes fill a fraction of their tiles: a step of ResNet-20 at batch 32 has
62 of them, of 4 to 10 us each on an H100. Here a program multiplies a tile of pixels by the
filters, tap by tap, and leaves the sums that BatchNorm needs; those of weight gradients are added
up by whichever program comes last, in a fixed order, so that equal inputs give equal bits.

Shapes: R replicas of N images; x is (R N, C, H, W) and z (R N, K, H', W') in channels-last order,
the weight (K, C, S, S) likewise.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dist_resnet.kernels import norm_act

TYPES = (torch.bfloat16, torch.float16)
MAX_CHANNELS = 128
_PROGRAMS = 256  # of a convolution, about
_TAP_PROGRAMS = 256  # of a weight gradient, over all taps


def accepts(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None, replicas: int) -> bool:
    """Whether the kernels are made for this layer in training."""
    channels, filters = conv.in_channels, conv.out_channels
    size, stride = conv.kernel_size[0], conv.stride[0]
    small = channels <= MAX_CHANNELS and filters <= MAX_CHANNELS and filters >= 16
    square = x.dim() == 4 and conv.kernel_size == (size, size) and size in (1, 3)
    plain = conv.groups == 1 and conv.bias is None and conv.padding == (size // 2, size // 2)
    rows = x.shape[0] * (-(-x.shape[2] // stride)) * (-(-x.shape[3] // stride))
    return (
        small
        and square
        and plain
        and conv.stride == (stride, stride)
        and conv.dilation == (1, 1)
        and conv.weight.dtype in TYPES
        and x.shape[0] % replicas == 0
        and rows > replicas
        and (shortcut is None or shortcut.dtype == conv.weight.dtype)
    )


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    x: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    replicas: int,
) -> Tensor:
    """relu(norm(conv(x)) + shortcut), as `norm_act.norm_act` of the convolution.

    Args:
        x, shortcut: what `accepts` takes; x is cast to the weight's type.

    Returns:
        (R N, K, H', W'), channels-last, of the weight's type.
    """
    settings = (norm.running_mean, norm.running_var, norm.momentum, norm.eps, relu, replicas)
    x = x.to(conv.weight.dtype)
    result: Tensor = _ConvNormAct.apply(
        x, shortcut, conv.weight, conv.stride[0], norm.weight, norm.bias, *settings
    )
    return result


class _ConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        stride: int,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        relu: bool,
        replicas: int,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        z, parts, geometry = convolve(x, weight, stride, running_mean, replicas)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        y, batch = norm_act.normalise(
            z, shortcut, parts, geometry, gamma, beta, running_mean, running_var, momentum, eps,
            relu, replicas,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, z, y if shortcut is not None else None, gamma, beta, batch)
        ctx.stride, ctx.relu, ctx.replicas = stride, relu, replicas
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z, y, gamma, beta, batch = ctx.saved_tensors
        dz, dshortcut, dbeta, dgamma = norm_act.gradients(
            dy, z, y, gamma, beta, batch, ctx.relu, ctx.replicas
        )
        dx = input_gradient(dz, weight, x, ctx.stride) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(dz, x, weight, ctx.stride) if ctx.needs_input_grad[2] else None
        return dx, dshortcut, dw, None, dgamma, dbeta, *([None] * 6)


def _tiles(rows: int, filters: int, groups: int) -> tuple[int, int, int, int]:
    """Pixels and filters of a tile, pixels of a program, and programs along the pixels."""
    block_n = min(triton.next_power_of_2(filters), 64)
    block_m = 128
    while block_m > 32 and triton.cdiv(rows, block_m) * groups < 128:
        block_m //= 2
    if triton.cdiv(rows, block_m) * groups < 128 and block_n > 32:
        block_n = 32
    blocks = triton.cdiv(rows, block_m)
    span = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // groups))) * block_m
    return block_m, block_n, span, triton.cdiv(rows, span)


def convolve(
    x: Tensor, weight: Tensor, stride: int, origin: Tensor | None, replicas: int
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The convolution, and what BatchNorm needs of it.

    Args:
        origin: float32 (K,): near the mean, so that squares of deviations do not cancel.

    Returns:
        z; parts, float32 (R, P, 2, K), mean and squared deviations of P programs' rows; and the
        rows of a program and P.
    """
    count, channels, height, width = x.shape
    filters, _, size, _ = weight.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    rows = count // replicas * out_height * out_width
    z = torch.empty(
        (count, filters, out_height, out_width), dtype=weight.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    block_m, block_n, span, programs = _tiles(rows, filters, replicas)
    parts = torch.empty(replicas, programs, 2, filters, device=x.device)
    _convolve[(programs, triton.cdiv(filters, block_n), replicas)](
        x, weight, z, origin, parts, rows, span, programs, height, width, out_height, out_width,
        CHANNELS=channels, PADDED=max(16, triton.next_power_of_2(channels)), FILTERS=filters,
        SIZE=size, STRIDE=stride, TRANSPOSED=False, MOMENTS=True, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return z, parts, (span, programs)


def input_gradient(dz: Tensor, weight: Tensor, x: Tensor, stride: int) -> Tensor:
    """The gradient of the convolution's input, like `x`."""
    count, channels, height, width = x.shape
    filters, _, size, _ = weight.shape
    dx, rows = torch.empty_like(x), count * height * width
    block_m, block_n, span, programs = _tiles(rows, channels, 1)
    _convolve[(programs, triton.cdiv(channels, block_n), 1)](
        dz, weight, dx, None, None, rows, span, programs, dz.shape[2], dz.shape[3], height, width,
        CHANNELS=filters, PADDED=max(16, triton.next_power_of_2(filters)), FILTERS=channels,
        SIZE=size, STRIDE=stride, TRANSPOSED=True, MOMENTS=False, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return dx


def weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The gradient of the convolution's weight, like `weight`."""
    count, channels, height, width = x.shape
    filters, _, size, _ = weight.shape
    out_height, out_width = dz.shape[2:]
    rows, taps = count * out_height * out_width, size * size
    block = 64
    blocks = triton.cdiv(rows, block)
    span = triton.cdiv(blocks, max(1, min(blocks, _TAP_PROGRAMS // taps))) * block
    programs = triton.cdiv(rows, span)
    padded = max(16, triton.next_power_of_2(channels))
    padded_filters = max(16, triton.next_power_of_2(filters))
    parts = torch.empty(taps, programs, padded_filters, padded, device=x.device)
    dw = torch.empty_like(weight)
    _weight_gradient[(programs, taps)](
        dz, x, dw, parts, _counters(x.device), rows, span, programs, height, width, out_height,
        out_width, CHANNELS=channels, PADDED=padded, FILTERS=filters,
        PADDED_FILTERS=padded_filters, SIZE=size, STRIDE=stride, BLOCK=block,
    )  # fmt: skip
    return dw


_KEPT_COUNTERS: dict[torch.device, Tensor] = {}


def _counters(device: torch.device) -> Tensor:
    """int32 (9,): programs that have left their part, by tap; each launch leaves zeros."""
    if device not in _KEPT_COUNTERS:
        _KEPT_COUNTERS[device] = torch.zeros(9, dtype=torch.int32, device=device)
    return _KEPT_COUNTERS[device]


@triton.jit
def _convolve(
    x, weight, z, origin, parts, rows, span, programs, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, FILTERS: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z = conv(x), or, TRANSPOSED, the gradient of x from that of z, with the names exchanged."""
    program, replica = tl.program_id(0), tl.program_id(2)
    channel = tl.arange(0, PADDED)
    filter_ = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, wanted = channel < CHANNELS, filter_ < FILTERS
    first, last = program * span, tl.minimum(program * span + span, rows)
    if MOMENTS:
        shift = tl.load(origin + filter_, mask=wanted, other=0.0)
        sums, squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        there = row < last
        place = replica * rows + row
        column, line = place % out_width, place // out_width % out_height
        image = place // (out_width * out_height)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tap in range(SIZE * SIZE):
            if TRANSPOSED:
                down = line + SIZE // 2 - tap // SIZE
                across = column + SIZE // 2 - tap % SIZE
                inside = there & (down % STRIDE == 0) & (across % STRIDE == 0)
                inside = inside & (down >= 0) & (across >= 0)
                down, across = down // STRIDE, across // STRIDE
                taken = channel[:, None] * (SIZE * SIZE * FILTERS) + filter_[None, :]
                taken += tap * FILTERS
            else:
                down = line * STRIDE - SIZE // 2 + tap // SIZE
                across = column * STRIDE - SIZE // 2 + tap % SIZE
                inside = there & (down >= 0) & (across >= 0)
                taken = filter_[None, :] * (SIZE * SIZE * CHANNELS) + channel[:, None]
                taken += tap * CHANNELS
            inside = inside & (down < height) & (across < width)
            at = ((image * height + down) * width + across).to(tl.int64) * CHANNELS
            pixels = tl.load(
                x + at[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
            )
            factors = tl.load(weight + taken, mask=known[:, None] & wanted[None, :], other=0.0)
            total = tl.dot(pixels, factors, total, input_precision="ieee")
        values = total.to(z.dtype.element_ty)
        mask = there[:, None] & wanted[None, :]
        tl.store(z + place.to(tl.int64)[:, None] * FILTERS + filter_[None, :], values, mask=mask)
        if MOMENTS:
            deviation = tl.where(mask, values.to(tl.float32) - shift[None, :], 0.0)
            sums += tl.sum(deviation, 0)
            squares += tl.sum(deviation * deviation, 0)
    if MOMENTS:
        mean = sums / (last - first).to(tl.float32)
        parts += (replica * programs + program) * 2 * FILTERS + filter_
        tl.store(parts, shift + mean, mask=wanted)
        tl.store(parts + FILTERS, squares - sums * mean, mask=wanted)


@triton.jit
def _weight_gradient(
    dz, x, dw, parts, counters, rows, span, programs, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, FILTERS: tl.constexpr,
    PADDED_FILTERS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tap's gradient over one program's pixels; the last program adds all programs' up."""
    program, tap = tl.program_id(0), tl.program_id(1)
    channel, filter_ = tl.arange(0, PADDED), tl.arange(0, PADDED_FILTERS)
    known, wanted = channel < CHANNELS, filter_ < FILTERS
    first, last = program * span, tl.minimum(program * span + span, rows)
    total = tl.zeros((PADDED_FILTERS, PADDED), tl.float32)
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < last
        column, line = place % out_width, place // out_width % out_height
        image = place // (out_width * out_height)
        down = line * STRIDE - SIZE // 2 + tap // SIZE
        across = column * STRIDE - SIZE // 2 + tap % SIZE
        inside = there & (down >= 0) & (across >= 0) & (down < height) & (across < width)
        at = ((image * height + down) * width + across).to(tl.int64) * CHANNELS
        pixels = tl.load(
            x + at[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        slopes = tl.load(
            dz + place.to(tl.int64)[None, :] * FILTERS + filter_[:, None],
            mask=there[None, :] & wanted[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(slopes, pixels, total, input_precision="ieee")
    cell = filter_[:, None] * PADDED + channel[None, :]
    parts += tap * programs * PADDED_FILTERS * PADDED
    tl.store(parts + program * PADDED_FILTERS * PADDED + cell, total)
    tl.debug_barrier()  # all of the program's values are out before it is counted
    if tl.atomic_add(counters + tap, 1, sem="acq_rel") == programs - 1:
        total = tl.zeros((PADDED_FILTERS, PADDED), tl.float32)
        for other in range(0, programs):
            total += tl.load(parts + other * PADDED_FILTERS * PADDED + cell, cache_modifier=".cg")
        at = (filter_[:, None] * (SIZE * SIZE) + tap) * CHANNELS + channel[None, :]
        values = total.to(dw.dtype.element_ty)
        tl.store(dw + at, values, mask=wanted[:, None] & known[None, :])
        tl.store(counters + tap, 0)
