"""Whether Triton's kernels can run on a tensor's device."""

import importlib.util
import os
from functools import cache

import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it: once


def usable(device: torch.device) -> bool:
    """Whether the kernels of this folder can take tensors of `device`.

    On a GPU where Triton compiles and runs them; on a CPU under TRITON_INTERPRET=1, which checks
    their numbers.
    """
    return not lacking(device)


@cache
def lacking(device: torch.device) -> str:
    """What the kernels need and do not find; empty: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing"
    if device.type != "cuda":
        return "" if _INTERPRETED and device.type == "cpu" else "Triton runs on GPUs"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0"
    return _trial(device)


def multiplies(device: torch.device) -> bool:
    """Whether Triton multiplies matrices on `device` by tensor cores; below sm_80 it does not."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _trial(device: torch.device) -> str:
    """Why one of our kernels cannot run on `device`; empty: it can.

    Triton may lack a compiler, Python's headers or a folder to write to, each of which it tells by
    an exception of another kind.
    """
    try:
        from dist_resnet.kernels.norm_act_kernels import sum_rows

        with torch.cuda.device(device):
            rows = torch.zeros(4, 16, device=device)
            sum_rows[1, 2](rows, rows[2], rows[3], 1, 16, REPLICAS=1, BLOCK=16)
            torch.cuda.synchronize()
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Triton cannot run: {line}"
    return ""
