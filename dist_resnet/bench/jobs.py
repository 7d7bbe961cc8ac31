"""Worker processes that stand ready and take their turn when told to.

Every candidate has processes of its own (two ranks: under torchrun), so that none inherits
another's threads, hooks or process group, and a failing one takes nothing with it.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_resnet.bench.gate import ADDRESS
from dist_resnet.bench.measure import Candidate, one_line

WORKER = "dist_resnet.bench.worker"
_PATIENCE_SECONDS = 300.0  # for a start, or for one turn
_CLOSE_SECONDS = 20.0
# What would make a worker a rank of something else.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class JobFailed(Exception):
    """Why a worker gave up, or that it died."""


@dataclass(frozen=True)
class Job:
    """What to start."""

    name: str
    task: str
    """Name in `worker.TASKS`."""
    ranks: int = 1
    pairs: tuple[str, ...] = ()
    """key=value pairs of its configuration."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the task takes besides."""


class Worker:
    """A started job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.facts: dict[str, Any] = {}
        """What it said at the end of its last turn."""
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.5)
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        spec = {"task": job.task, "pairs": job.pairs, "options": dict(job.options)}
        environment = {k: v for k, v in os.environ.items() if k not in _FOREIGN} | {
            ADDRESS: str(self._server.getsockname()[1]),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        if job.ranks > 1:  # torchrun's own choice, without its warning
            environment.setdefault("OMP_NUM_THREADS", "1")
        self._process = subprocess.Popen(
            [*launcher(job.ranks), "-m", WORKER, json.dumps(spec)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def wait_until_ready(self) -> None:
        """Wait for the worker to reach its gate.

        Raises:
            JobFailed: it did not.
        """
        for _ in range(int(_PATIENCE_SECONDS / 0.5)):
            with contextlib.suppress(TimeoutError):
                connection, _ = self._server.accept()
                break
            if self._process.poll() is not None:
                raise JobFailed(self._last_words())
        else:
            raise JobFailed(f"not ready within {_PATIENCE_SECONDS:g} s")
        connection.settimeout(_PATIENCE_SECONDS)
        self._stream = connection.makefile("rw", encoding="utf-8")
        connection.close()  # the stream keeps it
        self.finish()

    def begin(self) -> None:
        """Let it take a turn."""
        try:
            self._stream.write("run\n")
            self._stream.flush()
        except OSError:
            raise JobFailed(self._last_words()) from None

    def finish(self) -> None:
        """Wait until its turn is over."""
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise JobFailed(f"no answer within {_PATIENCE_SECONDS:g} s") from None
        except OSError:
            line = ""
        if not line:
            raise JobFailed(self._last_words())
        answer = json.loads(line)
        if "failed" in answer:
            raise JobFailed(answer["failed"])
        self.facts = answer["done"]

    def run(self) -> None:
        """One whole turn."""
        self.begin()
        self.finish()

    def close(self) -> None:
        """End it; bounded in time."""
        if hasattr(self, "_stream"):
            with contextlib.suppress(OSError):
                self._stream.write("end\n")
                self._stream.flush()
        else:
            self._process.terminate()
        self._server.close()
        for end in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(_CLOSE_SECONDS)
                break
            except subprocess.TimeoutExpired:
                end()
        self._process.wait()
        if hasattr(self, "_stream"):
            with contextlib.suppress(OSError):
                self._stream.close()
        self._log.close()

    def _last_words(self) -> str:
        """The end of its log: what a person would look for first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("dist_resnet:")]
        errors = [line for line in lines if "Error" in line.split(":")[0].split(" ")[-1]]
        said = (ours or errors or lines or ["it died without a word"])[-1]
        return said.removeprefix("dist_resnet:").strip()[:200]


@contextlib.contextmanager
def working(jobs: Sequence[Job]) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Start all jobs at once; those that are ready, and why the others are not, by name."""
    workers: dict[str, Worker] = {}
    failures: dict[str, str] = {}
    try:
        for job in jobs:
            workers[job.name] = Worker(job)
        ready = {}
        for name, worker in workers.items():
            try:
                worker.wait_until_ready()
                ready[name] = worker
            except (JobFailed, OSError) as error:
                failures[name] = str(error) if isinstance(error, JobFailed) else one_line(error)
        yield ready, failures
    finally:
        for worker in workers.values():
            worker.close()


def as_candidate(worker: Worker, images: int) -> Candidate:
    return Candidate(worker.job.name, images, worker.run)


def launcher(ranks: int) -> list[str]:
    """What starts so many processes of a module."""
    if ranks == 1:
        return [sys.executable]
    beside = Path(sys.executable).with_name("torchrun")
    torchrun = str(beside) if beside.exists() else shutil.which("torchrun") or "torchrun"
    return [torchrun, "--standalone", f"--nproc_per_node={ranks}"]
