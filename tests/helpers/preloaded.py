"""Python commands that need not import torch: forked off a process that has done so, once.

What they are told, write and end with is as of `python -m MODULE ARGUMENTS...`; that import alone
takes longer than most trainings of the tests. What must begin as a process of its own does not come
here: ranks are started by torchrun, and the environment of a dynamic linker is read only once.
"""

import atexit
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

# None of our own, which are read anew.
MODULES = [
    "torch", "torch.distributed.launcher.api", "numba", "omegaconf", "pytest", "scipy.special",
]  # fmt: skip


def forks() -> ForkServerContext:
    """For processes of multiprocessing; their environment is that of the first one's start."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a process of one thread can be forked
        forkserver.ensure_running()
    return context


class Command:
    """`python -m module arguments`, with what tests use of a subprocess.Popen."""

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.args = [sys.executable, "-m", module, *arguments]
        self._process = forks().Process(
            target=_run, args=(module, list(arguments), log, dict(environment))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    added = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [os.getcwd(), *added, *installed]  # the tests may have been given more
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
