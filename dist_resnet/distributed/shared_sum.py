"""Which way a buffer is summed over the ranks: through shared memory, or by a collective."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.base.launcher import environment_int, environment_rank
from dist_resnet.distributed.group import (
    all_reduce_sum,
    collective,
    gather_objects,
    step_timeout,
    world_size,
)
from dist_resnet.native.shared_sum import SharedSum, shared_memory

T = TypeVar("T")


def build_sum(count: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], None]:
    """What replaces tensors of one shape, step after step, by their sum over the ranks.

    Through shared memory where all ranks are processes of one machine that compute on its CPUs; a
    collective elsewhere, and without Linux or a C++ compiler. Every rank must call this, and then
    what it returns.

    Args:
        count: elements of a tensor.
        dtype: float32 or float64.
    """
    ranks, rank = world_size(), environment_rank()
    if ranks == 1 or device.type != "cpu" or environment_int("LOCAL_WORLD_SIZE", 0) != ranks:
        return all_reduce_sum
    memory = _or_none(lambda: shared_memory(count, dtype, ranks)) if rank == 0 else None
    members = gather_objects((os.getpid(), memory))
    processes, (_, first_memory) = [process for process, _ in members], members[0]
    if first_memory is None:
        return all_reduce_sum
    descriptor, name = first_memory
    path = f"/proc/{processes[0]}/fd/{descriptor}"
    shared_sum = _or_none(
        lambda: SharedSum(path, name, count, dtype, rank, processes, step_timeout())
    )
    everywhere = all(gather_objects(shared_sum is not None))
    if rank == 0:
        os.close(descriptor)
    if shared_sum is None or not everywhere:
        return all_reduce_sum

    def through_memory(tensor: Tensor) -> None:
        with collective():
            shared_sum(tensor)

    return through_memory


def _or_none(action: Callable[[], T]) -> T | None:
    try:
        return action()
    except (OSError, UserError):
        return None
