"""Seconds from the command to the first step's figures, beside importing torch alone."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dist_resnet.base.errors import UserError
from dist_resnet.bench.measure import Run, figure, measure
from dist_resnet.bench.report import Report, Settings

TABLE = "seconds to the first step"
OURS = "dist_resnet: "  # how an error of ours begins
_IMPORT = [sys.executable, "-c", "import torch; print('step 1/', flush=True)"]


def run(settings: Settings) -> Report:
    """Start each command anew in every round."""
    report = Report("startup", plot=(TABLE, "seconds"))
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import torch": _IMPORT,
            "ours": _training(1, settings.pairs, folder),
            "ours, 2 ranks": _training(2, settings.pairs, folder),
        }
        candidates = {name: partial(_ready, command) for name, command in commands.items()}
        timings = measure(candidates, settings.rounds)
    for timing in timings.values():
        found = figure("seconds", timing.seconds) | {"rounds": len(timing.seconds)}
        failed = {"failure": timing.failure}
        report.add(TABLE, {"name": timing.name} | (failed if timing.failure else found))
    report.notes.append(
        "until the first step's line is printed; the dataset is prepared and its checksums are"
        " verified, the C++ kernels are compiled already, W&B is offline"
    )
    return report


def _ready(command: Sequence[str]) -> tuple[int, Run]:
    return 1, partial(_until_first_step, command)


def _training(ranks: int, pairs: Sequence[str], folder: str) -> list[str]:
    own = (
        f"run.dir={folder}", "run.name=startup", "run.overwrite=true", "log.every_steps=1",
        "wandb.mode=offline",
    )  # fmt: skip
    launcher = [sys.executable]
    if ranks > 1:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        launcher = [torchrun, "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "-m", "dist_resnet.train", *pairs, *own]


def _until_first_step(command: Sequence[str]) -> float:
    """Start it, wait for its first step, stop it.

    Raises:
        UserError: it ended before.
    """
    start, said = time.perf_counter(), ""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as job:  # fmt: skip
        assert job.stdout is not None
        try:
            for line in job.stdout:
                if line.startswith("step 1/"):
                    return time.perf_counter() - start
                if not said.startswith(OURS):  # after it comes torchrun's report
                    said = line.strip() or said
            raise UserError(said.removeprefix(OURS) or f"ended with exit code {job.wait()}")
        finally:
            job.terminate()  # it saves and ends
            job.stdout.read()
