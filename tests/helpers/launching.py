"""Run the launchers: with a stand-in for Python that plays a scenario, or with real trainings."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import ROOT

LAUNCH = ROOT / "launch"

STEPS = 120
EPOCH = 89
"""Steps in an epoch of `training`: 1,437 digits, 2 x 8 in each."""
PATIENCE = 240.0
"""Seconds to wait for what takes ten on an idle machine."""

_MARK = "DIST_RESNET_TEST_JOB"
_numbers = itertools.count()
_marks: dict[int, str] = {}

# $PYTHON of run.sh: answers where the run folder is, $GPUS and $UNBOUND; as torchrun it plays the
# next line of the scenario, or the last one again.
_FAKE_PYTHON = r"""#!/usr/bin/env bash
if [[ $1 == - ]]; then
    cat >/dev/null
    printf '%s\n%s\n%s\n' "$RUN" "${GPUS:-0}" "${UNBOUND:-}"
    exit
fi
printf '%s\n' "$*" >>"$FAKE/calls"
env >"$FAKE/environment"
status() {  # STATE STEP [CODE]
    printf '{\n  "state": "%s",\n  "step": %s,\n  "reason": "a \\"test\\", it is"%s\n}\n' \
        "$1" "$2" "${3:+,
  \"exit_code\": $3}" >"$RUN/new" && mv "$RUN/new" "$RUN/status.json"
}
number=$(wc -l <"$FAKE/calls") lines=$(wc -l <"$FAKE/scenario")
eval "$(sed -n "$((number < lines ? number : lines))p" "$FAKE/scenario")"
"""


class Stage:
    """A folder with a scenario: a line of bash for each start of torchrun."""

    def __init__(self, folder: Path, scenario: Sequence[str], **environment: str) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "scenario").write_text("".join(f"{line}\n" for line in scenario))
        fake = folder / "python"
        fake.write_text(_FAKE_PYTHON)
        fake.chmod(0o755)
        own = {"FAKE": str(folder), "RUN": str(self.run), "PYTHON": str(fake)}
        self.environment = own | {"BACKOFF": "0", "REJOIN": "1", "LOCK_WAIT": "1"} | environment

    def start(self, script: str, *arguments: str) -> subprocess.Popen[bytes]:
        return start([str(LAUNCH / script), *arguments], self.folder / "log", self.environment)

    def play(self, script: str = "run.sh", *arguments: str) -> int:
        """The exit code of one of the launchers."""
        return self.play_command([str(LAUNCH / script), *arguments])

    def play_command(self, command: Sequence[str]) -> int:
        """The exit code of a command, started in the repository's folder."""
        job = start(command, self.folder / "log", self.environment)
        try:
            return job.wait(PATIENCE)
        finally:
            end(job)

    def calls(self) -> list[str]:
        """The command lines that torchrun was started with."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def log(self) -> str:
        return (self.folder / "log").read_text()


def played(folder: Path, command: list[str], environment: dict[str, str]) -> str:
    """The command line of torchrun that a launcher's command leads to."""
    stage = Stage(folder, ["status done 9 0; exit 0"], **environment)
    script, *arguments = command
    if script == "launch/run.sh":
        code = stage.play("run.sh", *arguments)
    else:
        code = stage.play_command(command)
    assert code == 0, stage.log()
    (call,) = stage.calls()
    return call


def assert_meets(call: str, nodes: str, endpoint: str, rank: int) -> None:
    """Torchrun is told to meet the others at `endpoint`, and who is the host of it."""
    options = call.split()
    assert f"--nnodes={nodes}" in options
    assert f"--rdzv-endpoint={endpoint}" in options
    assert "--rdzv-backend=c10d" in options
    conf = next(o for o in options if o.startswith("--rdzv-conf="))
    assert f"is_host={int(rank == 0)}," in conf


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a launcher with nothing of this session's own world, but `environment`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "PET_", "SKYPILOT_")) and name != "PYTHONPATH"
    }
    mark = f"{os.getpid()}.{next(_numbers)}"
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", _MARK: mark}
    with log.open("ab") as out:
        job = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=kept | own | dict(environment),
            cwd=ROOT,
        )
    _marks[job.pid] = mark
    return job


def end(job: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it, also what has lost its parent."""
    mark = _marks.pop(job.pid)
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                process.kill()
        except psutil.Error:
            continue
    job.wait()


def training(folder: Path, dataset: Dataset, *extra: str) -> list[str]:
    """Settings of a short training that ends the same on one process and on two: `folder`/job."""
    return [
        "configs/digits.yaml",
        f"run.dir={folder}",
        "run.name=job",
        f"data.root={dataset.folder.parent}",
        "data.batch_size_per_replica=8",
        f"train.max_steps={STEPS}",
        "parallel.replicas=2",
        "parallel.reduction=exact",
        "checkpoint.every_steps=5",
        "log.every_steps=5",
        "wandb.mode=disabled",
        *extra,
    ]


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def agent_of(job: subprocess.Popen[bytes]) -> psutil.Process:
    """The torchrun below a launcher."""
    found = [
        child
        for child in psutil.Process(job.pid).children()
        if "torch.distributed.run" in " ".join(child.cmdline())
    ]
    assert len(found) == 1, found
    return found[0]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not within {seconds} s: {what}"
        time.sleep(0.05)
