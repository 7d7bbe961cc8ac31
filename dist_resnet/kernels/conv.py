"""Convolution, BatchNorm, addition and ReLU on a GPU, made for few channels and small images.

cuDNN's kernels for these sizes fill a fraction of their tiles: a step of ResNet-20 at batch 32 has
62 of them, of 4 to 10 us each on an H100. Here a program multiplies a tile of pixels by the
filters and leaves the sums that BatchNorm needs. No atomic operation: equal inputs give equal bits.

Shapes: R replicas of N images; x is (R N, C, H, W) and z (R N, K, H', W') in channels-last order,
the weight (K, C, S, S) likewise.
"""

from typing import Any

import torch
import triton
from torch import Tensor, nn

from dist_resnet.kernels import conv_kernels as kernels
from dist_resnet.kernels import norm_act, support

TYPES = (torch.bfloat16, torch.float16)
MAX_CHANNELS = 128
_FACTORS = 64  # of a result that are multiplied at a time
_PARTS = 264  # of a weight gradient, about: programs over pixels and factors
_CELLS = 4096  # values that a program adds up


def accepts(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None, replicas: int) -> bool:
    """Whether the kernels are made for this layer in training."""
    channels, filters = conv.in_channels, conv.out_channels
    size, stride = conv.kernel_size[0], conv.stride[0]
    small = channels <= MAX_CHANNELS and filters <= MAX_CHANNELS and filters >= 16
    square = x.dim() == 4 and conv.kernel_size == (size, size) and size in (1, 3)
    plain = conv.groups == 1 and conv.bias is None and conv.padding == (size // 2, size // 2)
    rows = x.shape[0] * (-(-x.shape[2] // stride)) * (-(-x.shape[3] // stride))
    return (
        support.multiplies(x.device)
        and small
        and square
        and plain
        and conv.stride == (stride, stride)
        and conv.dilation == (1, 1)
        and conv.weight.dtype in TYPES
        and x.shape[0] % replicas == 0
        and rows > replicas
        and x.numel() < 2**31
        and rows * filters < 2**31  # offsets are of 32 bits
        and (shortcut is None or shortcut.dtype == conv.weight.dtype)
    )


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    x: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    replicas: int,
) -> tuple[Tensor, Tensor]:
    """relu(norm(conv(x)) + shortcut), as `norm_act.norm_act` of the convolution; and x.

    Whoever else uses x takes the one returned: its gradient is then added within our kernel.

    Args:
        x, shortcut: what `accepts` takes; x is cast to the weight's type.

    Returns:
        (R N, K, H', W') and x, channels-last, of the weight's type.
    """
    x = x.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
    result: tuple[Tensor, Tensor] = _ConvNormAct.apply(
        x, shortcut, conv.weight, norm.weight, norm.bias, conv.stride[0], norm, relu, replicas
    )
    return result


class _ConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        stride: int,
        norm: nn.BatchNorm2d,
        relu: bool,
        replicas: int,
    ) -> tuple[Tensor, Tensor]:
        weight = weight.contiguous(memory_format=torch.channels_last)
        z, parts, span = convolve(x, weight, stride, norm.running_mean, replicas)
        y, batch = norm_act.normalise(z, shortcut, parts, span, norm, relu)
        ctx.save_for_backward(x, weight, z, y if shortcut is not None else None, gamma, beta, batch)
        ctx.stride, ctx.relu = stride, relu
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dx_elsewhere: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, z, y, gamma, beta, batch = ctx.saved_tensors
        dz, dshortcut, dbeta, dgamma = norm_act.gradients(dy, z, y, gamma, beta, batch, ctx.relu)
        if dx_elsewhere is not None:
            dx_elsewhere = dx_elsewhere.contiguous(memory_format=torch.channels_last)
        dx, dw = gradients(dz, weight, x, ctx.stride, dx_elsewhere, ctx.needs_input_grad[0])
        return dx, dshortcut, dw, dgamma, dbeta, None, None, None, None


def _tiles(rows: int, filters: int, groups: int) -> tuple[int, int, int, int]:
    """Pixels and filters of a tile, pixels of a program, and programs along the pixels."""
    block_n = min(triton.next_power_of_2(filters), 64)
    block_m = 128
    while block_m > 32 and triton.cdiv(rows, block_m) * groups < 128:
        block_m //= 2
    if triton.cdiv(rows, block_m) * groups < 128 and block_n > 32:
        block_n = 32
    blocks = triton.cdiv(rows, block_m)
    span = triton.cdiv(blocks, min(blocks, norm_act.most_programs(filters, groups))) * block_m
    return block_m, block_n, span, triton.cdiv(rows, span)


def convolve(
    x: Tensor, weight: Tensor, stride: int, origin: Tensor | None, replicas: int
) -> tuple[Tensor, Tensor, int]:
    """The convolution, and what BatchNorm needs of it.

    Args:
        origin: float32 (K,): near the mean, so that squares of deviations do not cancel.

    Returns:
        z; float32 (R, P, 2, K), mean and squared deviations of P programs' rows; and the rows of
        a program.
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
    kernels.convolve[(programs, triton.cdiv(filters, block_n), replicas)](
        x, weight, z, origin, parts, rows, span, programs, height, width, out_height, out_width,
        CHANNELS=channels, FILTERS=filters, SIZE=size, STRIDE=stride, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_K=_FACTORS,
    )  # fmt: skip
    return z, parts, span


def gradients(
    dz: Tensor, weight: Tensor, x: Tensor, stride: int, added: Tensor | None, of_input: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of a convolution's input, plus `added`, if wanted, and of its weight.

    By one launch where each has few programs with little to do, which do not fill a GPU, as at
    batch 32. Otherwise one would hold the registers and the shared memory of the other's kernel.
    """
    count, channels, height, width = x.shape
    filters, _, size, _ = weight.shape
    dx_rows, dw_rows = count * height * width, count * dz.shape[2] * dz.shape[3]
    dx_m, dx_n, dx_span, dx_programs = _tiles(dx_rows, channels, 1)
    columns = triton.cdiv(channels, dx_n)
    factors, dw_m = size * size * channels, 128
    dw_k = 64 if factors <= 192 else 128
    chunks, blocks = triton.cdiv(factors, dw_k), triton.cdiv(dw_rows, dw_m)
    dw_span = triton.cdiv(blocks, max(1, min(blocks, 128, _PARTS // chunks))) * dw_m
    programs = triton.cdiv(dw_rows, dw_span)
    dx = torch.empty_like(x) if of_input else None
    parts = torch.empty(programs, weight.numel(), device=x.device)
    together = dx_span == dx_m and (dw_span == dw_m or filters <= 32)
    launches = [(of_input, True)] if together or not of_input else [(True, False), (False, True)]
    for with_input, with_weight in launches:
        grid = dx_programs * columns if with_input else 0
        grid += programs * chunks if with_weight else 0
        add = with_input and added is not None
        kernels.conv_gradients[(grid,)](
            dz, weight, dx, added if add else None, x, parts, height, width, dz.shape[2],
            dz.shape[3], dx_rows, dx_span, dx_programs, columns, dw_rows, dw_span, chunks,
            CHANNELS=channels, FILTERS=filters, SIZE=size, STRIDE=stride,
            PADDED_FILTERS=max(16, triton.next_power_of_2(filters)), INPUT=with_input,
            WEIGHT=with_weight, ADD=add, DX_M=dx_m, DX_N=dx_n, DX_K=_FACTORS, DW_M=dw_m,
            DW_K=dw_k, DW_STAGES=1 if dw_span == dw_m else 3,  # one tile: nothing to fetch ahead
        )  # fmt: skip
    return dx, _summed(parts, weight)


def _summed(parts: Tensor, weight: Tensor) -> Tensor:
    """Float32 (P, ...) added up over P, like `weight`."""
    programs, total = len(parts), torch.empty_like(weight)
    padded = triton.next_power_of_2(programs)
    block = max(16, _CELLS // padded)
    kernels.add_up[(triton.cdiv(weight.numel(), block),)](
        parts, total, programs, weight.numel(), PARTS=padded, BLOCK=block
    )
    return total
