"""What every command does around its work: exit codes, and one line for an error, once."""

import argparse
import atexit
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from dist_resnet.errors import EXIT_PREEMPTED, DistResnetError, PeerLost, Preempted, UserError
from dist_resnet.launcher import environment_int

# torchrun ends all ranks as soon as one has left: the others let the node's first speak first.
_PATIENCE_SECONDS = 10.0


class Parser(argparse.ArgumentParser):
    """Errors as everywhere in this package: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        name = self.prog.removeprefix("python -m dist_resnet.")
        raise UserError(f"{name}: {message}; see --help")


def run_command(action: Callable[[], int]) -> NoReturn:
    """Run `action` and exit with its code, or with that of its `DistResnetError`."""
    show_everything()
    try:
        code = action()
    except (DistResnetError, Preempted) as error:
        _reset_signals()
        code = error.exit_code
        first = environment_int("LOCAL_RANK", 0) == 0
        if first or isinstance(error, PeerLost):
            print(f"dist_resnet: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, Preempted):
            time.sleep(_PATIENCE_SECONDS)
    except KeyboardInterrupt:
        code = EXIT_PREEMPTED
        print("dist_resnet: interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    _leave(code)


def show_everything() -> None:
    """What a terminal's encoding cannot hold is shown as \\xe9 or \\u2581, and ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave(code: int) -> NoReturn:
    """Run the exit hooks, then end without the interpreter's own tear-down.

    A daemon thread of a library that wakes up during it aborts the process (FFCV's and numba's do,
    seldom), and torchrun then calls a finished training failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reset_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
