"""A rank that makes no progress ends itself, its stack in the log, instead of stopping all others.

faulthandler's timer is a C thread: it works when the interpreter's lock is held by the hang.
"""

import faulthandler
import time
from collections.abc import Callable

_REARM_SECONDS = 0.5  # re-arming starts a thread (about 60 us), too much for every step of a GPU

_armed_at: float | None = None
_timeout: float = 0.0


def rearm(timeout_seconds: float | None = None) -> None:
    """Report progress. Once a time limit was given, this must be called again before it is over.

    Args:
        timeout_seconds: None: the one given before, if any.
    """
    global _armed_at, _timeout
    now = time.monotonic()
    _timeout = _timeout if timeout_seconds is None else timeout_seconds
    if _timeout and (_armed_at is None or now - _armed_at > _REARM_SECONDS):
        _armed_at = now
        # Descriptor 2: sys.stderr of a notebook has none.
        faulthandler.dump_traceback_later(_timeout, exit=True, file=2)


def disarm() -> None:
    global _armed_at, _timeout
    _armed_at, _timeout = None, 0.0
    faulthandler.cancel_dump_traceback_later()


def call_as(label: str, action: Callable[[], None]) -> None:
    """Call `action` from a frame whose file name is `label`.

    faulthandler prints frames only: this is how its report says which rank hung.
    """
    exec(compile("action()", f"<{label}>", "exec"), {"action": action})
