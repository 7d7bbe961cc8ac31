"""What to say when a GPU is full: how much is held by whom, and a batch that would fit."""

import functools
import re
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

from dist_resnet.base.errors import OutOfMemory, first_line
from dist_resnet.config.schema import Config

P = ParamSpec("P")
T = TypeVar("T")

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
GIB = _UNITS["GiB"]


def explaining_memory(
    action: Callable[Concatenate[Config, P], T],
) -> Callable[Concatenate[Config, P], T]:
    """`action`, whose lack of GPU memory becomes an `OutOfMemory` with one line."""

    @functools.wraps(action)
    def explained(config: Config, /, *rest: P.args, **named: P.kwargs) -> T:
        try:
            return action(config, *rest, **named)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(explain(error, config)) from None

    return explained


def explain(error: BaseException, config: Config) -> str:
    """The line for an error of torch's allocator on the current GPU."""
    number = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(number)
    held, needed = torch.cuda.max_memory_allocated(number), requested_bytes(error)
    others = max(0, total - free - torch.cuda.memory_reserved(number))
    line = (
        f"GPU {number} is out of memory: {needed / GIB:.2f} GiB more beside the"
        f" {held / GIB:.2f} of {total / GIB:.1f} GiB that this process holds"
    )
    if others > total // 4:
        return f"{line}; other processes hold {others / GIB:.1f}: see `nvidia-smi`"
    batch = config.data.batch_size_per_replica
    fitting = batch_that_fits(batch, held + needed, total - others)
    if fitting == 0:
        return f"{line}; use a smaller model or a larger GPU"
    loader = " or data.loader=ffcv" if config.data.loader == "resident" else ""
    return f"{line}; by estimate data.batch_size_per_replica={fitting}{loader} would fit"


def batch_that_fits(batch: int, needed: int, available: int) -> int:
    """The largest power of two of images below `batch` that may fit; 0: none.

    An estimate from above: `needed` bytes were not yet all, and are taken as proportional to the
    batch, as all but a few MiB of weights are.
    """
    limit = min(batch - 1, batch * available // max(needed, 1))
    return 1 << (limit.bit_length() - 1) if limit > 0 else 0


def requested_bytes(error: BaseException) -> int:
    """What the allocator was asked for, read from its message; 0 where it does not say."""
    found = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", first_line(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0
