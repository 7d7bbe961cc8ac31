"""What every command does around its work: exit codes, and one line for an error, once."""

import argparse
import atexit
import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from dist_resnet.base import signals
from dist_resnet.base.errors import (
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_USER,
    DistResnetError,
    OutOfMemory,
    PeerLost,
    Preempted,
    UserError,
    first_line,
    is_of_gpu_memory,
    one_line,
)
from dist_resnet.base.home import ensure_home
from dist_resnet.base.launcher import environment_int, under_torchrun
from dist_resnet.base.paths import printable
from dist_resnet.base.terminal import open_standard_streams, say

# torchrun ends all ranks as soon as one has left: the others let the node's first speak first.
_PATIENCE_SECONDS = 10.0
# A path that may not be entered, or that no file can have: asking whether it is there raises.
_NO_WAY = (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # and EIO of no file: a terminal that has closed


class _Shown(SystemExit):
    """The help that was asked for stands on the screen."""


class Parser(argparse.ArgumentParser):
    """A command line as every command has it: its text as it stands, an error as one line.

    Args:
        prog: the command, such as `python -m dist_resnet.report`.
        description: the text of its --help, usually the module's.
    """

    def __init__(
        self, prog: str | None = None, description: str | None = None, **options: Any
    ) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=description, formatter_class=form, allow_abbrev=False, **options
        )

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Shown(status)

    def error(self, message: str) -> NoReturn:
        name = self.prog.removeprefix("python -m ").removeprefix("dist_resnet.")
        raise UserError(f"{name}: {message}; see --help")

    def print_help(self, file: Any = None) -> None:
        """From one process only, where torchrun started several."""
        if environment_int("RANK", 0) == 0:
            super().print_help(file)


def run_command(action: Callable[[], int]) -> NoReturn:
    """Run `action` and exit with its code, or with that of its `DistResnetError`."""
    open_standard_streams()
    ensure_home()
    try:
        code = action()
        sys.stdout.flush()  # where printing is the result it must have worked
    except (DistResnetError, Preempted) as error:
        code = _say_once(error)
    except KeyboardInterrupt:
        code = EXIT_PREEMPTED
        say("dist_resnet: interrupted", sys.stderr)
    except _Shown:
        code = EXIT_DONE
    except SystemExit as error:  # of somebody's code that we call; 0 would look like success
        code = _say_once(DistResnetError(f"ended by a call of sys.exit({error.code!r})"))
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        code = 1
    except UnicodeEncodeError as error:  # a file's name, in a locale that is neither C nor UTF-8
        name = str(error.object)[:200]
        code = _say_once(UserError(f"{name}: no name for a file here; set LC_ALL=C.UTF-8"))
    except OSError as error:
        if error.errno in _NO_WAY and error.filename:
            code = _say_once(UserError(f"{error.filename}: {error.strerror}"))
        elif error.errno not in _NO_ROOM and (error.errno != errno.EIO or error.filename):
            code = _traceback(error)
        else:
            place = error.filename or "the output"
            say(f"dist_resnet: {place}: cannot be written: {error.strerror}", sys.stderr)
            code = EXIT_USER
    except Exception as error:
        if is_of_gpu_memory(error):
            code = _say_once(OutOfMemory(f"{first_line(error)}; free the GPU, or use a larger one"))
        else:
            code = _traceback(error)
    _leave(code)


def _say_once(error: DistResnetError | Preempted) -> int:
    """Print the error's line, from one rank of this machine where all have it; its exit code."""
    signals.reset()
    first, line = _speaks(), printable(str(error))  # one, whatever names and values it tells
    if not (first or isinstance(error, PeerLost | Preempted)):
        time.sleep(_PATIENCE_SECONDS)
    if first or (isinstance(error, DistResnetError) and error.of_one_rank):
        say(f"dist_resnet: {line}", sys.stderr)
    if not isinstance(error, Preempted):
        _tell_torchrun(line)
    return error.exit_code


def _traceback(error: Exception) -> int:
    """Show what nobody foresaw; 1. One process alone leaves that to the interpreter, or a debugger.

    A rank may not: in the interpreter's tear-down NCCL would wait for ranks that still train.
    """
    _tell_torchrun(one_line(error))
    if not under_torchrun():
        raise error
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


def _speaks() -> bool:
    """Whether this process shows an error that all ranks have met."""
    try:
        return environment_int("LOCAL_RANK", 0) == 0
    except DistResnetError:  # it may be the error itself
        return True


def _tell_torchrun(line: str) -> None:
    """Write `line` to where torchrun looks for the reason that its report of a failure gives."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    # The format of torch.distributed.elastic's ErrorHandler, without a traceback.
    message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(file, "w") as out:
        json.dump({"message": message}, out)


def _leave(code: int) -> NoReturn:
    """Run the exit hooks, then end without the interpreter's own tear-down.

    A daemon thread of a library that wakes up during it aborts the process (FFCV's and numba's do,
    seldom), and torchrun then calls a finished training failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
