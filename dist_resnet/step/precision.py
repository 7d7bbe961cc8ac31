"""The type of the activations: what the hardware has, and what was asked for."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_resnet.base.errors import UserError
from dist_resnet.machine.environment import onednn_limit

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """bf16, fp16 or fp32 and, for the reader, why.

    Args:
        wanted: one of these, or auto.

    Raises:
        UserError: the type does not exist on `device`.
    """
    if device.type == "cuda":
        capability, place = torch.cuda.get_device_capability(device), "this GPU"
        # Volta and Turing (7.0, 7.5) have tensor cores for fp16; before them it is no faster.
        has_bf16, has_fp16 = capability >= (8, 0), capability >= (7, 0)
    else:
        has_bf16, has_fp16, place = _cpu_has_bf16(), False, "this CPU"
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("precision.dtype=fp16: only on GPUs; use bf16, fp32 or auto on a CPU")
    if wanted == "auto":
        wanted = "bf16" if has_bf16 else "fp16" if has_fp16 else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not has_bf16:
        # Neither cuDNN's convolutions nor Triton's compiler have it there.
        raise UserError(
            "precision.dtype=bf16: this GPU has none (compute capability "
            f"{'.'.join(map(str, capability))}, it needs 8.0); use fp16 or fp32"
        )
    if wanted == "bf16":
        return wanted, f"bf16 ({place} {'computes in it' if has_bf16 else 'emulates it: slow'})"
    return wanted, wanted if has_bf16 else f"{wanted} ({place} has no bf16 arithmetic)"


def _cpu_has_bf16() -> bool:
    # Below these oneDNN emulates it, ten times slower; torch asks the processor only.
    if onednn_limit().upper() in _WITHOUT_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """To compute in `precision`; does nothing for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def make_deterministic() -> None:
    """Forbid CUDA kernels whose results vary from call to call; before CUDA and NCCL start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Sums within the switch, in an order of its own (https://github.com/NVIDIA/nccl/issues/1497).
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor: launches for values that nothing here reads.
    options: Any = torch.utils.deterministic
    options.fill_uninitialized_memory = False


def set_up_cuda(repeatable: bool) -> str:
    """Choose how cuDNN and cuBLAS compute; what was chosen, for the reader.

    Args:
        repeatable: the same algorithm in every run and on every rank.
    """
    # Of torch 2.9 and 2.10, whose newer settings Inductor cannot be used with; of Inductor.
    for advice in ("Please use the new API settings", "TensorFloat32 tensor cores"):
        warnings.filterwarnings("ignore", message=advice)
    # TF32 has a mantissa of 10 bits, and is cuDNN's default: fp32 is to mean fp32, as on a CPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # A batch always has the same shape: trying the algorithms once, in the first step, pays.
    torch.backends.cudnn.benchmark = not repeatable
    torch.backends.cudnn.deterministic = repeatable
    return f"TF32 off, cuDNN benchmark {'off' if repeatable else 'on'}"


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """While open, cuDNN computes the same way in every process, whatever was chosen before."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
