"""Lines for people: where they cannot be shown they are lost, and decide nothing else."""

import contextlib
import io
import os
import select
import stat
import sys
from typing import Any, TextIO

_PIECE = 4096  # PIPE_BUF: what a pipe that has room takes without waiting
_PATIENCE_MS = 1000  # for a reader that pauses: a pager, a terminal after Ctrl-S


def open_standard_streams() -> None:
    """Make the streams safe to use: open, and able to show any text.

    A closed descriptor 1 or 2 would be given to the next file that is opened, and what a library
    prints would go into a checkpoint.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _text(_Forgiving(os.open(os.devnull, os.O_WRONLY)), "utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forgive() -> None:
    """From now on nothing that is printed raises or waits: a run goes on when its reader has gone.

    For commands whose result is not what they print. Streams that someone has put in the place of
    the process's own are left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                raw = _Forgiving(stream.fileno())
                setattr(sys, name, _text(raw, stream.encoding))


def say(text: str, stream: TextIO | None = None) -> None:
    """Show one line (default: on stdout), if that can be done; what it cannot hold is escaped."""
    stream = stream or sys.stdout
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)


def shows_live_line(stream: TextIO) -> bool:
    """Whether it is a terminal with columns; `script` and a fresh pseudo-terminal say they have 0.

    tqdm would then show nothing.
    """
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # not known
        return True


class _Forgiving(io.RawIOBase):
    """A descriptor to which all can be written; what it does not take is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor = _without_waiting(descriptor)
        self._waits = select.poll()
        self._waits.register(descriptor, select.POLLOUT)
        self._stalled = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        """Take all of `content`; a paused reader is waited for once, and not for long."""
        rest = memoryview(content)
        size = rest.nbytes
        try:
            # A reader that has gone counts as ready, and the write tells.
            while rest and self._waits.poll(0 if self._stalled else _PATIENCE_MS):
                rest = rest[os.write(self._descriptor, rest[:_PIECE]) :]
                self._stalled = False
        except OSError:
            pass
        self._stalled = bool(rest)
        return size


def _without_waiting(descriptor: int) -> int:
    """The same pipe or terminal in a mode in which a write never waits, where that can be had.

    Opened again, as the mode of the descriptor itself is shared with the shell.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            return os.open(f"/proc/self/fd/{descriptor}", flags)
    return descriptor


def _text(raw: io.RawIOBase, encoding: str) -> TextIO:
    # The buffer holds a line, so that each is written in one piece.
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)
