"""python -m tests.gpu, the script for a card, as far as it goes without one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu.__main__ import PARTS, main
from tests.helpers.jobs import ROOT

# In the place of python -m tests.gpu.parts PART OUT.json.
STAND_IN = """#!/bin/sh
echo '{"part": "'$3'"}' >"$4"
case $3 in
checks) kill -9 $$ ;;
command) sleep 300 & echo $! >"%s"; wait ;;
esac
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds a step where the processor emulates bf16
def test_it_can_be_rehearsed(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.gpu", str(target), "--rehearse", "--seconds=500",
            "--only=facts,nccl,times",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(target.read_text())
    assert list(found) == ["facts", "nccl", "times"]
    assert [part["ending"] for part in found.values()] == [0, 0, 0]
    assert "FAILED" not in target.read_text()
    assert found["facts"]["torch"]
    assert found["nccl"]["seconds to close"] >= 0
    assert found["times"]["optim.name=muon"]["images_per_second"] > 0


def test_a_part_that_crashes_or_hangs_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, child, target = (tmp_path / name for name in ("python", "child", "found.json"))
    script.write_text(STAND_IN % child)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setitem(PARTS, "command", 1)
    assert main([str(target), "--only=facts,checks,command,nccl"]) == 1
    found = json.loads(target.read_text())
    endings = {name: part["ending"] for name, part in found.items()}
    assert endings == {"facts": 0, "checks": -9, "command": "time limit", "nccl": 0}
    assert all(part["part"] == name for name, part in found.items())
    left, end = int(child.read_text()), time.monotonic() + 20
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "what a part started outlives it"
        time.sleep(0.01)
    assert main([str(target), "--only=facts", "--seconds=0"]) == 1  # no time left, and said
    assert "no time left" in target.read_text()
