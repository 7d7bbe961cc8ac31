"""Compile norm_act.cpp for this processor, once, and load it.

Two seconds, then kept in the user's cache: a library compiled for `-march=native` belongs to one
kind of processor, so it cannot come with the package.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from dist_resnet.errors import UserError
from dist_resnet.storage import write_atomically

_SOURCE = Path(__file__).with_name("norm_act.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")


@cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        UserError: there is no C++ compiler, or it cannot compile the source.
    """
    compiler = _compiler()
    name = f"norm_act-{_key(compiler)}.so"
    for folder in (_cache(), Path(tempfile.gettempdir()) / f"dist_resnet-{os.getuid()}"):
        path = folder / name
        try:
            if not path.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomically(path, _compile(compiler))
            if path.stat().st_uid not in (os.getuid(), 0):
                continue  # somebody else's file in a shared folder is not to be run
            return ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"{path}: {error}"
    raise UserError(f"the fused kernel cannot be kept: {reason}")


def _compiler() -> str:
    wanted = os.environ.get("CXX") or "c++"
    found = shutil.which(wanted) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise UserError("no C++ compiler (apt install g++)")
    return found


def _compile(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "norm_act.so"
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{compiler} cannot compile the fused kernel: {lines[0]}")
        return target.read_bytes()


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dist_resnet"


def _key(compiler: str) -> str:
    """Everything that decides what the compiler makes of the source on this machine."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [_SOURCE.read_text(), *_FLAGS, version, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
