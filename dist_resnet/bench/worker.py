"""One rank of a candidate: python -m dist_resnet.bench.worker '{"task": ..., ...}'

Started by `jobs.Worker`; useless by hand.
"""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_resnet.base.cli import run_command
from dist_resnet.base.errors import EXIT_DONE, DistResnetError
from dist_resnet.bench.gate import Finished, RankGate
from dist_resnet.bench.measure import one_line
from dist_resnet.config.load import load_config

# Imported when asked for: a task's libraries are nobody else's.
TASKS = {
    "ours": "our_loop:train",
    "reference": "reference_loop:train",
    "all_reduce": "network:all_reduce_turns",
    "peer": "peer_loops:train",
}


def main(arguments: Sequence[str]) -> int:
    """Run the task until its gate closes; the exit code."""
    import torch

    from dist_resnet.distributed.group import start, stop

    spec: dict[str, Any] = json.loads(arguments[0])
    config = load_config(spec["pairs"])
    # A rank may stand at the gate for minutes, which to a process group looks like a hang.
    world = start(config.parallel.device, timeout_seconds=24 * 3600)
    is_cuda = world.device.type == "cuda"
    gate = RankGate(world.is_main, torch.cuda.synchronize if is_cuda else _nothing)
    module, name = TASKS[spec["task"]].split(":")
    try:
        task: Callable[..., None] = getattr(
            importlib.import_module(f"dist_resnet.bench.{module}"), name
        )
        task(config, world, gate, **spec["options"])
    except Finished:
        pass
    except Exception as error:
        gate.tell("failed", str(error) if isinstance(error, DistResnetError) else one_line(error))
        raise
    stop()
    return EXIT_DONE


def _nothing() -> None:
    """In place of a wait for the device: a CPU is done when the call returns."""


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
