"""What torchrun tells its workers through the environment. Imports nothing heavy."""

import os

PARENT = os.getppid()
"""Process that started this one, as seen when this module was first imported."""


def environment_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


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
