"""What torchrun tells its workers through the environment. Imports nothing heavy."""

import os

from dist_resnet.base.errors import UserError

PARENT = os.getppid()
"""Process that started this one, as seen when this module was first imported."""


def environment_int(name: str, default: int) -> int:
    """A number that torchrun sets; empty is as good as not set.

    Raises:
        UserError: it is no whole number.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = int(text) if text else default
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"{name}={text}: must be a whole number; torchrun sets it, or unset it")
    return value


def environment_rank() -> int:
    """This process's rank; 0 without torchrun."""
    return environment_int("RANK", 0)


def environment_world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return environment_int("WORLD_SIZE", 1)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """How often torchrun has restarted the workers of this job on this node after a failure.

    Restarts because a node joined or left do not count: see `job_id`.
    """
    return environment_int("TORCHELASTIC_RESTART_COUNT", 0)


def job_id() -> str:
    """What torchrun calls this job, the same on all nodes and in all restarts; may be empty."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name
