"""Facts about where a run takes place. No environment variable, no host name, no user."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchvision", "ffcv", "numpy", "wandb", "omegaconf")


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
    """Processor, CPU threads of a rank and, on a GPU, its name."""
    facts: dict[str, str | int] = {"cpu": _cpu_model(), "threads_per_rank": threads}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def git_commit() -> str | None:
    """Commit of the source this runs from, with a + where files differ from it; None: not known."""
    folder = Path(__file__).parent

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return commit + ("+" if ask("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "")
