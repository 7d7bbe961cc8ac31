"""What a step has to compute and move, counted; and how fast this machine computes and moves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from dist_resnet.bench.measure import now
from dist_resnet.step.cuda_graph import capture, warm_up

_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
_IN_A_GRAPH = 20  # calls
_FORWARD, _BACKWARD = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
)


class Work(TorchDispatchMode):
    """Of what runs within it: one forward and backward pass of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Multiplications and additions of convolutions and matrix products."""
        self.bytes_moved = 0
        """Every operation's tensors read and written once: the traffic of a step without fusion."""
        self.saved_bytes = 0
        """Output of the convolutions: what backward needs again."""
        self.convolutions: list[Callable[[], Any]] = []
        """Each of them again, forward and backward, on the same tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.bytes_moved += _bytes((args, kwargs, result))
        if func in (_FORWARD, _BACKWARD):
            self.convolutions.append(partial(func, *args))
        if func is _FORWARD:
            self.saved_bytes += _bytes(result)
        return result


def _bytes(tree: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def count_work(train: Callable[[], None]) -> Work:
    """Count what `train`, one forward and backward pass, does."""
    work, flops = Work(), FlopCounterMode(display=False)
    with flops, work:
        train()
    work.flops = flops.get_total_flops()
    return work


@torch.no_grad()
def limits(
    work: Work, images: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, float]:
    """What a pass over so many `images` computes and moves, and how fast this machine could.

    Rates are the best of a few repetitions: of a large matrix product, of a 3x3 convolution with
    128 channels on 32x32 images, of adding two buffers as large as the activations that a step
    keeps, and of the model's own convolutions, forward and backward, and nothing else.

    Args:
        dtype: of the activations.
        seconds: for each.
    """
    side = _MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(32, 128, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    size = max(work.saved_bytes // 4, 1)
    left, right, out = (torch.ones(size, device=device) for _ in range(3))
    matmul = 2 * side**3 / _best(lambda: a @ b, seconds, device)
    conv = 2 * 9 * 128 * 128 * 32**3 / _best(lambda: torch.conv2d(x, w, padding=1), seconds, device)
    bandwidth = 12 * size / _best(lambda: torch.add(left, right, out=out), seconds, device)
    convolutions = _best(lambda: [call() for call in work.convolutions], seconds, device)
    return {
        "mflop_per_image": work.flops / images / 1e6,
        "mb_per_image": work.bytes_moved / images / 1e6,
        "matmul_gflops": matmul / 1e9,
        "conv_gflops": conv / 1e9,
        "gb_per_second": bandwidth / 1e9,
        "compute_ms": 1e3 * work.flops / matmul,
        "memory_ms": 1e3 * work.bytes_moved / bandwidth,
        "convolutions_ms": 1e3 * convolutions,
    }


def _best(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Shortest time of one call, among those that fit into `seconds`.

    On a GPU many calls are one graph: a small one by itself would measure its launch.
    """
    repeat, count = call, 1
    if device.type == "cuda":
        warm_up(call)
        graph, count = capture(lambda: [call() for _ in range(_IN_A_GRAPH)]), _IN_A_GRAPH
        repeat = graph.replay
    threads = torch.get_num_threads()
    timer = Timer("repeat()", globals={"repeat": repeat}, timer=now, num_threads=threads)
    return min(timer.blocked_autorange(min_run_time=seconds).times) / count
