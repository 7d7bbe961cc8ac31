"""BatchNorm, addition of a shortcut and ReLU as one operation of a training step on a CPU.

PyTorch's separate operations read or write an activation 13 times, forward and backward; this one 8
times (with a shortcut 16 and 11). torch.compile fuses them too and gained nothing here at batch 32.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dist_resnet.native.build import load

CHANNELS = (16, 32, 64, 128, 256)
_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat"}
_WIDE = 64  # values the kernel takes at a time, at least

_POINTER, _COUNT, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "forward": [*[_POINTER] * 3, _COUNT, _COUNT, *[_POINTER] * 5, _FLOAT, _FLOAT, _INT, _INT],
    "backward": [*[_POINTER] * 5, _COUNT, _COUNT, *[_POINTER] * 4, _INT, _INT],
}


def accepts(x: Tensor, shortcut: Tensor | None = None, replicas: int = 1) -> bool:
    """Whether the kernel is made for `x`, (R N, C, H, W), and a shortcut of its shape and type."""
    values = x.numel() // replicas
    return (
        x.device.type == "cpu"
        and x.dtype in _TYPES
        and x.shape[1] in CHANNELS
        and x.shape[0] % replicas == 0
        and values % _WIDE == 0
        and values > x.shape[1]  # one value a channel has no variance: torch says so
        and (shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape))
    )


def norm_act(
    norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool, replicas: int = 1
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
        channels, threads = x.shape[1], torch.get_num_threads()
        y, batch = torch.empty_like(x), torch.empty(replicas, 2, channels)
        running, moved = (running_mean.data_ptr(), running_var.data_ptr()), None
        if replicas > 1:  # each moves the running statistics from where they stand now
            moved = torch.stack([running_mean, running_var]).repeat(replicas, 1, 1)
            running = moved.data_ptr(), moved.data_ptr() + 4 * channels
        _entry("forward", x.dtype, channels)(
            x.data_ptr(),
            None if shortcut is None else shortcut.data_ptr(),
            y.data_ptr(),
            replicas,
            x.numel() // (replicas * channels),
            weight.data_ptr(),
            bias.data_ptr(),
            *running,
            batch.data_ptr(),
            momentum,
            eps,
            relu,
            threads,
        )
        if moved is not None:
            running_mean.copy_(moved[:, 0].sum(dim=0))
            running_var.copy_(moved[:, 1].sum(dim=0))
        ctx.save_for_backward(x, y if shortcut is not None else None, weight, bias, batch)
        ctx.relu, ctx.threads = relu, threads
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, batch = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        replicas, channels = batch.shape[0], x.shape[1]
        dx, dparameters = torch.empty_like(x), torch.empty(replicas, 2, channels)
        dshortcut = None if y is None else torch.empty_like(x)
        _entry("backward", x.dtype, channels)(
            dy.data_ptr(),
            x.data_ptr(),
            None if y is None else y.data_ptr(),
            dx.data_ptr(),
            None if dshortcut is None else dshortcut.data_ptr(),
            replicas,
            x.numel() // (replicas * channels),
            weight.data_ptr(),
            bias.data_ptr(),
            batch.data_ptr(),
            dparameters.data_ptr(),
            ctx.relu,
            ctx.threads,
        )
        summed = dparameters[0] if replicas == 1 else dparameters.sum(dim=0)
        return dx, dshortcut, *summed.unbind(), *([None] * 6)


@cache
def _entry(kind: str, dtype: torch.dtype, channels: int) -> Callable[..., None]:
    function = getattr(load("norm_act"), f"{kind}_{_TYPES[dtype]}_{channels}")
    function.argtypes, function.restype = _ARGUMENTS[kind], None
    return function
