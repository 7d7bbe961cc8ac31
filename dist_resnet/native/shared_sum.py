"""The sum over ranks that share a machine's memory, in place of an exchange over sockets.

gloo copies a tensor through sockets, on a thread of its own that takes the core of the one that
waits for it; here the ranks read each other's memory.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_resnet.native.build import load

_LINE = 64  # bytes
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_ARGUMENTS: list[Any] = [
    _POINTER, _POINTER, ctypes.c_int64, _INT, _INT, _INT, ctypes.c_uint32, _POINTER,
    ctypes.c_double,
]  # fmt: skip


def shared_memory(count: int, dtype: torch.dtype, ranks: int) -> int:
    """A descriptor of memory for `ranks` buffers and their sum, which ends with its last user.

    Raises:
        OSError, AttributeError: this system has none.
    """
    handle = os.memfd_create("dist_resnet")
    lines = -(-count * dtype.itemsize // _LINE)
    os.posix_fallocate(handle, 0, _LINE * (1 + (ranks + 1) * lines))
    return handle


class SharedSum:
    """Sums tensors of one shape over ranks, in the order of the ranks: the same bits on each."""

    def __init__(
        self,
        handle: str,
        count: int,
        dtype: torch.dtype,
        rank: int,
        processes: Sequence[int],
        seconds: float,
    ) -> None:
        """
        Args:
            handle: path of `shared_memory`'s descriptor, as this process sees it.
            count: elements of a tensor.
            dtype: float32 or float64.
            processes: of all ranks, this one's included, by rank.
            seconds: longest wait for the others.

        Raises:
            OSError, AttributeError: no such memory, or the system cannot watch processes.
            UserError: no C++ compiler.
        """
        self._sum = load("shared_sum").shared_sum
        self._sum.argtypes, self._sum.restype = _ARGUMENTS, _INT
        opened = os.open(handle, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(opened, 0)
        finally:
            os.close(opened)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        watched = [os.pidfd_open(process) for process in processes]
        self._processes = (ctypes.c_int * len(watched))(*watched)
        self._count, self._dtype = count, dtype
        self._rank, self._seconds = rank, seconds
        self.calls = 0

    def __call__(self, tensor: Tensor) -> None:
        """Replace `tensor`, contiguous and on the CPU, by the sum; every rank must call.

        Raises:
            RuntimeError: another rank has ended, or does not come.
        """
        assert (tensor.dtype, tensor.numel()) == (self._dtype, self._count)
        assert tensor.is_contiguous()
        ended = self._sum(
            self._address,
            tensor.data_ptr(),
            self._count,
            self._dtype == torch.float64,
            self._rank,
            len(self._processes),
            self.calls,
            self._processes,
            self._seconds,
        )
        self.calls += 1
        if ended > 0:
            raise RuntimeError(f"rank {ended - 1} has ended")
        if ended < 0:
            raise RuntimeError(f"no answer in {self._seconds:.0f} s")
