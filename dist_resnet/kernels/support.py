"""Whether Triton's kernels can run on a tensor's device."""

import importlib.util
import os
from functools import cache

import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it: once


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """Whether the kernels of this folder can take tensors of `device`.

    On a GPU with Triton installed; on a CPU under TRITON_INTERPRET=1, which checks their numbers.
    """
    if device.type == "cuda":
        return _has_triton() and torch.cuda.get_device_capability(device) >= (7, 0)
    return _INTERPRETED and device.type == "cpu" and _has_triton()


def multiplies(device: torch.device) -> bool:
    """Whether Triton multiplies matrices on `device` by tensor cores; below sm_80 it does not."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
