"""How many GPUs training may use, or why it may not use them: judged in one place."""

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_resnet.base.errors import UserError, first_line

_CONTROL = Path("/dev/nvidiactl")
_MODULE = Path("/proc/driver/nvidia/version")
OLD_BUILD = "TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 make setup"
"""A torch for CUDA 12.6: it still has sm_50 to sm_70, and runs on drivers of 2023."""


def cuda_count(wanted: str) -> int:
    """The number of GPUs for parallel.device=`wanted`; 0: train on the CPU.

    Raises:
        UserError: cuda was asked for, or GPUs are here and not hidden, and torch cannot use them.
    """
    if wanted == "cpu":
        return 0
    why = ""
    if torch.cuda.is_available():
        try:
            # Until CUDA has started device_count() asks NVML, which counts a GPU for its MIG parts.
            torch.cuda.init()
            return torch.cuda.device_count()
        except RuntimeError as error:
            why = first_line(error)
    if _hidden():
        if wanted == "auto":
            return 0
        raise UserError(
            "parallel.device=cuda: CUDA_VISIBLE_DEVICES="
            f"{os.environ['CUDA_VISIBLE_DEVICES']} hides all GPUs; unset it, or use"
            " parallel.device=cpu or auto"
        )
    # NVML counts them under a driver that is too old for this torch.
    if torch.cuda.device_count() > 0 or _CONTROL.exists():
        raise UserError(
            f"parallel.device={wanted}: there are GPUs, but {why or _why_unusable()},"
            " or set parallel.device=cpu"
        )
    if wanted == "cuda":
        raise UserError(
            "parallel.device=cuda: no CUDA device here; use parallel.device=cpu or auto"
        )
    return 0


def driver() -> str:
    """The driver and the newest CUDA that it runs, for the reader: 535.104.05 (CUDA 12.2)."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", _MODULE.read_text().splitlines()[0])
    except (OSError, IndexError):
        found = None
    name, cuda = found[0] if found else "of unknown version", driver_cuda()
    return f"{name} (CUDA {cuda[0]}.{cuda[1]})" if cuda else name


def why_unsupported(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """What a torch built for `architectures` lacks for a GPU, and "; " and the remedy; or None.

    Args:
        architectures: torch.cuda.get_arch_list(): sm_90 is code for GPUs of its major version from
            that minor one on, compute_90 can be translated for all later ones, sm_90a is for 9.0.
    """
    parts = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in architectures]
    built = [(m[1], (int(m[2]), int(m[3])), m[4]) for m in parts if m]
    if not built or any(_runs(*code, capability) for code in built):
        return None
    mine = f"sm_{capability[0]}{capability[1]}"
    text = (
        f"this GPU is {mine}, and torch {torch.__version__} was built for {' '.join(architectures)}"
    )
    if capability < min(version for _, version, _ in built):
        return f"{text}; install a torch for CUDA 12.6, which still has sm_50 to sm_90: {OLD_BUILD}"
    return f"{text}; install a newer torch, built for a CUDA that knows {mine}"


def take(device: int) -> torch.device:
    """Make GPU `device` the current one of this process and thread.

    To be called before any other CUDA call, or every rank opens a context on GPU 0.

    Raises:
        UserError: it is taken, or this torch has no code for it: its first kernel would fail.
    """
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        raise UserError(
            f"GPU {device} cannot be used: {first_line(error)}; `nvidia-smi` shows by whom it is"
        ) from None
    capability = torch.cuda.get_device_capability(device)
    why = why_unsupported(capability, torch.cuda.get_arch_list())
    if why is not None:
        raise UserError(f"GPU {device} ({torch.cuda.get_device_name(device)}): {why}")
    return torch.device("cuda", device)


def _runs(kind: str, version: tuple[int, int], suffix: str, capability: tuple[int, int]) -> bool:
    if suffix == "a":
        return version == capability
    if kind == "compute" and not suffix:
        return version <= capability
    return version[0] == capability[0] and version[1] <= capability[1]


def _hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no GPU: empty, -1, NoDevFiles (Slurm's)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)


def _why_unusable() -> str:
    """What keeps torch from the GPUs of this machine, "; " and the remedy."""
    mine = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{mine} was built without CUDA; install one that has it (`make setup`)"
    cuda, needed = driver_cuda(), int(torch.version.cuda.split(".")[0])
    if cuda and cuda[0] < needed:
        older = f"a torch for CUDA {cuda[0]}" + (f": {OLD_BUILD}" if cuda[0] == 12 else "")
        return (
            f"their driver {driver()} is too old for {mine} (CUDA {torch.version.cuda}); update"
            f" the driver to one of CUDA {needed}.0 or newer, or install {older}"
        )
    try:
        torch.cuda.init()
        why = "it sees none"
    except (AssertionError, RuntimeError) as error:
        why = first_line(error)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        why += f" (CUDA_VISIBLE_DEVICES={visible})"
    return (
        f"{mine} (CUDA {torch.version.cuda}) cannot use them with driver {driver()}: {why};"
        " compare `nvidia-smi`"
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None: no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if version.value else None
