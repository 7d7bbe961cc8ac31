"""`import ffcv`, without its side effects."""

from typing import Any

import numba
import numba.typed
import torch


def import_ffcv() -> None:
    """Import ffcv; later `from ffcv import ...` lines find it loaded.

    Three things FFCV 1.0.2 does at import are prevented:

    - It keeps two constants in a numba dictionary, whose methods are compiled at once: nine tenths
      of its 3 seconds. It reads them from Python only, so a plain dictionary serves.
    - It has numba launch a thread pool (TBB's where that is installed), which decoding with one
      worker never uses, and which can abort the process as it exits.
    - It sets torch's number of threads to one.
    """
    threads = torch.get_num_threads()
    replaced = numba.typed.Dict, numba.set_num_threads
    numba.typed.Dict, numba.set_num_threads = dict, _keep_num_threads
    try:
        import ffcv  # noqa: F401
    finally:
        numba.typed.Dict, numba.set_num_threads = replaced
        torch.set_num_threads(threads)


def _keep_num_threads(n: Any) -> None:
    """In place of numba.set_num_threads, inside FFCV."""
