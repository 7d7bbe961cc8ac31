"""What a step has to compute and move, counted; and how fast this machine computes and moves.

Shapes: as the model sees them, batches of one replica.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """Of one forward and backward pass of one batch."""

    flops: int
    """Multiplications and additions of convolutions and matrix products."""
    bytes_moved: int
    """Every operation's tensors read and written once: the traffic of a step without fusion."""
    saved_bytes: int
    """Output of the convolutions: what backward needs again."""


@dataclass(frozen=True)
class Ceilings:
    """Best of a few repetitions, in this process, with its threads."""

    matmul_flops: float
    """Per second, of a large matrix product."""
    conv_flops: float
    """Per second, of a 3x3 convolution with 128 channels on 32x32 images."""
    bytes_per_second: float
    """Read and written, adding two buffers as large as the activations that a step keeps."""
    model_convs_seconds: float
    """The model's own convolutions, forward and backward, and nothing else, one batch."""


class _Traffic(TorchDispatchMode):
    """Sums the bytes of every operation's tensors; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.total += _bytes((args, kwargs, result))
        return result


def _bytes(tree: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def count_work(train: Callable[[], None], model: nn.Module) -> Work:
    """Count what `train`, one forward and backward pass of `model`, does."""
    saved = 0

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal saved
        saved += output.numel() * output.element_size()

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    traffic, flops = _Traffic(), FlopCounterMode(display=False)
    try:
        with traffic:
            train()
        saved_once = saved
        with flops:
            train()
    finally:
        for hook in hooks:
            hook.remove()
    return Work(flops.get_total_flops(), traffic.total, saved_once)


def measure_ceilings(
    model: nn.Module, images: Tensor, dtype: torch.dtype, work: Work, seconds: float
) -> Ceilings:
    """Measure them, each for about `seconds`.

    Args:
        images: one batch as the model gets it, in the layout to be measured.
        dtype: of the activations.
    """
    device = images.device
    side = _MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = _best(lambda: a @ b, seconds, device)
    x = torch.randn(32, 128, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    conv = _best(lambda: torch.conv2d(x, w, padding=1), seconds, device)
    size = max(work.saved_bytes // 4, 1)
    left, right, out = (torch.ones(size, device=device) for _ in range(3))
    add = _best(lambda: torch.add(left, right, out=out), seconds, device)
    calls = _convolutions(model, images, dtype)

    def all_convolutions() -> None:
        for call in calls:
            call()

    return Ceilings(
        matmul_flops=2 * side**3 / matmul,
        conv_flops=2 * 9 * 128 * 128 * 32 * 32 * 32 / conv,
        bytes_per_second=12 * size / add,
        model_convs_seconds=_best(all_convolutions, seconds, device),
    )


def _convolutions(model: nn.Module, images: Tensor, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Calls that do each convolution of `model` forward and backward, on random values."""
    shapes: list[tuple[nn.Conv2d, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        shapes.append((module, torch.randn_like(inputs[0], dtype=dtype)))

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(keep) for module in convs]
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        model(images)
    for hook in hooks:
        hook.remove()
    return [_both_ways(m, x, first=number == 0) for number, (m, x) in enumerate(shapes)]


def _both_ways(module: nn.Conv2d, x: Tensor, first: bool) -> Callable[[], Any]:
    weight = module.weight.detach().to(x.dtype)
    shared = (list(module.stride), list(module.padding), list(module.dilation))
    forward = (*shared, False, [0, 0], 1)
    gradient = torch.randn_like(torch.ops.aten.convolution(x, weight, None, *forward))
    wanted = [not first, True, False]  # nobody asks for the images' gradient

    def call() -> None:
        torch.ops.aten.convolution(x, weight, None, *forward)
        torch.ops.aten.convolution_backward(gradient, x, weight, None, *forward, wanted)

    return call


def _best(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Shortest time of one call, among those that fit into `seconds`; at least three."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
