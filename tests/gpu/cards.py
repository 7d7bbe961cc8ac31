"""What only several GPUs can show, in some minutes: python -m tests.gpu.cards OUT.json

NCCL in a captured step, every kind of ending, and the same training by 1, 2, 4 ... ranks.

    --rehearse      on CPUs, by two processes and gloo

Further arguments are key=value pairs for the trainings. OUT.json is written anew after each part.
"""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.jobs import (
    command,
    differences,
    kill_tree,
    launch,
    metric_rows,
    run_job,
    wait_for_step,
    workers,
)

PATIENCE = 120


def _settings(folder: Path, name: str, steps: int, *pairs: str) -> list[str]:
    return [
        f"run.dir={folder}", f"run.name={name}", f"data.root={folder / 'data'}",
        "data.dataset=digits", "wandb.mode=disabled", "train.epochs=50",
        f"train.max_steps={steps}", "log.every_steps=10", "checkpoint.every_steps=50", *pairs,
    ]  # fmt: skip


def agreement(folder: Path, ranks: list[int], pairs: list[str]) -> dict[str, Any]:
    """Exact: the same bits on any number of ranks. Fast: the same loss, up to rounding."""
    most, found = ranks[-1], {}
    for reduction in ("exact", "fast"):
        keys = [f"parallel.replicas={most}", f"parallel.reduction={reduction}", *pairs]
        runs = []
        for count in ranks:
            name = f"{reduction}{count}"
            outcome = run_job(count, _settings(folder, name, 40, *keys), folder, PATIENCE)
            assert outcome.code == 0, outcome.output[-500:]
            runs.append(folder / name)
        found[f"{reduction}: losses of the last ten steps"] = [
            [row for row in metric_rows(run) if "train/loss" in row][-1]["train/loss"]
            for run in runs
        ]
        if reduction == "exact":
            found["exact: values that differ"] = [
                len(differences(runs[0], run)) for run in runs[1:]
            ]
    return found


def stopped_and_continued(folder: Path, ranks: list[int], pairs: list[str]) -> dict[str, Any]:
    """SIGTERM to torchrun in the middle of a captured training; then the same command again."""
    settings = _settings(folder, "stopped", 100_000, "train.epochs=100000", *pairs)
    job = launch(command(ranks[-1], 0, settings), folder / "log")
    try:
        wait_for_step(folder / "stopped", 100, job, PATIENCE)
        start = time.monotonic()
        job.send_signal(signal.SIGTERM)
        job.wait(PATIENCE)
        seconds = time.monotonic() - start
    finally:
        kill_tree(job)
    status = json.loads((folder / "stopped" / "status.json").read_text())
    assert status["exit_code"] == 75, status
    more = [*settings, f"train.max_steps={status['step'] + 20}"]
    outcome = run_job(ranks[-1], more, folder, PATIENCE)
    assert outcome.code == 0, outcome.output[-500:]
    return {"seconds from SIGTERM to the end": seconds, "stopped at step": status["step"]}


def killed_rank(folder: Path, ranks: list[int], pairs: list[str]) -> dict[str, Any]:
    """One rank is killed: the others must end, with a line, within the time limit."""
    keys = ["train.epochs=100000", "parallel.timeout_seconds=20", *pairs]
    job = launch(
        command(ranks[-1], 0, _settings(folder, "killed", 100_000, *keys)), folder / "log2"
    )
    try:
        wait_for_step(folder / "killed", 100, job, PATIENCE)
        start = time.monotonic()
        workers(job)[-1].kill()
        job.wait(PATIENCE)
        seconds = time.monotonic() - start
    finally:
        kill_tree(job)
    lines = (folder / "log2").read_text().splitlines()
    return {
        "seconds to the end": seconds,
        "lines": [line for line in lines if line.startswith("dist_resnet:")],
    }


def diverging(folder: Path, ranks: list[int], pairs: list[str]) -> dict[str, Any]:
    """All ranks end with exit code 3."""
    start = time.monotonic()
    settings = _settings(folder, "diverging", 200, "optim.lr=1e9", *pairs)
    run_job(ranks[-1], settings, folder, PATIENCE)
    status = json.loads((folder / "diverging" / "status.json").read_text())
    assert status["exit_code"] == 3, status
    return {"seconds, start included": time.monotonic() - start}


PARTS: list[Callable[[Path, list[int], list[str]], dict[str, Any]]] = [
    stopped_and_continued,
    diverging,
    killed_rank,
    agreement,
]


def main(arguments: list[str]) -> int:
    """Run the parts; 0 if each did what it should."""
    rehearsed = "--rehearse" in arguments
    rest = [argument for argument in arguments if argument != "--rehearse"]
    cards = torch.cuda.device_count()
    if not rest or not (rehearsed or cards >= 2):
        print(f"{__doc__}\n{cards} GPUs here", file=sys.stderr)
        return 2
    ranks = [1, 2] if rehearsed else [n for n in (1, 2, 4, 8) if n <= cards]
    pairs = rest[1:] + (["model.widths=[8,8,8]"] if rehearsed else [])
    found: dict[str, Any] = {"cards": cards, "ranks": ranks}
    with tempfile.TemporaryDirectory() as name:
        for part in PARTS:
            try:
                found[part.__name__] = part(Path(name), ranks, pairs)
            except Exception as error:
                found[part.__name__] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            print(part.__name__, found[part.__name__], flush=True)
            Path(rest[0]).write_text(json.dumps(found, indent=1))
    return int(any("failed" in value for value in found.values() if isinstance(value, dict)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
