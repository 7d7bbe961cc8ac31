"""Worker processes that stand ready, and take their turn when told to.

A training loop that is not ours cannot be called for fifty steps and then again: it owns its loop.
But it asks for batches, and whoever gives them can let it wait. So every loop, ours and others',
runs as its users run it, and stands still at its gate while another candidate is timed. Every
candidate has processes of its own, so that none inherits another's threads, hooks or process group,
and a failing one takes nothing with it.
"""

import contextlib
import importlib
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from dist_resnet.base.cli import run_command
from dist_resnet.base.errors import EXIT_DONE, DistResnetError
from dist_resnet.bench.measure import Timing, measure, reason, wait_for_device
from dist_resnet.config.load import load_config

T = TypeVar("T")
Gate = Callable[[], bool]
"""Called on all ranks alike, before the first turn and after each: tells that the turn is over and
waits for the next; False: there is none."""

_PATIENCE_SECONDS = 300.0  # for a start, or for one turn
_CLOSE_SECONDS = 20.0


class Finished(Exception):
    """Leaves a loop that would go on."""


class JobFailed(DistResnetError):
    """Why a worker gave up, or that it died."""


def in_turns(draw: Callable[[], T], steps: int, gate: Gate) -> Iterator[T]:
    """What `draw` gives, `steps` times a turn.

    Raises:
        Finished: the gate has closed.
    """
    while gate():
        for _ in range(steps):
            yield draw()
    raise Finished


@dataclass(frozen=True)
class Job:
    """What to start."""

    name: str
    task: str
    """module:function of this package, called with the configuration, the world and the gate; it
    goes on until `in_turns` raises `Finished`."""
    images: int
    """Processed in a turn by all ranks."""
    ranks: int = 1
    pairs: tuple[str, ...] = ()
    """key=value pairs of its configuration."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the task takes besides."""


class Worker:
    """A started job: one process a rank, each with a pipe."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115, closed by `close`
        self._ranks: dict[Connection, Any] = {}
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for rank in range(job.ranks):
            ours, theirs = context.Pipe()
            place = theirs, job, rank, port, self._stderr.name
            process = context.Process(target=_work, args=place)
            process.start()
            theirs.close()
            self._ranks[ours] = process

    def ready(self) -> tuple[int, Callable[[], None]]:
        """A candidate, once it is ready."""
        self.finish()
        return self.job.images, self.run

    def run(self) -> None:
        """One whole turn."""
        self.begin()
        self.finish()

    def begin(self) -> None:
        """Let it take a turn."""
        for pipe in self._ranks:
            with contextlib.suppress(OSError):  # `finish` says that it is dead
                pipe.send(True)

    def finish(self) -> None:
        """Wait until its turn is over; the first: until it is ready.

        Raises:
            JobFailed: it is not, nor will it be.
        """
        waiting = dict(self._ranks)
        while waiting:
            ready = wait(list(waiting), _PATIENCE_SECONDS)
            if not ready:
                raise JobFailed(f"no answer within {_PATIENCE_SECONDS:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                process = waiting.pop(pipe)
                try:
                    failure = pipe.recv()
                except (EOFError, OSError):
                    failure = self._death_of(process)
                if failure is not None:
                    raise JobFailed(failure)

    def close(self) -> None:
        """End it; bounded in time."""
        for pipe in self._ranks:
            with contextlib.suppress(OSError):
                pipe.send(False)
            pipe.close()
        for process in self._ranks.values():
            for end in (process.terminate, process.kill):
                process.join(_CLOSE_SECONDS)
                if process.exitcode is None:
                    end()
            process.join()
        self._stderr.close()

    def _death_of(self, process: Any) -> str:
        """How it died, and the last line that it wrote to stderr."""
        process.join(2)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "without a word")
        return f"died (exit code {process.exitcode}): {last[:200]}"


def measure_jobs(jobs: Sequence[Job], rounds: int) -> dict[str, Timing]:
    """Let all jobs take turns; those that cannot start have their failure."""
    with working(jobs) as workers:
        return measure({name: worker.ready for name, worker in workers.items()}, rounds)


@contextlib.contextmanager
def working(jobs: Sequence[Job]) -> Iterator[dict[str, Worker]]:
    """Start all jobs at once; their workers, by name."""
    with contextlib.ExitStack() as stack:
        yield {job.name: stack.enter_context(contextlib.closing(Worker(job))) for job in jobs}


def _work(pipe: Connection, job: Job, rank: int, port: int, stderr: str) -> None:
    """One rank of a worker, in its own process."""
    places = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    places |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job.ranks))
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name in places:  # others' must not make a single process a rank
        os.environ.pop(name, None)
    if job.ranks > 1:  # as torchrun does, OMP_NUM_THREADS included
        os.environ |= places | {"TORCHELASTIC_RUN_ID": "none"}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    silent = os.open(os.devnull, os.O_RDWR)
    heard = os.open(stderr, os.O_WRONLY | os.O_APPEND)
    for descriptor, target in enumerate((silent, silent, heard)):
        os.dup2(target, descriptor)
    run_command(lambda: _run_task(pipe, job))


def _run_task(pipe: Connection, job: Job) -> int:
    try:
        from dist_resnet.distributed.group import start, stop

        config = load_config(job.pairs)
        # A rank may stand at the gate for minutes, which to a process group looks like a hang.
        world = start(config.parallel.device, timeout_seconds=24 * 3600)

        def gate() -> bool:
            wait_for_device()
            pipe.send(None)
            return bool(pipe.recv())

        module, name = job.task.split(":")
        task = getattr(importlib.import_module(f"dist_resnet.bench.{module}"), name)
        with contextlib.suppress(Finished):
            task(config, world, gate, **job.options)
        stop()
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(reason(error))
        raise
    return EXIT_DONE
