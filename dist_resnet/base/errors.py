"""How a run can end other than well, and the exit code of each (docs/usage.md)."""

import sys

EXIT_DONE = 0
EXIT_USER = 2
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start me again


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """The type and the whole text of an error, at most 200 characters on one line."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:200]


def is_of_gpu_memory(error: BaseException) -> bool:
    """Whether it is torch's error of a full GPU; torch is not loaded to find out."""
    return isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ()))


def is_of_memory(error: BaseException) -> bool:
    """Whether it says that memory, a GPU's or the machine's, was not enough."""
    if isinstance(error, MemoryError) or is_of_gpu_memory(error):
        return True
    # The CPU's allocator has no exception of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class DistResnetError(Exception):
    """Ends the process with `exit_code` and one line on stderr, never a traceback."""

    exit_code = 1
    of_one_rank = False
    """Whether one rank alone may meet it; then each that does prints its line."""


class UserError(DistResnetError):
    """Something the user can mend: configuration, data, environment. It says what to change."""

    exit_code = EXIT_USER


class Diverged(DistResnetError):
    """The loss or the gradient stopped being finite."""

    exit_code = EXIT_DIVERGED


class Preempted(BaseException):
    """A signal asked the run to stop; its state is saved and the same command continues it.

    No Exception: raised by a signal handler, it must pass every `except Exception` on its way.
    """

    exit_code = EXIT_PREEMPTED


class PeerLost(DistResnetError):
    """Another rank died or hung: the job ends here, its last checkpoint is what counts."""

    of_one_rank = True


class StepError(UserError):
    """The user's own code failed within a step, where the other ranks wait for this one."""

    of_one_rank = True


class OutOfMemory(UserError):
    """A GPU or a process is full. It says what would fit, or be smaller."""

    of_one_rank = True
