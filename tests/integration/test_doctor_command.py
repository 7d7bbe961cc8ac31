"""python -m dist_resnet.doctor as users start it: alone, by a launcher, on two nodes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from dist_resnet.data.prepare import prepare
from dist_resnet.data.sources.embedded import load_synthetic
from dist_resnet.doctor.node import cpu_quota
from tests.helpers.jobs import ROOT
from tests.helpers.launching import LAUNCH, PATIENCE, end, free_port, start

pytestmark = pytest.mark.timeout(600)
SETTINGS = ["data.dataset=digits", "wandb.mode=disabled", "parallel.device=cpu"]


def test_one_process(tmp_path: Path, digits: Dataset) -> None:
    command = [sys.executable, "-m", "dist_resnet.doctor", *SETTINGS, f"run.dir={tmp_path}"]
    for extra, code in ((f"data.root={digits.folder.parent}", 0), ("data.dataset=birds", 2)):
        done = subprocess.run([*command, extra], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 11
        assert ("FAIL" in done.stdout) == (code == 2)


@pytest.mark.slow
def test_two_processes_by_the_launcher(tmp_path: Path, digits: Dataset) -> None:
    settings = [*SETTINGS, f"run.dir={tmp_path}", f"data.root={digits.folder.parent}"]
    log = tmp_path / "log"
    job = start([str(LAUNCH / "single_node.sh"), *settings], log, {"DOCTOR": "1", "NPROC": "2"})
    # Where there is one core, two processes wait for each other, and the doctor says so.
    cores = len(os.sched_getaffinity(0))
    short = cores < 2 or (cpu_quota() or cores) < 0.9 * 2 * (cores // 2)
    failing = ["threads"] if short else []
    try:
        assert job.wait(PATIENCE) == (2 if failing else 0), log.read_text()
    finally:
        end(job)
    output = log.read_text()
    assert re.findall(r"FAIL +(\w+)", output) == failing
    assert "FutureWarning" not in output
    for text in ("all-reduce", "GB/s", "ms apart", "same versions", "4 everywhere", "2, nodes: 1"):
        assert text.replace("4 everywhere", digits.fingerprint[:12]) in output


@pytest.mark.slow
def test_two_nodes_with_different_data(tmp_path: Path, digits: Dataset) -> None:
    other = tmp_path / "data"
    prepare(load_synthetic(64, 16, 10, 32, 1), other / "digits", "synthetic", "digits")
    endpoint = f"127.0.0.1:{free_port()}"
    logs = [tmp_path / "log0", tmp_path / "log1"]
    jobs = []
    for rank, root in enumerate((digits.folder.parent, other)):
        command = [str(LAUNCH / "multi_node.sh"), str(rank), "2", endpoint, *SETTINGS]
        command += [f"run.dir={tmp_path}", f"data.root={root}"]
        jobs.append(start(command, logs[rank], {"DOCTOR": "1", "NPROC": "1", "IFNAME": "lo"}))
    try:
        codes = [job.wait(PATIENCE) for job in jobs]
    finally:
        for job in jobs:
            end(job)
    output = "".join(log.read_text() for log in logs)
    assert codes == [2, 2], output
    assert "Traceback" not in output, "torchrun's report would bury the doctor's lines"
    (line,) = [line for line in output.splitlines() if "same dataset" in line]
    assert "FAIL" in line
    assert "copy the prepared folder" in line
