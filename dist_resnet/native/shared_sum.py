"""The sum over ranks that share a machine's memory, in place of an exchange over sockets.

gloo copies a tensor through sockets, on a thread of its own that takes the core of the one that
waits for it; here the ranks read each other's memory.
"""

import ctypes
import mmap
import os
import secrets
import weakref
from collections.abc import Iterable, Sequence
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


def shared_memory(count: int, dtype: torch.dtype, ranks: int) -> tuple[int, str]:
    """A descriptor of memory for `ranks` buffers and their sum, and a name that nothing else has.

    Raises:
        OSError: there is none, or nothing that watches its users; only Linux has both.
    """
    # The second is missing where Python was built against headers older than Linux 5.3.
    if not (hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")):
        raise OSError("this Python cannot share memory or watch processes")
    handle = os.memfd_create(f"dist_resnet-{secrets.token_hex(16)}")
    try:
        os.posix_fallocate(handle, 0, _size(count, dtype, ranks))
        return handle, os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise


class SharedSum:
    """Sums tensors of one shape over ranks, in the order of the ranks: the same bits on each."""

    def __init__(
        self,
        path: str,
        name: str,
        count: int,
        dtype: torch.dtype,
        rank: int,
        processes: Sequence[int],
        seconds: float,
    ) -> None:
        """
        Args:
            path: of `shared_memory`'s descriptor, as this process sees it.
            name: that `shared_memory` gave it.
            count: elements of a tensor.
            dtype: float32 or float64.
            processes: of all ranks, this one's included, by rank.
            seconds: longest wait for the others.

        Raises:
            OSError: no such memory, or no such process.
            UserError: no C++ compiler.
        """
        assert dtype in (torch.float32, torch.float64)
        self._sum = load("shared_sum").shared_sum
        self._sum.argtypes, self._sum.restype = _ARGUMENTS, _INT
        # Processes in namespaces of their own have other numbers: the path may lead to any file.
        if os.readlink(path) != name:
            raise OSError(f"{path} is not {name}")
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(opened, _size(count, dtype, len(processes)))
        finally:
            os.close(opened)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        watched: list[int] = []
        weakref.finalize(self, _close, watched)
        for process in processes:
            watched.append(os.pidfd_open(process))
        self._pidfds = (_INT * len(watched))(*watched)
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
        failed = self._sum(
            self._address,
            tensor.data_ptr(),
            self._count,
            self._dtype == torch.float64,
            self._rank,
            len(self._pidfds),
            self.calls,
            self._pidfds,
            self._seconds,
        )
        self.calls += 1
        if failed > 0:
            raise RuntimeError(f"rank {failed - 1} has ended")
        if failed < 0:
            raise RuntimeError(f"no answer in {self._seconds:g} s")


def _size(count: int, dtype: torch.dtype, ranks: int) -> int:
    """Bytes, as laid out in shared_sum.cpp."""
    lines = -(-count * dtype.itemsize // _LINE)
    return _LINE * (1 + (ranks + 1) * lines)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
