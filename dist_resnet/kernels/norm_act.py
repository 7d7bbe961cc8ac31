"""BatchNorm, addition of a shortcut and ReLU on a GPU, for the replicas of one pass side by side.

Two kernels a direction: each program sums a part of the rows, then each combines the parts it needs
and writes. No atomic operation, so equal inputs give equal bits. PyTorch's separate operations take
3 to 5 launches forward and as many backward, and read or write an activation half as often again.

Shapes: R replicas of N images; an activation is (R N, C, H, W) in channels-last order, so that a
replica's is M = N H W rows of C contiguous values. P programs share a replica's rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 1024
_TILE = 4096  # values a program holds of a tensor at a time
_PROGRAMS = 256  # of a launch, at most, where there are fewer replicas


def accepts(x: Tensor, shortcut: Tensor | None, replicas: int) -> bool:
    """Whether the kernels are made for `x`, (R N, C, H, W), and a shortcut like it."""
    return (
        x.dtype in TYPES
        and x.dim() == 4
        and x.shape[1] <= MAX_CHANNELS
        and x.shape[0] % replicas == 0
        and x.numel() > x.shape[1] * replicas  # one value a channel has no variance
        and (shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape))
    )


def norm_act(
    norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool, replicas: int
) -> Tensor:
    """relu(norm(x) + shortcut), each replica with its own batch statistics.

    The running statistics become the sum over the replicas of what each alone would leave.

    Args:
        norm: with float32 parameters and statistics, all four of them there.
        x, shortcut: what `accepts` takes; a shortcut only with `relu`.

    Returns:
        Like x, in channels-last order.
    """
    settings = (norm.running_mean, norm.running_var, norm.momentum, norm.eps, relu, replicas)
    result: Tensor = _NormAct.apply(x, shortcut, norm.weight, norm.bias, *settings)
    return result


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        relu: bool,
        replicas: int,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        cut = _Cut(x, replicas)
        parts = torch.empty(replicas, cut.programs, 2, cut.channels, device=x.device)
        _moments[cut.grid](x, parts, *cut.sizes, **cut.constants)
        y, batch = normalise(
            x, shortcut, parts, (cut.span, cut.programs), weight, bias, running_mean, running_var,
            momentum, eps, relu, replicas,
        )  # fmt: skip
        ctx.save_for_backward(x, y if shortcut is not None else None, weight, bias, batch)
        ctx.relu, ctx.replicas = relu, replicas
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, batch = ctx.saved_tensors
        dx, dshortcut, dbias, dweight = gradients(
            dy, x, y, weight, bias, batch, ctx.relu, ctx.replicas
        )
        return dx, dshortcut, dweight, dbias, *([None] * 6)


def normalise(
    x: Tensor,
    shortcut: Tensor | None,
    parts: Tensor,
    geometry: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
    replicas: int,
) -> tuple[Tensor, Tensor]:
    """The forward pass behind the sums.

    Args:
        parts: float32 (R, P, 2, C): mean and squared deviations of P parts of a replica's rows.
        geometry: rows of a part, and P.

    Returns:
        The result, and each replica's mean and inverse deviation, float32 (R, 2, C).
    """
    cut = _Cut(x, replicas)
    y, batch = torch.empty_like(x), torch.empty(replicas, 2, cut.channels, device=x.device)
    moved = torch.empty_like(batch)
    _normalise[cut.grid](
        x, shortcut, y, parts, weight, bias, running_mean, running_var, batch, moved,
        momentum, eps, *cut.sizes, *geometry, RELU=relu, ADD=shortcut is not None,
        **cut.constants, PARTS=triton.next_power_of_2(geometry[1]), ALONE=replicas == 1,
    )  # fmt: skip
    if replicas > 1:
        _add_replicas(moved, running_mean, running_var)
    return y, batch


def gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    batch: Tensor,
    relu: bool,
    replicas: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward pass: gradients of x, of the shortcut (where y is given), of bias and weight."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    cut, add = _Cut(x, replicas), y is not None
    parts = torch.empty(replicas, cut.programs, 2, cut.channels, device=x.device)
    dx, each = torch.empty_like(x), torch.empty_like(batch)
    dshortcut = torch.empty_like(x) if add else None
    _gradient_sums[cut.grid](
        dy, x, y, weight, bias, batch, parts, *cut.sizes, RELU=relu, ADD=add, **cut.constants
    )
    _gradients[cut.grid](
        dy, x, y, weight, bias, batch, parts, dx, dshortcut, each, *cut.sizes,
        RELU=relu, ADD=add, **cut.constants, PROGRAMS=triton.next_power_of_2(cut.programs),
    )  # fmt: skip
    total = each[0]
    if replicas > 1:
        total = torch.empty_like(total)
        _add_replicas(each, total[0], total[1])
    return dx, dshortcut, total[0], total[1]


def _add_replicas(each: Tensor, first: Tensor, second: Tensor) -> None:
    """Sum both rows of float32 (R, 2, C) over the replicas, into float32 (C,) each."""
    replicas, _, channels = each.shape
    _sum_rows[(triton.cdiv(channels, 16), 2)](
        each, first, second, replicas, channels, REPLICAS=triton.next_power_of_2(replicas), BLOCK=16
    )


class _Cut:
    """How the rows of an activation are cut among programs."""

    def __init__(self, x: Tensor, replicas: int) -> None:
        self.replicas, self.channels = replicas, x.shape[1]
        rows = x.numel() // (self.channels * replicas)
        padded = triton.next_power_of_2(self.channels)
        block = max(1, min(_TILE // padded, triton.next_power_of_2(rows)))
        blocks = triton.cdiv(rows, block)
        self.span = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // replicas))) * block
        self.programs = triton.cdiv(rows, self.span)
        self.grid = (self.programs, replicas)
        self.sizes = (rows, self.span, self.programs, replicas)
        self.constants = {"CHANNELS": self.channels, "PADDED": padded, "BLOCK": block}


@triton.jit
def _moments(
    x, parts, rows, span, programs, replicas,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared deviations from it, of one program's rows: (2, C) of `parts`.

    Deviations are taken from the program's first row: squares of the values themselves would cancel
    where a mean is large beside its deviation.
    """
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    first, last = program * span, tl.minimum(program * span + span, rows)
    x += replica.to(tl.int64) * rows * CHANNELS
    origin = tl.load(x + first.to(tl.int64) * CHANNELS + channel, mask=inside, other=0.0)
    origin = origin.to(tl.float32)
    sums = tl.zeros((BLOCK, PADDED), tl.float32)
    squares = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, values - origin[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, 0)
    parts += (replica * programs + program) * 2 * CHANNELS + channel
    tl.store(parts, origin + total / count, mask=inside)
    tl.store(parts + CHANNELS, tl.sum(squares, 0) - total * (total / count), mask=inside)


@triton.jit
def _combined(
    parts, rows, span, programs, channel, inside,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of one replica from the parts of its rows (Chan et al. 1979)."""
    program = tl.arange(0, PARTS)
    mask = (program < programs)[:, None] & inside[None, :]
    at = program[:, None] * 2 * CHANNELS + channel[None, :]
    means = tl.load(parts + at, mask=mask, other=0.0)
    squares = tl.load(parts + at + CHANNELS, mask=mask, other=0.0)
    count = tl.minimum(tl.maximum(rows - program * span, 0), span).to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / rows
    apart = tl.where(mask, means - mean[None, :], 0.0)
    return mean, (tl.sum(squares, 0) + tl.sum(apart * apart * count, 0)) / rows


@triton.jit
def _normalise(
    x, shortcut, y, parts, weight, bias, running_mean, running_var, batch, moved,
    momentum, eps, rows, span, programs, replicas, part_span, part_count,
    RELU: tl.constexpr, ADD: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """The forward pass's second half; each replica's first program moves the running statistics."""
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own = parts + replica * part_count * 2 * CHANNELS
    mean, variance = _combined(own, rows, part_span, part_count, channel, inside, CHANNELS, PARTS)
    inverse = tl.rsqrt(variance + eps)
    if program == 0:
        tl.store(batch + replica * 2 * CHANNELS + channel, mean, mask=inside)
        tl.store(batch + replica * 2 * CHANNELS + CHANNELS + channel, inverse, mask=inside)
        old_mean = tl.load(running_mean + channel, mask=inside)
        old_variance = tl.load(running_var + channel, mask=inside)
        new_mean = (1 - momentum) * old_mean + momentum * mean
        new_variance = (1 - momentum) * old_variance + momentum * variance * (rows / (rows - 1))
        if ALONE:
            tl.store(running_mean + channel, new_mean, mask=inside)
            tl.store(running_var + channel, new_variance, mask=inside)
        else:  # summed afterwards: the other replicas start from the old ones
            tl.store(moved + replica * 2 * CHANNELS + channel, new_mean, mask=inside)
            tl.store(moved + replica * 2 * CHANNELS + CHANNELS + channel, new_variance, mask=inside)
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    first, last = program * span, tl.minimum(program * span + span, rows)
    base = replica.to(tl.int64) * rows * CHANNELS
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = base + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        values = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        if ADD:
            values += tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + at, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _unrectified(
    dy, x, y, at, mask, mean, inverse, scale, offset, RELU: tl.constexpr, ADD: tl.constexpr
):
    """What reaches BatchNorm's output, and its normalised input, for one tile."""
    gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    normal = (values - mean[None, :]) * inverse[None, :]
    if RELU:
        if ADD:
            result = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        else:
            result = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        gradient = tl.where(result <= 0, 0.0, gradient)
    return gradient, tl.where(mask, normal, 0.0)


@triton.jit
def _gradient_sums(
    dy, x, y, weight, bias, batch, parts, rows, span, programs, replicas,
    RELU: tl.constexpr, ADD: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a program's gradients, and of their products with the normalised input."""
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    mean = tl.load(batch + replica * 2 * CHANNELS + channel, mask=inside, other=0.0)
    inverse = tl.load(batch + replica * 2 * CHANNELS + CHANNELS + channel, mask=inside, other=0.0)
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    first, last = program * span, tl.minimum(program * span + span, rows)
    base = replica.to(tl.int64) * rows * CHANNELS
    sums = tl.zeros((BLOCK, PADDED), tl.float32)
    products = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = base + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        gradient, normal = _unrectified(dy, x, y, at, mask, mean, inverse, scale, offset, RELU, ADD)
        sums += gradient
        products += gradient * normal
    parts += (replica * programs + program) * 2 * CHANNELS + channel
    tl.store(parts, tl.sum(sums, 0), mask=inside)
    tl.store(parts + CHANNELS, tl.sum(products, 0), mask=inside)


@triton.jit
def _summed(parts, programs, channel, inside, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr):
    """One replica's two sums from its programs' parts."""
    program = tl.arange(0, PROGRAMS)
    mask = (program < programs)[:, None] & inside[None, :]
    at = program[:, None] * 2 * CHANNELS + channel[None, :]
    sums = tl.sum(tl.load(parts + at, mask=mask, other=0.0), 0)
    return sums, tl.sum(tl.load(parts + at + CHANNELS, mask=mask, other=0.0), 0)


@triton.jit
def _gradients(
    dy, x, y, weight, bias, batch, parts, dx, dshortcut, dparameters,
    rows, span, programs, replicas,
    RELU: tl.constexpr, ADD: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The backward pass's second half; each replica's first program writes sums of its own."""
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own = parts + replica * programs * 2 * CHANNELS
    sums, products = _summed(own, programs, channel, inside, CHANNELS, PROGRAMS)
    if program == 0:
        tl.store(dparameters + replica * 2 * CHANNELS + channel, sums, mask=inside)
        tl.store(dparameters + replica * 2 * CHANNELS + CHANNELS + channel, products, mask=inside)
    mean = tl.load(batch + replica * 2 * CHANNELS + channel, mask=inside, other=0.0)
    inverse = tl.load(batch + replica * 2 * CHANNELS + CHANNELS + channel, mask=inside, other=0.0)
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    first, last = program * span, tl.minimum(program * span + span, rows)
    base = replica.to(tl.int64) * rows * CHANNELS
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = base + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        gradient, normal = _unrectified(dy, x, y, at, mask, mean, inverse, scale, offset, RELU, ADD)
        result = gradient - (sums / rows)[None, :] - normal * (products / rows)[None, :]
        tl.store(dx + at, (result * scale[None, :]).to(dx.dtype.element_ty), mask=mask)
        if ADD:
            tl.store(dshortcut + at, gradient.to(dshortcut.dtype.element_ty), mask=mask)


@triton.jit
def _sum_rows(each, first, second, replicas, channels, REPLICAS: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    replica = tl.arange(0, REPLICAS)
    mask = (replica < replicas)[:, None] & (channel < channels)[None, :]
    at = (replica * 2 + tl.program_id(1))[:, None] * channels + channel[None, :]
    total = tl.sum(tl.load(each + at, mask=mask, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(first + channel, total, mask=channel < channels)
    else:
        tl.store(second + channel, total, mask=channel < channels)
