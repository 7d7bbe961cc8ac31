"""The settings that wandb.init gets. Importing this imports no wandb."""

import os
from collections.abc import Callable
from typing import Any


def wandb_options(
    wandb: Any, init_seconds: float, finish_seconds: float, on_stop: Callable[[], None]
) -> dict[str, Any]:
    """Settings by name, those that this version of wandb does not have left out."""
    wanted: dict[str, Any] = {
        "silent": True,  # our own line says it; wandb's ten would break the progress line
        "console": "off",  # 4 s of a live progress line are 112 KB of control codes in its log
        "init_timeout": init_seconds,
        "login_timeout": 1,  # should a prompt come up after all
        "finish_timeout": finish_seconds,  # default: retries for 7 days
        "finish_timeout_raises": True,
        # Default 15 s, and nothing is flushed when the trainer is killed: 15 s of rows lost.
        "x_transaction_log_flush_interval": 1.0,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,  # the configuration has the commit; the diff may hold anything
        "x_disable_meta": True,  # holds the SLURM_* environment variables and the command line
        "x_stats_track_process_tree": True,
        # torchrun's process is the root of all ranks on this machine.
        "x_stats_pid": os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid(),
        "stop_fn": on_stop,  # default: SIGINT to rank 0 alone; the others hang in all-reduce
    }
    known = getattr(wandb.Settings, "model_fields", wanted)
    return {key: value for key, value in wanted.items() if key in known}
