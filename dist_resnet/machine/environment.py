"""Facts about where a run takes place. No host name, no user.

Of the environment variables only the one that limits oneDNN's instructions.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dist_resnet.base.paths import PACKAGE

_PACKAGES = ("torch", "torchvision", "ffcv", "numpy", "wandb", "omegaconf")
# Many processors of one name differ in these.
_CPU_MODEL = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
# What oneDNN chooses kernels by, beyond the set that torch names.
_FAMILIES = ("amx", "avx10", "sve", "sme")
_KINDS = ("bf16", "fp16", "vnni")


def versions() -> dict[str, str]:
    """Python and the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for name in ("dist-resnet", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, threads: int) -> dict[str, str | int]:
    """Processor, the instructions that torch and oneDNN use of it, and CPU threads of a rank.

    On a GPU its name too, and the versions of CUDA and cuDNN.
    """
    cpu = _cpu_facts()
    facts: dict[str, str | int] = {
        "cpu": cpu.get("model name") or platform.processor(),
        "cpu_model": " ".join(cpu[name] for name in _CPU_MODEL if name in cpu),
        "instructions": _instructions(),
        "threads_per_rank": threads,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = torch.backends.cudnn.version() or "none"
    return facts


def git_commit() -> str | None:
    """Commit of the source this runs from, with a + where files differ from it; None: not known."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return commit + ("+" if ask("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def onednn_limit() -> str:
    """The newest instructions that oneDNN may use; empty: all there are."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""


def machine(device: torch.device, threads: int) -> dict[str, str | int]:
    """The kind of machine and torch: where these are equal, so are the bits of a run."""
    return {"device": device.type, **hardware(device, threads), "torch": versions()["torch"]}


def differences(before: Mapping[str, str | int], now: Mapping[str, str | int]) -> list[str]:
    """`name: before -> now` of each fact that both know and that differs."""
    return [
        f"{name}: {before[name]} -> {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]


def _instructions() -> str:
    """The set that torch's own kernels are chosen by, then what oneDNN's may use beside it."""
    names = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    used = [torch.backends.cpu.get_cpu_capability()]
    used += [name for name in names if name.startswith(_FAMILIES) or name.endswith(_KINDS)]
    if limit := onednn_limit():
        used.append(f"(oneDNN: at most {limit})")
    return " ".join(used)


def _cpu_facts() -> dict[str, str]:
    """What Linux tells of the first core; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
