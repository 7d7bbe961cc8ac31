"""Where a worker process waits for its turn.

A training loop that is not ours cannot be called for fifty steps and then again: it owns its loop.
But it asks for batches, and whoever gives them can let it wait. So every loop here, ours and
others', runs as its users run it, and stands still at the gate while another candidate is timed.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
ADDRESS = "DIST_RESNET_BENCH_PORT"


class Gate(Protocol):
    """Called on all ranks alike, before the first turn and after each."""

    def __call__(self, **facts: Any) -> bool:
        """Tell that the last turn is over, with `facts` about it, and wait; False: no more."""


class Finished(Exception):
    """Leaves a loop that would go on."""


def in_turns(draw: Callable[[], T], steps: int, gate: Gate) -> Iterator[T]:
    """What `draw` gives, `steps` times a turn, until the gate closes."""
    while gate():
        for _ in range(steps):
            yield draw()


class RankGate:
    """Rank 0 talks to the process that measures; the other ranks learn from it what to do."""

    def __init__(self, is_main: bool, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self._stream = None
        if is_main and ADDRESS in os.environ:
            connection = socket.create_connection(("127.0.0.1", int(os.environ[ADDRESS])))
            self._stream = connection.makefile("rw", encoding="utf-8")
        self._is_main = is_main

    def __call__(self, **facts: Any) -> bool:
        """As `Gate`; waits for the device first."""
        from dist_resnet.distributed.group import broadcast_object

        self._synchronise()
        self.tell("done", facts)
        return broadcast_object(self._is_main and self._listen()) is True

    def tell(self, word: str, content: Any) -> None:
        """One line to the process that measures."""
        if self._stream is not None:
            self._stream.write(json.dumps({word: content}) + "\n")
            self._stream.flush()

    def _listen(self) -> bool:
        return self._stream is not None and self._stream.readline().strip() == "run"
