"""How a run ended, as its status and its one line tell it."""

import atexit
from collections.abc import Callable
from typing import NoReturn

from dist_resnet.base.errors import (
    DistResnetError,
    Diverged,
    OutOfMemory,
    Preempted,
    UserError,
    first_line,
    is_of_memory,
)
from dist_resnet.runs.folder import RunFolder


def ending(error: BaseException) -> tuple[str, str, int]:
    """State, reason and exit code for status.json."""
    state, code = "preempted" if isinstance(error, Preempted) else "failed", 1
    if isinstance(error, DistResnetError | Preempted):
        reason, code = str(error), error.exit_code
    elif isinstance(error, SystemExit):
        reason = f"the training was ended by a call of sys.exit({error.code!r})"
    elif is_of_memory(error):
        code = UserError.exit_code
        reason = (
            "out of memory: choose a smaller data.batch_size_per_replica or model.widths"
            f" ({first_line(error)[:120]})"
        )
    else:
        reason = f"{type(error).__name__}: {error}"
    return state, reason, code


def tell_ending(error: BaseException, folder: RunFolder) -> None:
    """Write it to status.json; if the run had not begun, to .refused, if it was refused.

    An existing run's status stays as it was then.
    """
    status, reason, code = ending(error)
    if folder.begun:
        folder.set_status(status, folder.status().get("step", 0), reason, code)
    elif code == UserError.exit_code:
        folder.refuse(reason, code)


def at_exit(main: bool, folder: RunFolder) -> Callable[[], None]:
    """Let the status tell it, should Python end before the training, which runs in a thread then.

    Returns:
        What ends this: the training has ended first.
    """

    def tell() -> None:
        if main and folder.begun:
            step = folder.status().get("step", 0)
            folder.set_status("failed", step, "the interpreter ended; start again to continue", 1)
            folder.ended = True

    atexit.register(tell)
    return lambda: atexit.unregister(tell)


def raise_told(error: BaseException) -> NoReturn:
    """Raise it, as one line where there is one to say."""
    if isinstance(error, SystemExit):  # it may say 0, which means a complete training
        raise DistResnetError(ending(error)[1]) from None
    if is_of_memory(error):
        raise OutOfMemory(ending(error)[1]) from None
    raise error


def of_all_ranks(error: BaseException) -> bool:
    """Whether it is raised on all ranks, on each at the same place."""
    alone = isinstance(error, DistResnetError) and error.of_one_rank
    return isinstance(error, UserError | Diverged | Preempted) and not alone
