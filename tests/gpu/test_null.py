"""The GPU's side without a GPU: on a libcuda of its own that computes nothing and counts all calls.

DIST_RESNET_NULLCUDA names the folder with its build.sh, which needs a C++ compiler.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import Outcome, command, kill_tree, launch, run_job, wait_for_step

ROOT = Path(__file__).parents[2]
SOURCE = Path(os.environ.get("DIST_RESNET_NULLCUDA", ROOT.parent / "shared" / "gpu" / "nullcuda"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (SOURCE / "build.sh").is_file() or shutil.which("g++") is None,
        reason="no null CUDA device here (DIST_RESNET_NULLCUDA), or no g++",
    ),
]
# Mode, type and keys; what is counted, and how many of it a step may have.
BUDGETS = {
    "graph bf16": ("replayed kernel", 155),
    "graph bf16 optim.name=muon": ("replayed kernel", 200),
    "eager bf16": ("launch", 250),
}
STEPS = 14


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which torch finds null cards."""
    folder = tmp_path_factory.mktemp("nullcuda")
    build = ["bash", str(SOURCE / "build.sh"), str(folder)]
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(build, capture_output=True, text=True, env={**os.environ, **python})
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"(\w+)=(\S+)", (folder / "env.sh").read_text())
    return {**dict(pairs), "NULLCUDA_GB": "4", "CUDA_MODULE_LOADING": "LAZY"}


def test_launches_of_a_step(device: dict[str, str]) -> None:
    """The budget; and no step waits for the device, which would raise."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.null_launches", *BUDGETS],
        env={**os.environ, **device}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    for (case, (kind, budget)), found in zip(BUDGETS.items(), counts, strict=True):
        print(f"{case}: {found}, of {budget}")
        assert 20 < found[kind] <= budget, case
        waits = {"stream sync", "event sync", "device sync", "copy to host", "malloc"}
        assert not waits & found.keys(), case
        assert found.get("graph launch", 0) == case.startswith("graph"), case


@pytest.mark.parametrize("ranks", [0, 4])
def test_the_command(
    ranks: int, device: dict[str, str], tmp_path: Path, digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Captured until SIGTERM, then eager from its checkpoint to the end, by one and by four."""
    for name, value in {**device, "NULLCUDA_DEVICES": str(max(ranks, 1))}.items():
        monkeypatch.setenv(name, value)
    settings = [
        f"run.dir={tmp_path}", "run.name=run", f"data.root={digits.folder.parent}",
        "data.dataset=digits", "data.batch_size_per_replica=8", "data.loader=resident",
        f"train.max_steps={STEPS}", "log.every_steps=1", "wandb.mode=disabled",
        "parallel.device=cuda", "parallel.threads=1", "checkpoint.every_steps=1000",
    ]  # fmt: skip
    stopped = _stopped(
        ranks, [*settings, "train.step_mode=graph", "train.max_steps=100000"], 9, tmp_path
    )
    assert stopped.code == (75 if ranks == 0 else 1), stopped.output
    assert "no graph" not in stopped.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted", stopped.output
    assert status["step"] >= 9
    end = [f"train.max_steps={status['step'] + 5}", "train.step_mode=eager"]
    done = run_job(ranks, [*settings, *end], tmp_path, 200, "tests.gpu.null_train")
    assert done.code == 0, done.output
    assert f"continued at step {status['step']}" in done.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == status["step"] + 5


def _stopped(ranks: int, settings: list[str], step: int, folder: Path) -> Outcome:
    """The job, sent SIGTERM once it has taken `step` steps."""
    log = folder / "stopped.log"
    job = launch(command(ranks, 0, settings, "tests.gpu.null_train"), log)
    try:
        wait_for_step(folder / "run", step, job, 200)
        job.send_signal(signal.SIGTERM)
        code = job.wait(60)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after SIGTERM:\n{log.read_text()[-3000:]}") from None
    finally:
        kill_tree(job)
    return Outcome(code, log.read_text())
