"""What the user's own code raises within a step: one line, of the rank that met it."""

from collections.abc import Iterator
from contextlib import contextmanager

from dist_resnet.base.errors import StepError, UserError
from dist_resnet.config.plugins import calling
from dist_resnet.machine.gpu_memory import is_of_memory


@contextmanager
def within_step(key: str, name: str) -> Iterator[None]:
    """As `plugins.calling`, for calls that other ranks need not see fail.

    Raises:
        StepError: in place of any other exception; a lack of memory and our own errors pass.
    """
    try:
        with calling(key, name):
            yield
    except UserError as error:
        cause = error.__cause__
        if cause is not None and is_of_memory(cause):
            raise cause from None
        if error.of_one_rank:
            raise
        raise StepError(str(error)) from cause
