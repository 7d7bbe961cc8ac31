"""Requests to stop: what would end the process ends the run at a step border, after a save."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dist_resnet.base.errors import EXIT_PREEMPTED, Preempted

# From schedulers, terminals that close or are told ^C and ^\\, limits of CPU time. torchrun passes
# SIGHUP on even under nohup.
_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT,
    signal.SIGXCPU,
)  # fmt: skip

# What else ends a process where nobody handles it: timers, a failing power supply, numbers that a
# batch system or a container's configuration chooses.
_OTHERS = (
    signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR, signal.SIGSTKFLT,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)  # fmt: skip

# Schedulers deliver one request several times within milliseconds (the parent's death once for each
# of its threads); only a later signal means "at once".
_REPEAT_SECONDS = 1.0

_received: int = 0
_received_at: float = 0.0
_deferred: bool = False


def install() -> None:
    """Take over the signals; until `defer` they end the process at once, nothing being unsaved."""
    if threading.current_thread() is not threading.main_thread():
        return  # which alone may: a notebook's kernel or a server has its own
    for number in (*_SIGNALS, *_OTHERS):
        now = signal.getsignal(number)
        ignored = number == signal.SIGHUP and now == signal.SIG_IGN  # nohup
        if now == signal.SIG_DFL or (number in _SIGNALS and not ignored):
            signal.signal(number, _on_signal)


def reset() -> None:
    """Give the signals back: from now on they end the process."""
    for number in (*_SIGNALS, *_OTHERS):
        if signal.getsignal(number) == _on_signal:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def borrowed() -> Iterator[None]:
    """While open the signals may be taken over; then whoever had them before has them again.

    Raises:
        KeyboardInterrupt: in place of `Preempted`, where Ctrl-C asked for it.
    """
    global _received, _deferred
    main = threading.current_thread() is threading.main_thread()
    taken = (*_SIGNALS, *_OTHERS, signal.SIGPIPE) if main else ()
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    except Preempted as error:
        if _received == signal.SIGINT:
            raise KeyboardInterrupt(str(error)) from None
        raise
    finally:
        _received, _deferred = 0, False
        for number, handler in before.items():
            if handler is not None:  # a library's, not Python's
                signal.signal(number, handler)


def defer() -> None:
    """From now on a first signal only asks; the training loop answers at the next step border."""
    global _deferred
    _deferred = True
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a plug-in may have made it end the process


def request() -> None:
    """Ask this process to stop, as a signal would; once, as a second one would mean "at once"."""
    if not _received:
        _on_signal(signal.SIGTERM, None)  # sent it would end a process whose main thread is another


def received() -> int:
    """Number of the signal that asked to stop; 0: none."""
    return _received


def received_name() -> str:
    """Its name, such as SIGTERM; empty: none."""
    if _received in (*_SIGNALS, *_OTHERS[:6]):
        return signal.Signals(_received).name
    return f"signal {_received}" if _received else ""


def _on_signal(number: int, frame: FrameType | None) -> None:
    # Only assignments: handlers are re-entered, and locks (threading.Event.set too) deadlock here.
    global _received, _received_at
    now = time.monotonic()
    if _received:
        if now - _received_at > _REPEAT_SECONDS:
            os._exit(EXIT_PREEMPTED)
        return
    _received, _received_at = number, now
    if not _deferred:
        raise Preempted(f"stopped by {received_name()} before the first step")


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, by SIGKILL too; on Linux."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
