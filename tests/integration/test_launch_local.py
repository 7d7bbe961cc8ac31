"""launch/single_node.sh with real trainings: what users start on one machine."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.folder import RunFolder
from tests.helpers.jobs import current_step, differences, wait_for_step
from tests.helpers.launching import LAUNCH, PATIENCE, STEPS, agent_of, end, start, training

pytestmark = pytest.mark.timeout(900)


@contextmanager
def single_node(log: Path, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher with two processes; whatever is left of it is killed at the end."""
    job = start([str(LAUNCH / "single_node.sh"), *settings], log, {"NPROC": "2"})
    try:
        yield job
    finally:
        end(job)


def test_a_killed_torchrun_is_started_again_and_the_run_goes_on(
    tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    run = tmp_path / "job"
    with single_node(tmp_path / "log", *training(tmp_path, digits)) as job:
        wait_for_step(run, 10, job, PATIENCE)
        agent_of(job).kill()
        assert job.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "restart 1 of 3" in log
    assert f"run: {run}, continued at step" in log
    assert differences(undisturbed, run) == []


@pytest.mark.slow
def test_sigterm_gives_75_and_the_same_command_goes_on(
    tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    run, settings = tmp_path / "job", training(tmp_path, digits)
    with single_node(tmp_path / "log", *settings) as job:
        wait_for_step(run, 5, job, PATIENCE)
        below = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGTERM)
        assert job.wait(PATIENCE) == 75, (tmp_path / "log").read_text()
    assert psutil.wait_procs(below, 30)[1] == []
    assert RunFolder(run).status()["state"] == "preempted"
    assert 5 <= current_step(run) < STEPS
    with single_node(tmp_path / "log", *settings) as job:
        assert job.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    assert differences(undisturbed, run) == []


@pytest.mark.slow
def test_what_the_user_must_mend_is_not_started_again(tmp_path: Path, digits: Dataset) -> None:
    """A wrong key ends before anything starts; what only the ranks can find ends them all once."""
    for extra, text in (("optim.lrr=1", "optim.lr"), ("parallel.replicas=3", "not a multiple")):
        log = tmp_path / extra
        with single_node(log, *training(tmp_path, digits), extra) as job:
            assert job.wait(PATIENCE) == 2, log.read_text()
        lines = [line for line in log.read_text().splitlines() if line.startswith("dist_resnet: ")]
        assert len(lines) == 1
        assert text in lines[0]
