"""What torchrun tells its workers through the environment. Imports nothing heavy."""

import os

from dist_resnet.base.errors import UserError

PARENT = os.getppid()
"""Process that started this one, as seen when this module was first imported."""


def environment_int(name: str, default: int, least: int = 0) -> int:
    """A number that torchrun sets; empty is as good as not set.

    Raises:
        UserError: it is no whole number, or below `least`.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = int(text) if text else default
    except ValueError:
        value = least - 1
    if value < least:
        wanted = f"a whole number from {least} on"
        raise UserError(f"{name}={text}: must be {wanted}; torchrun sets it, or unset it")
    return value


def environment_rank() -> int:
    """This process's rank; 0 without torchrun."""
    rank, size = environment_int("RANK", 0), environment_world_size()
    if rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; torchrun sets them")
    return rank


def environment_world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return environment_int("WORLD_SIZE", 1, least=1)


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
