"""A rank that makes no progress ends itself, its stack in the log, instead of stopping all others.

faulthandler's timer is a C thread: it works when the interpreter's lock is held by the hang.
"""

import faulthandler
import time
from collections.abc import Callable

_REARM_SECONDS = 0.5  # re-arming starts a thread (about 60 us), too much for every step of a GPU

_timeout: float = 0.0
_armed_at: float = 0.0


def arm(timeout_seconds: float) -> None:
    """From now on `rearm` must be called at least every `timeout_seconds`."""
    global _timeout
    _timeout = timeout_seconds
    rearm(now=True)


def rearm(now: bool = False) -> None:
    """Report progress."""
    global _armed_at
    moment = time.monotonic()
    if _timeout and (now or moment - _armed_at > _REARM_SECONDS):
        _armed_at = moment
        faulthandler.dump_traceback_later(_timeout, exit=True)


def disarm() -> None:
    global _timeout
    _timeout = 0.0
    faulthandler.cancel_dump_traceback_later()


def call_as(label: str, action: Callable[[], None]) -> None:
    """Call `action` from a frame whose file name is `label`.

    faulthandler prints frames only: this is how its report says which rank hung.
    """
    exec(compile("action()", f"<{label}>", "exec"), {"action": action})
