"""Which way a buffer is summed over the ranks: through shared memory, or by a collective."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dist_resnet.distributed import (
    all_reduce_sum,
    collective,
    from_all,
    timeout_seconds,
    world_size,
)
from dist_resnet.errors import UserError
from dist_resnet.launcher import environment_int, environment_rank
from dist_resnet.native.shared_sum import SharedSum, shared_memory

T = TypeVar("T")


def build_sum(count: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], None]:
    """What replaces tensors of one shape, step after step, by their sum over the ranks.

    Through shared memory where all ranks are processes of one machine that compute on its CPUs; a
    collective elsewhere, and without Linux or a C++ compiler. Every rank must call both.

    Args:
        count: elements of a tensor.
        dtype: float32 or float64.
    """
    ranks, rank = world_size(), environment_rank()
    if ranks == 1 or device.type != "cpu" or environment_int("LOCAL_WORLD_SIZE", 0) != ranks:
        return all_reduce_sum
    handle = _attempt(lambda: shared_memory(count, dtype, ranks)) if rank == 0 else None
    met = from_all((os.getpid(), handle))
    path = f"/proc/{met[0][0]}/fd/{met[0][1]}"
    processes = [process for process, _ in met]
    share = _attempt(lambda: SharedSum(path, count, dtype, rank, processes, timeout_seconds()))
    everywhere = all(from_all(share is not None))
    if handle is not None:
        os.close(handle)
    if share is None or not everywhere:
        return all_reduce_sum

    def through_memory(tensor: Tensor) -> None:
        with collective():
            share(tensor)

    return through_memory


def _attempt(action: Callable[[], T]) -> T | None:
    try:
        return action()
    except (OSError, AttributeError, UserError):
        return None
