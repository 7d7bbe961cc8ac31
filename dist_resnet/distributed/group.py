"""Ranks, collectives and agreements: the only module that imports torch.distributed."""

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_resnet.base import signals
from dist_resnet.base.errors import PeerLost, Preempted, UserError, first_line
from dist_resnet.base.launcher import (
    PARENT,
    environment_int,
    environment_rank,
    environment_world_size,
    under_torchrun,
)
from dist_resnet.machine.devices import cuda_count, take

T = TypeVar("T")

# Outside of the training steps ranks wait for one that downloads or writes, not for a hang.
_PATIENCE = datetime.timedelta(hours=1)
# torch.AcceleratorError is there from 2.8 on; before, the device's errors are plain RuntimeErrors.
CUDA_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
_patient: Any = None
_timeout = _PATIENCE


@dataclass(frozen=True)
class World:
    """What this process is among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str, timeout_seconds: int) -> World:
    """Join the process group: NCCL on GPUs, gloo on CPUs, a world of one without torchrun.

    Args:
        device: auto, cpu or cuda.
        timeout_seconds: longest wait in a collective.

    Raises:
        UserError: no GPU for this rank, or the other ranks cannot be reached.
    """
    rank, size = environment_rank(), environment_world_size()
    local_rank, local_size = (
        environment_int("LOCAL_RANK", 0),
        environment_int("LOCAL_WORLD_SIZE", 1, least=1),
    )
    place = _choose_device(device, local_rank, local_size)
    if under_torchrun():
        signals.end_with_parent()  # a killed agent would leave its workers training
        if os.getppid() != PARENT:  # it died while this process was importing
            raise Preempted("torchrun has gone")
    global _patient, _timeout
    # Two ranks time out in a collective after the watchdog has shown their stacks.
    _timeout = datetime.timedelta(seconds=timeout_seconds + 10)
    if size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if place.type == "cuda" else "gloo",
                timeout=_timeout,
                device_id=place if place.type == "cuda" else None,
            )
            _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (dist.DistError, ValueError, RuntimeError) as error:
            line = first_line(error)
            raise UserError(f"rank {rank} of {size} cannot reach the others: {line}") from None
    return World(rank, size, local_rank, local_size, place)


def stop(orderly: bool = True) -> None:
    """Leave the process group.

    Args:
        orderly: whether the other ranks are leaving too. NCCL waits for them; alone, a rank of a
            job on GPUs keeps its group, and the process ends without it.
    """
    if dist.is_initialized() and (orderly or dist.get_backend() != "nccl"):
        dist.destroy_process_group()


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def step_timeout() -> float:
    """Longest wait for another rank in a training step."""
    return _timeout.total_seconds()


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum `tensor` over the ranks, in place."""
    if dist.is_initialized():
        with collective():
            dist.all_reduce(tensor)


def start_sum(tensor: Tensor) -> Callable[[], None]:
    """Begin to sum `tensor` over the ranks, in place; what is returned waits for the end."""
    with collective():
        work: Any = dist.all_reduce(tensor, async_op=True)

    def wait() -> None:
        with collective():
            work.wait()

    return wait


def gather_rows(rows: Tensor) -> Tensor:
    """Stack every rank's (n, ...) into (world size * n, ...), by rank; the same on all ranks."""
    if not dist.is_initialized():
        return rows
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    # Its name since torch 2.14, which warns of the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with collective():
        gather(gathered, rows.contiguous())
    return gathered


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action` on every rank; a UserError on any of them becomes a UserError on all.

    Without this the others would wait for the failed rank until the time limit.
    """
    result, message = _attempt(action)
    if message := next(filter(None, gather_objects(message)), None):
        raise UserError(message)
    assert result is not None
    return result[0]


def on_rank_zero(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, for which the others wait; a UserError there is one on all."""
    attempt = _attempt(action) if environment_rank() == 0 else (None, None)
    result, message = broadcast_object(attempt)
    if message:
        raise UserError(message)
    assert result is not None
    return result[0]


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on all ranks. A trusted job network only: it is pickled."""
    if not dist.is_initialized():
        return value
    box = [value]
    with collective():
        dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, by rank, on all ranks. A trusted job network only: it is pickled."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    with collective():
        dist.all_gather_object(gathered, value, group=_patient)
    return gathered


def backends() -> list[str]:
    """What this build of torch can connect ranks with."""
    found = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    return [name for name, there in found.items() if there]


@contextmanager
def collective() -> Iterator[None]:
    """Around an exchange with the other ranks, which fails with a RuntimeError.

    Raises:
        PeerLost: in its place.
        Preempted: in its place, where this process has received a signal to end, too.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's own; NCCL's DistBackendError is one too
        if _is_the_devices(error):
            raise
        if signals.received():  # the others have met the same signal, and left before
            reason = f"stopped by {signals.received_name()}; the last checkpoint counts"
            raise Preempted(reason) from None
        line = first_line(error)
        raise PeerLost(f"rank {environment_rank()}: lost contact with another: {line}") from None


def _is_the_devices(error: RuntimeError) -> bool:
    """Whether the device failed, or a capture: on a GPU that surfaces at any later call."""
    if not torch.cuda.is_initialized():
        return False
    if torch.cuda.is_current_stream_capturing():  # NCCL's complaints of it are DistErrors
        return True
    # Before torch 2.8 they had no type of their own.
    devices = isinstance(error, CUDA_ERRORS) or "CUDA error" in str(error)
    return devices and not isinstance(error, dist.DistError)


def _attempt(action: Callable[[], T]) -> tuple[tuple[T] | None, str | None]:
    try:
        return (action(),), None
    except UserError as error:
        return None, str(error)


def _choose_device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    count = cuda_count(wanted)
    if count == 0:
        return torch.device("cpu")
    if local_size > count:
        raise UserError(
            f"{local_size} processes for {count} GPUs on {socket.gethostname()}: start "
            f"--nproc_per_node={count} and set parallel.replicas={local_size} for the same training"
        )
    return take(local_rank)
