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
from torch import Tensor, nn

from dist_resnet.kernels import norm_act_kernels as kernels

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 1024
_TILE = 4096  # values a program holds of a tensor at a time
_PROGRAMS = 256  # of a launch, at most, where there are fewer replicas
# Values of the other programs' parts that a program holds. With four times as many it would spill
# its registers to memory, and compile for minutes.
_HELD = 16384


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
    result: Tensor = _NormAct.apply(x, shortcut, norm.weight, norm.bias, norm, relu, replicas)
    return result


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        norm: nn.BatchNorm2d,
        relu: bool,
        replicas: int,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        cut = _Cut(x, replicas)
        parts = torch.empty(replicas, cut.programs, 2, cut.channels, device=x.device)
        kernels.moments[cut.grid](x, parts, *cut.sizes, **cut.constants)
        y, batch = normalise(x, shortcut, parts, cut.span, norm, relu)
        ctx.save_for_backward(x, y if shortcut is not None else None, weight, bias, batch)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, batch = ctx.saved_tensors
        dx, dshortcut, dbias, dweight = gradients(dy, x, y, weight, bias, batch, ctx.relu)
        return dx, dshortcut, dweight, dbias, None, None, None


def normalise(
    x: Tensor,
    shortcut: Tensor | None,
    parts: Tensor,
    span: int,
    norm: nn.BatchNorm2d,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass behind the sums.

    Args:
        parts: float32 (R, P, 2, C): mean and squared deviations of P parts of a replica's rows.
        span: rows of a part.

    Returns:
        The result, and each replica's mean and inverse deviation, float32 (R, 2, C).
    """
    replicas, count = parts.shape[:2]
    cut = _Cut(x, replicas)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    y, batch = torch.empty_like(x), torch.empty(replicas, 2, cut.channels, device=x.device)
    moved = torch.empty_like(batch)
    kernels.normalise[cut.grid](
        x, shortcut, y, parts, norm.weight, norm.bias, norm.running_mean, norm.running_var, batch,
        moved, norm.momentum, norm.eps, *cut.sizes, span, count, RELU=relu,
        ADD=shortcut is not None, **cut.constants, PARTS=triton.next_power_of_2(count),
        ALONE=replicas == 1,
    )  # fmt: skip
    if replicas > 1:
        _add_replicas(moved, norm.running_mean, norm.running_var)
    return y, batch


def gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    batch: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward pass: gradients of x, of the shortcut (where y is given), of bias and weight."""
    replicas = len(batch)
    dy = dy.contiguous(memory_format=torch.channels_last)
    cut, add = _Cut(x, replicas), y is not None
    parts = torch.empty(replicas, cut.programs, 2, cut.channels, device=x.device)
    dx, each = torch.empty_like(x), torch.empty_like(batch)
    dshortcut = torch.empty_like(x) if add else None
    kernels.gradient_sums[cut.grid](
        dy, x, y, weight, bias, batch, parts, *cut.sizes, RELU=relu, ADD=add, **cut.constants
    )
    kernels.gradients[cut.grid](
        dy, x, y, weight, bias, batch, parts, dx, dshortcut, each, *cut.sizes,
        RELU=relu, ADD=add, **cut.constants, PROGRAMS=triton.next_power_of_2(cut.programs),
    )  # fmt: skip
    total = each[0]
    if replicas > 1:
        total = torch.empty_like(total)
        _add_replicas(each, total[0], total[1])
    return dx, dshortcut, total[0], total[1]


def most_programs(channels: int, replicas: int) -> int:
    """Into how many parts a replica's rows are cut, where each program later reads all parts."""
    return max(1, min(_PROGRAMS // replicas, _HELD // triton.next_power_of_2(channels)))


def _add_replicas(each: Tensor, first: Tensor | None, second: Tensor | None) -> None:
    """Sum both rows of float32 (R, 2, C) over the replicas, into float32 (C,) each."""
    replicas, _, channels = each.shape
    kernels.sum_rows[(triton.cdiv(channels, 16), 2)](
        each, first, second, replicas, channels, REPLICAS=triton.next_power_of_2(replicas), BLOCK=16
    )


class _Cut:
    """How the rows of an activation are cut among programs."""

    def __init__(self, x: Tensor, replicas: int) -> None:
        self.channels = x.shape[1]
        rows = x.numel() // (self.channels * replicas)
        padded = triton.next_power_of_2(self.channels)
        block = max(1, min(_TILE // padded, triton.next_power_of_2(rows)))
        blocks = triton.cdiv(rows, block)
        self.span = triton.cdiv(blocks, min(blocks, most_programs(padded, replicas))) * block
        self.programs = triton.cdiv(rows, self.span)
        self.grid = (self.programs, replicas)
        self.sizes = (rows, self.span, self.programs)
        self.constants = {"CHANNELS": self.channels, "PADDED": padded, "BLOCK": block}
