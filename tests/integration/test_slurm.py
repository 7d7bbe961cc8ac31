"""launch/slurm.sbatch on a real Slurm of five nodes, which tests/slurm_cluster.sh starts here.

What mostly waits (time limits, a hang, a dead node) is submitted first and waits together.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.store import CheckpointStore
from tests.helpers.jobs import ROOT, current_step, differences
from tests.helpers.launching import EPOCH, PATIENCE, STEPS, training, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = str(ROOT / "tests" / "slurm_cluster.sh")
# More than a start takes, with everything else starting too; the hang waits for it once.
HEARTBEAT = 45


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment = kept | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            "NPROC": "1",
            "JOIN_TIMEOUT": "120",
        }

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=ROOT, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """The number of the new job."""
        log = f"--output={self.folder}/slurm-%j.log"
        return self.ask("sbatch", "--parsable", log, *arguments).strip()

    def facts(self, job: str) -> dict[str, str]:
        text = self.ask("scontrol", "show", "job", job)
        return dict(re.findall(r"(JobState|Restarts|BatchHost|JobId)=(\S+)", text))

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{self.facts(job)['JobId']}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, job: str, state: str) -> None:
        end = time.monotonic() + PATIENCE
        while (found := self.facts(job)["JobState"]) != state:
            late = time.monotonic() > end
            assert not late, f"{found}, not {state}, after {PATIENCE} s:\n{self.log(job)}"
            assert found not in ("FAILED", "TIMEOUT"), self.log(job)
            time.sleep(0.2)

    def wait_for_step(self, job: str, run: Path, step: int) -> None:
        end = time.monotonic() + PATIENCE
        while current_step(run) < step:
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.getuid() != 0:
        pytest.skip("starting a Slurm needs root")
    if not shutil.which("slurmctld"):
        pytest.skip("no Slurm here; tests/slurm_cluster.sh install gets Debian's")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        # Not captured: the daemons would keep the pipe open.
        with (folder / "up.log").open("w") as out:
            up = subprocess.run([SCRIPT, "up", str(folder)], stdout=out, stderr=out)
        assert up.returncode == 0, (folder / "up.log").read_text()
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "down", str(folder)], check=True)
    config = f"SLURM_CONF={folder}/slurm.conf".encode()
    wait_until(
        lambda: not any(config in read(p) for p in Path("/proc").glob("[0-9]*/environ")),
        PATIENCE,
        "nothing of it is left",
    )


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def ranks_of(run: Path) -> list[psutil.Process]:
    """The training processes of a run that Slurm started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:4] == ["-u", "-m", "dist_resnet.train"] and f"run.dir={run.parent}" in line:
            found.append(process)
    return found


@dataclass(frozen=True)
class Begun:
    """Three jobs, each with its run folder."""

    limited: tuple[str, Path]
    hung: tuple[str, Path]
    on_dead_node: tuple[str, Path]


def suspend_on_the_way(cluster: Cluster, job: str, run: Path) -> None:
    """At once, or a fast machine has ended it before what is to befall it does."""
    cluster.wait_for_step(job, run, 10)
    for process in ranks_of(run):
        process.suspend()
    assert 10 <= current_step(run) < STEPS


@pytest.fixture(scope="module")
def begun(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Begun:
    """One will reach its time limit again and again, one hangs, and one's node is dead."""
    folder = tmp_path_factory.mktemp("begun")
    side, script = ("--partition=side", "-N1"), "launch/slurm.sbatch"
    # Slurm looks every 30 s and warns up to 30 s early: 20 to 50 s after the start, with 70 s
    # left to save. On a busy machine ten are less than a start in the middle takes to end.
    options = [*side, "--time=2", "--signal=B:USR1@70", "-wn3"]
    endless = ["train.max_steps=1000000", "train.epochs=50000", "checkpoint.every_steps=0"]
    settings = [*training(folder / "limited", digits), *endless, "checkpoint.every_epochs=0"]
    limited = cluster.submit(*options, script, *settings)
    options = [*side, "-wn3", "--array=7", f"--export=ALL,RUN_NAME=seeds,HEARTBEAT={HEARTBEAT}"]
    settings = [s for s in training(folder / "hung", digits) if not s.startswith("run.name=")]
    hung = cluster.submit(*options, script, *settings) + "_7"
    suspend_on_the_way(cluster, hung, folder / "hung" / "seeds-s7")

    doomed = cluster.submit(*side, "-xn3", script, *training(folder / "doomed", digits))
    run = folder / "doomed" / "job"
    suspend_on_the_way(cluster, doomed, run)
    node = cluster.facts(doomed)["BatchHost"]
    subprocess.run([SCRIPT, "crash", str(cluster.folder), node], check=True)
    wait_until(lambda: not ranks_of(run), PATIENCE, "its ranks are dead")
    return Begun(
        (limited, folder / "limited" / "job"),
        (hung, folder / "hung" / "seeds-s7"),
        (doomed, run),
    )


@pytest.mark.usefixtures("begun")
def test_preempted_in_mid_epoch_it_goes_back_into_the_queue_and_ends_the_same(
    cluster: Cluster, tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    run = tmp_path / "job"
    # Nothing is saved but what the signal asks for.
    settings = [*training(tmp_path, digits), "checkpoint.every_steps=0"]
    job = cluster.submit("-N2", "launch/slurm.sbatch", *settings)
    cluster.wait_for_step(job, run, 10)
    ranks = ranks_of(run)
    for process in ranks:  # a fast machine would be done before Slurm preempts
        process.suspend()
    assert len(ranks) == 2
    other = cluster.submit("-N2", "--partition=high", "--exclusive", "--wrap=sleep 2")
    cluster.wait_for(other, "COMPLETED")
    stopped_at = current_step(run)
    assert 10 <= stopped_at < EPOCH
    cluster.wait_for(job, "COMPLETED")
    log = cluster.log(job)
    assert cluster.facts(job)["Restarts"] == "1"
    assert f"state preempted, step {stopped_at}" in log
    assert f"continued at step {stopped_at}" in log
    assert log.count("on each of 2 processes") == 2
    assert differences(undisturbed, run) == []


def test_after_a_hang_it_is_killed_and_goes_on(cluster: Cluster, begun: Begun) -> None:
    job, run = begun.hung
    cluster.wait_for(job, "COMPLETED")
    assert cluster.facts(job)["Restarts"] == "1"
    assert "no sign of life for" in cluster.log(job)
    assert RunFolder(run).status()["state"] == "done"
    assert current_step(run) == STEPS
    assert "seed: 7" in (run / "config.yaml").read_text(), "an array's number is its seed"


def test_after_its_node_died_it_goes_on_on_another(
    cluster: Cluster, begun: Begun, undisturbed: Path
) -> None:
    job, run = begun.on_dead_node
    cluster.wait_for(job, "COMPLETED")
    assert cluster.facts(job)["Restarts"] == "1"
    assert "continued at step" in cluster.log(job)
    assert differences(undisturbed, run) == []


def test_at_its_time_limit_it_goes_on_until_it_is_cancelled(cluster: Cluster, begun: Begun) -> None:
    job, run = begun.limited
    what = "stopped by its time limit twice, and going on"

    def is_going_on() -> bool:  # and not waiting to be started again, when it would end unseen
        log = cluster.log(job)
        assert cluster.facts(job)["JobState"] not in ("FAILED", "TIMEOUT"), log
        # On a busy machine a start may take until the limit: such a stop has nothing to continue.
        stops = len(re.findall(r"state preempted, step [1-9]", log))
        return stops >= 2 and log.rfind("continued at step") > log.rfind("launch, job")

    wait_until(is_going_on, 2 * PATIENCE, what)
    cluster.ask("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    wait_until(lambda: "the job is COMPLETING" in cluster.log(job), PATIENCE, "its last line")
    status = RunFolder(run).status()
    assert status["state"] == "preempted"
    saved = CheckpointStore(run / "checkpoints", 3).newest(print)
    assert saved is not None
    assert saved[1].state.step == status["step"] > 0
    facts = cluster.facts(job)
    assert int(facts["Restarts"]) >= 2
    time.sleep(7)  # a requeued job would be back by now
    assert cluster.facts(job) == facts
