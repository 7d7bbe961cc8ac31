"""What torchrun tells its workers through the environment. Imports nothing heavy."""

import os


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
    """How often torchrun has restarted the workers of this job on this node."""
    return environment_int("TORCHELASTIC_RESTART_COUNT", 0)
