"""Run a function on real ranks: one process each, joined by gloo, as under torchrun."""

import datetime
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

from dist_resnet.distributed import group
from tests.helpers.preloaded import forks

SECONDS = 200.0  # far beyond what a loaded machine takes


class RankFailed(AssertionError):
    """One of the ranks raised, died or did not finish in time."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS
) -> list[Any]:
    """`function(world, *args)` on every rank; what they return, by rank.

    `function` must be importable (defined at the top of a module), its arguments and results
    picklable. Raises RankFailed with the traceback of the first rank that fails, or after
    `seconds`; no process is left behind either way.
    """
    context = forks()
    # As torchrun's agent does: the parent serves the meeting point, so no port is ever guessed.
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=seconds),
    )  # fmt: skip
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_main,
            args=(dict(os.environ), rank, world_size, store.port, sender, function, args),
            daemon=True,
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, seconds)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], seconds: float) -> list[Any]:
    deadline = time.monotonic() + seconds
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailed(f"ranks {missing} did not finish within {seconds:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                failure, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if failure:
                raise RankFailed(f"rank {rank}:\n{failure}")
            results[rank] = content
    return [results[rank] for rank in range(len(pipes))]


def _main(
    environment: dict[str, str],
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    failure, content = "", None
    try:
        content = function(group.start("cpu", int(SECONDS)), *args)
    except BaseException:
        failure = traceback.format_exc()
    # Plain bytes: torch's own way through a pipe shares memory with a process that is about to end.
    sender.send_bytes(pickle.dumps((failure, content)))
    sender.close()
    if not failure:  # after a failure the others may be gone, and leaving would wait for them
        group.stop()
