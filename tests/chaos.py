"""Kill a training at random moments and compare where it ends with the undisturbed run.

    python tests/chaos.py --data DIR [--dataset cifar10] [--ranks 2] [--dtype fp32] [--kills 6] [--trees 3]

Kills single ranks (torchrun restarts them) and whole process trees (a new start continues), then
compares weights, optimizer state, metrics and totals bit by bit. Exit 0: all equal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_resnet.checkpoint import CheckpointStore

STEPS = 120
SAVE_EVERY = 10


def command(ranks: int, restarts: int, settings: list[str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [
        *torchrun,
        f"--nproc_per_node={ranks}",
        f"--max-restarts={restarts}",
        "-m",
        "dist_resnet.train",
        *settings,
    ]


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


def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    # As the launchers set them: without the first no restart works with gloo.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(
            arguments, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment
        )


def workers(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(agent.pid).children()
        return [p for p in children if "dist_resnet.train" in " ".join(p.cmdline())]
    except psutil.NoSuchProcess:
        return []


def kill_tree(agent: subprocess.Popen[bytes]) -> None:
    try:
        tree = [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    agent.wait()


def current_step(run: Path) -> int:
    try:
        return int(json.loads((run / "status.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0


def wait_for_step(run: Path, step: int, agent: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and agent.poll() is None and current_step(run) < step:
        time.sleep(0.01)


def disturbed_run(
    folder: Path, base: list[str], ranks: list[int], kills: int, trees: int, rng: random.Random
) -> int:
    """Train run "disturbed" through `kills` dead ranks and `trees` dead jobs; the number of starts.

    Args:
        ranks: world sizes, one chosen at each start.
    """
    run, log, starts = folder / "disturbed", folder / "disturbed.log", 0
    faults = ["rank"] * kills + ["tree"] * trees
    rng.shuffle(faults)
    while True:
        starts += 1
        agent = launch(command(rng.choice(ranks), len(faults), base), log)
        while faults and agent.poll() is None:
            # Anywhere from start-up to the last step; the later faults leave room for the next.
            step = current_step(run)
            aim = step + rng.randint(0, max(1, (STEPS - step) // (len(faults) + 1)))
            wait_for_step(run, aim, agent, 60)
            time.sleep(rng.uniform(0, 0.3))
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
                time.sleep(rng.uniform(0.3, 6.0))
        code = agent.wait(timeout=300)
        if code == 0:
            return starts
        if starts > kills + trees + 5:
            raise RuntimeError(f"still failing after {starts} starts, see {log}")


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix, values


def final_state(run: Path) -> dict[str, Any]:
    found = CheckpointStore(run / "checkpoints", 3).newest(print)
    assert found, f"no checkpoint in {run}"
    return dict(leaves(found[1]["state"]))


def metric_rows(run: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds" and not k.startswith("perf/")}
        for line in lines
    ]


def differences(first: Path, second: Path) -> list[str]:
    """Names of state entries and metric rows that differ in at least one bit."""
    one, two = final_state(first), final_state(second)
    found = [
        name
        for name in one.keys() | two.keys()
        if not (
            torch.equal(one[name], two[name])
            if isinstance(one.get(name), torch.Tensor)
            else one.get(name) == two.get(name)
        )
    ]
    if metric_rows(first) != metric_rows(second):
        found.append("metrics.jsonl")
    return found


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
