"""Start trainings as users do, kill them, and compare where they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dist_resnet.runs.store import CheckpointStore
from dist_resnet.step.precision import choose_precision
from tests.helpers.preloaded import Command

ROOT = Path(__file__).parents[2]
BF16 = pytest.param(
    "bf16",
    marks=pytest.mark.skipif(
        choose_precision("auto", torch.device("cpu"))[0] != "bf16",
        reason="whole runs in bf16 take minutes where the processor emulates it",
    ),
)
Job = subprocess.Popen[bytes] | Command
HELD = 12
"""The step at which `launch_held` waits."""


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str


def command(
    ranks: int, restarts: int, settings: list[str], module: str = "dist_resnet.train"
) -> list[str]:
    """A training under torchrun; with ranks=0, in a plain process."""
    if ranks == 0:
        return [sys.executable, "-m", module, *settings]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [
        *torchrun,
        f"--nproc_per_node={ranks}",
        f"--max-restarts={restarts}",
        "-m",
        module,
        *settings,
    ]


def launch(arguments: list[str], log: Path) -> Job:
    """Start a command; a Python module is forked off a process that has imported torch.

    Where the environment says what is loaded first of all, it is started anew.
    """
    # As the launchers set them: without the first no restart works with gloo.
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if arguments[:2] == [sys.executable, "-m"] and "LD_PRELOAD" not in environment:
        return Command(arguments[2], arguments[3:], log, environment)
    with log.open("ab") as out:
        return subprocess.Popen(
            arguments, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment
        )


def run_job(
    ranks: int,
    settings: list[str],
    folder: Path,
    seconds: float = 200,
    module: str = "dist_resnet.train",
) -> Outcome:
    """Run to the end; every process of it is gone afterwards."""
    log = folder / f"job-{time.monotonic_ns()}.log"
    job = launch(command(ranks, 0, settings, module), log)
    try:
        code = job.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {seconds} s:\n{log.read_text()[-3000:]}") from None
    finally:
        kill_tree(job)
    return Outcome(code, log.read_text())


def launch_held(
    ranks: int, settings: list[str], log: Path, restarts: int = 0, file: Path | None = None
) -> Job:
    """A training whose last rank waits at step HELD: until it is asked to stop, or `file` is there.

    No race with a fast machine: it cannot end before what the test does to it.
    """
    held = [f"hold:{file}" if file else "hold", str(max(0, ranks - 1)), str(HELD)]
    return launch(command(ranks, restarts, [*held, *settings], "tests.helpers.faulty_train"), log)


def workers(agent: Job) -> list[psutil.Process]:
    try:
        children = psutil.Process(agent.pid).children()
        modules = ("dist_resnet.train", "tests.helpers.faulty_train")
        return [p for p in children if any(name in p.cmdline() for name in modules)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(agent: Job) -> None:
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


def wait_for_step(run: Path, step: int, agent: Job, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and agent.poll() is None and current_step(run) < step:
        time.sleep(0.01)


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix, values


def final_state(run: Path) -> dict[str, Any]:
    found = CheckpointStore(run / "checkpoints", 3).newest(print)
    assert found, f"no checkpoint in {run}"
    return dict(leaves(vars(found[1].state)))


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
