"""Compile a source of this folder for this processor, once, and load it.

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
import threading
from functools import cache
from pathlib import Path

from dist_resnet.base.errors import UserError
from dist_resnet.base.files import write_atomically

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
_MORE_FLAGS = {"batch": ("-ffp-contract=off",)}

# Two threads need kernels in the first step: the training's and the one that draws W&B's pictures.
_LOCK = threading.Lock()


@cache
def load(name: str) -> ctypes.CDLL:
    """The library made of `name`.cpp.

    Raises:
        UserError: there is no C++ compiler, or it cannot compile the source.
    """
    with _LOCK:
        try:
            return _load(name)
        except (OSError, RuntimeError) as error:  # no home, or a compiler that is no program
            raise UserError(f"{name}.cpp cannot be compiled: {error}") from None


def _load(name: str) -> ctypes.CDLL:
    compiler = _compiler()
    source = Path(__file__).with_name(f"{name}.cpp")
    command = [compiler, *_FLAGS, *_MORE_FLAGS.get(name, ()), str(source)]
    file = f"{name}-{_key(command)}.so"
    for folder in (_cache(), Path(tempfile.gettempdir()) / f"dist_resnet-{os.getuid()}"):
        path = folder / file
        try:
            if not path.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomically(path, _compile(command))
            if path.stat().st_uid not in (os.getuid(), 0):
                continue  # somebody else's file in a shared folder is not to be run
            return ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"{path}: {error}"
    raise UserError(f"the compiled kernel cannot be kept: {reason}")


def _compiler() -> str:
    wanted = os.environ.get("CXX") or "c++"
    found = shutil.which(wanted) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise UserError("no C++ compiler (apt install g++)")
    return found


def _compile(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "library.so"
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{command[0]} cannot compile our kernel: {lines[0]}")
        return target.read_bytes()


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dist_resnet"


def _key(command: list[str]) -> str:
    """Everything that decides what the compiler makes of the source on this machine."""
    compiler, *flags, source = command
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [Path(source).read_text(), *flags, version, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
