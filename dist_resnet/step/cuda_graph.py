"""Recording what the device does, and doing it again with one launch."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch


def warm_up(action: Callable[[], object]) -> None:
    """Run `action` on the stream that is captured later: autograd remembers where it was used."""
    current, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            action()
    finally:
        current.wait_stream(side)


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """One for all: memory that a stream has freed is kept for that stream."""
    return torch.cuda.Stream(device)


def capturing(device: torch.device) -> bool:
    """Whether what is done on `device` now is recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free(graph: torch.cuda.CUDAGraph) -> None:
    """Give a graph up when the device is done with it."""
    with suppress(RuntimeError):  # of a device that has failed; its own error is told
        torch.cuda.synchronize()
    graph.reset()


def capture(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What repeats the device work of `action`, which is recorded and not executed.

    Raises:
        RuntimeError: it does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    current, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    try:
        # The loader's thread goes on allocating and copying: only this one is watched for misuse.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            action()
    except RuntimeError:
        # An invalidated capture raises before torch restores the stream: the loader's next batches
        # would be copied unordered with the steps that read them.
        torch.cuda.set_stream(current)
        raise
    return graph
