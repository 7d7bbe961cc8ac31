"""Kill a training at random moments and compare where it ends with the undisturbed run.

    python -m tests.helpers.chaos --data DIR [--dataset cifar10] [--ranks 2] [--kills 6]

Kills single ranks (torchrun restarts them) and whole jobs (a new start continues), then compares
weights, optimizer state, metrics and totals bit by bit. Exit 0: all equal.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.jobs import (
    command,
    current_step,
    differences,
    kill_tree,
    launch,
    wait_for_step,
    workers,
)

STEPS = 120
SAVE_EVERY = 10


def settings_for(folder: Path, name: str, data: Path, dataset: str, extra: list[str]) -> list[str]:
    """A short run whose steps take milliseconds, so that kills fall everywhere in it."""
    return [
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.root={data}",
        f"data.dataset={dataset}",
        f"train.max_steps={STEPS}",
        f"checkpoint.every_steps={SAVE_EVERY}",
        "log.every_steps=7",
        "train.ema_decay=0.9",
        "wandb.mode=disabled",
        "parallel.timeout_seconds=30",
        *extra,
    ]


def disturbed_run(
    folder: Path,
    base: list[str],
    ranks: list[int],
    kills: int,
    trees: int,
    rng: random.Random,
    steps: int = STEPS,
) -> int:
    """Train run "disturbed" through `kills` dead ranks and `trees` dead jobs; the number of starts.

    Args:
        ranks: world sizes, one chosen at each start.
        steps: length of the run.
    """
    run, log, starts = folder / "disturbed", folder / "disturbed.log", 0
    faults = ["rank"] * kills + ["tree"] * trees
    rng.shuffle(faults)
    while True:
        starts += 1
        agent = launch(command(rng.choice(ranks), len(faults), base), log)
        while faults and agent.poll() is None:
            # Anywhere from start-up to the last fifth, which a fast machine must not reach before
            # the last fault; every fault leaves room for the next.
            step = current_step(run)
            room = max(1, (steps * 4 // 5 - step) // (len(faults) + 1))
            wait_for_step(run, step + rng.randint(0, room), agent, 60)
            wait_for_step(run, step + room, agent, rng.uniform(0, 0.3))
            victims = workers(agent)
            if not victims:
                time.sleep(0.05)
                continue
            if faults.pop() == "tree":
                kill_tree(agent)
            else:
                victim = rng.choice(victims)
                victim.send_signal(signal.SIGKILL)
                victim.wait(10)
                wait_for_step(run, current_step(run) + room, agent, rng.uniform(0.3, 6.0))
        code = agent.wait(timeout=300)
        if code == 0:
            assert not faults, f"the run ended before {len(faults)} of its faults"
            return starts
        if starts > kills + trees + 5:
            raise RuntimeError(f"still failing after {starts} starts, see {log}")


def undisturbed_run(folder: Path, name: str, ranks: int, settings: list[str]) -> Path:
    log = folder / f"{name}.log"
    code = launch(command(ranks, 0, settings), log).wait(timeout=600)
    assert code == 0, log.read_text()[-2000:]
    return folder / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared datasets")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--trees", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    extra = [f"precision.dtype={options.dtype}"]
    data = options.data.resolve()
    plain = settings_for(folder, "undisturbed", data, options.dataset, extra)
    undisturbed_run(folder, "undisturbed", options.ranks, plain)
    base = settings_for(folder, "disturbed", data, options.dataset, extra)
    rng = random.Random(options.seed)
    began = time.monotonic()
    starts = disturbed_run(folder, base, [options.ranks], options.kills, options.trees, rng)
    found = differences(folder / "undisturbed", folder / "disturbed")
    print(
        f"{options.ranks} ranks, {options.dtype}: {options.kills} killed ranks, {options.trees} "
        f"killed jobs, {starts} starts, {time.monotonic() - began:.0f} s: "
        + ("bitwise equal" if not found else f"DIFFER: {found}")
    )
    if not found:
        shutil.rmtree(folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
