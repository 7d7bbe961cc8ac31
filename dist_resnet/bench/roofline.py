"""What a step has to compute and move, counted; and how fast this machine computes and moves.

Shapes: as the model sees them, batches of one replica.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dist_resnet.bench.parts import now
from dist_resnet.step.cuda_graph import capture, warm_up

_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
_IN_A_GRAPH = 20  # calls


@dataclass(frozen=True)
class Work:
    """Of one forward and backward pass of one batch."""

    flops: int
    """Multiplications and additions of convolutions and matrix products."""
    bytes_moved: int
    """Every operation's tensors read and written once: the traffic of a step without fusion."""
    saved_bytes: int
    """Output of the convolutions: what backward needs again."""


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
    outputs: list[Tensor] = []
    traffic, flops = _Traffic(), FlopCounterMode(display=False)
    with _at_convolutions(model, lambda module, inputs, output: outputs.append(output)), traffic:
        train()
    with flops:
        train()
    return Work(flops.get_total_flops(), traffic.total, _bytes(outputs))


def limits(
    train: Callable[[], None],
    model: nn.Module,
    images: Tensor,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, float]:
    """What `train` computes and moves, and how fast this machine could, in this process.

    Rates are the best of a few repetitions: of a large matrix product, of a 3x3 convolution with
    128 channels on 32x32 images, of adding two buffers as large as the activations that a step
    keeps, and of the model's own convolutions, forward and backward, and nothing else.

    Args:
        images: one batch as the model gets it, in the layout to be measured.
        dtype: of the activations.
        seconds: for each.
    """
    work = count_work(train, model)
    device = images.device
    side = _MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(32, 128, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    size = max(work.saved_bytes // 4, 1)
    left, right, out = (torch.ones(size, device=device) for _ in range(3))
    calls: list[Callable[[], Any]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append(_both_ways(module, torch.randn_like(inputs[0], dtype=dtype), not calls))

    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with _at_convolutions(model, note), torch.no_grad(), mixed:
        model(images)
    matmul = 2 * side**3 / _best(lambda: a @ b, seconds, device)
    conv = 2 * 9 * 128 * 128 * 32**3 / _best(lambda: torch.conv2d(x, w, padding=1), seconds, device)
    bandwidth = 12 * size / _best(lambda: torch.add(left, right, out=out), seconds, device)
    return {
        "mflop_per_image": work.flops / len(images) / 1e6,
        "mb_per_image": work.bytes_moved / len(images) / 1e6,
        "matmul_gflops": matmul / 1e9,
        "conv_gflops": conv / 1e9,
        "gb_per_second": bandwidth / 1e9,
        "compute_ms": 1e3 * work.flops / matmul,
        "memory_ms": 1e3 * work.bytes_moved / bandwidth,
        "convolutions_ms": 1e3 * _best(lambda: [call() for call in calls], seconds, device),
    }


@contextmanager
def _at_convolutions(model: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """While open, `hook` is called after every convolution of `model`."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(hook) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _both_ways(module: Any, x: Tensor, first: bool) -> Callable[[], Any]:
    """A call that does a convolution forward and backward, on random values."""
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
    """Shortest time of one call, among those that fit into `seconds`; at least three.

    On a GPU many calls are one graph: a small one by itself would measure its launch.
    """
    times: list[float] = []
    repeat, count = call, 1
    if device.type == "cuda":
        warm_up(call)
        graph, count = capture(lambda: [call() for _ in range(_IN_A_GRAPH)]), _IN_A_GRAPH
        repeat = graph.replay
    repeat()
    end = now() + seconds
    while len(times) < 3 or now() < end:
        start = now()
        repeat()
        times.append(now() - start)
    return min(times) / count
