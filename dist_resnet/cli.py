"""What every command does around its work: exit codes, and one line for an error, once."""

import argparse
import atexit
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from dist_resnet.errors import (
    EXIT_PREEMPTED,
    DistResnetError,
    OutOfMemory,
    PeerLost,
    Preempted,
    UserError,
    first_line,
    one_line,
)
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
    try:
        code = action()
    except (DistResnetError, Preempted) as error:
        code = _say_once(error)
    except KeyboardInterrupt:
        code = EXIT_PREEMPTED
        print("dist_resnet: interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        # torch is not imported here: a command that has not needed it so far does not.
        if not isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
            _tell_torchrun(one_line(error))
            raise
        code = _say_once(OutOfMemory(f"{first_line(error)}; free the GPU, or use a larger one"))
    _leave(code)


def _say_once(error: DistResnetError | Preempted) -> int:
    """Print the error's line, from one rank of this machine where all have it; its exit code."""
    _reset_signals()
    first = environment_int("LOCAL_RANK", 0) == 0
    if not (first or isinstance(error, PeerLost | Preempted)):
        time.sleep(_PATIENCE_SECONDS)
    if first or (isinstance(error, DistResnetError) and error.of_one_rank):
        print(f"dist_resnet: {error}", file=sys.stderr, flush=True)
    if not isinstance(error, Preempted):
        _tell_torchrun(str(error))
    return error.exit_code


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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reset_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
