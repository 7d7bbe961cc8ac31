"""A process that trains nothing and tracks it with W&B: what matters happens when it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.wandb_readback import Recorded, read_run

# A training loop as W&B sees it. Prints one line of JSON about what it measured.
CHILD = """
import json, os, signal, sys, time
from types import SimpleNamespace as Settings
import psutil
from dist_resnet.tracking.wandb_writer import start_wandb

job = json.loads(sys.argv[1])
settings = Settings(mode=job.get("mode", "auto"), project="p", entity=None, group="g", tags=["t"])
began = time.monotonic()
tracker = start_wandb(
    settings, job["dir"], {"model": {"name": "resnet20"}}, "the-run", "a name",
    resume_position=job.get("resume"), init_seconds=job.get("init_seconds", 10),
    close_seconds=job.get("close_seconds", 8),
)
out = {"start": time.monotonic() - began, "positions": {}}
times, longest = [0.0], 0.0
out["mode"] = tracker.mode if tracker else None
out["imported"] = "wandb" in sys.modules
cores = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
for i, step in enumerate(job.get("steps", [])):
    row = {"step": step, "epoch": step / 10, "seconds": 0.1 * i, "train/loss": 1 / (1 + step)}
    if step % 5 == 4:
        row |= {"val/top1": step / 100, "gap/top1": 0.1, "perf/step_ms": float("nan")}
    if i == job.get("fault_at"):
        for core in cores:
            os.kill(core.pid, getattr(signal, job["fault"]))
    before, worked = time.perf_counter(), time.thread_time()
    tracker.log(row)
    times.append(time.thread_time() - worked)
    longest = max(longest, time.perf_counter() - before)
    out["positions"][step] = tracker.position()
    time.sleep(job.get("pause", 0))
times.sort()
out |= {"longest": longest, "p99": times[int(0.99 * (len(times) - 1))]}
if job.get("die"):
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)
for _ in range(job.get("wait_for_stop", 0)):
    time.sleep(0 if tracker.stop_requested() else 1)
if tracker:
    out["stopped"] = tracker.stop_requested()
    before = time.monotonic()
    if not job.get("forget_to_close"):
        tracker.close(0, {"val/top1": 0.5, "best": {"step": 7}, "odd": object()})
    out["close"] = time.monotonic() - before
print(json.dumps(out), flush=True)
"""
ROOT = Path(__file__).parents[2]


class Child:
    """Runs `CHILD` in a clean environment; keeps what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.err = ""
        self.code: int | None = None

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        """Ours without W&B's variables and without a home that could hold a key."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TORCHELASTIC"))}
        env |= {"HOME": str(self.folder), "NETRC": str(self.folder / "none")}
        return env | {"PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false"} | extra

    def command(self, job: dict[str, Any]) -> list[str]:
        """The child's command line."""
        return [sys.executable, "-c", CHILD, json.dumps({"dir": str(self.folder / "run")} | job)]

    def __call__(self, env: dict[str, str] | None = None, **job: Any) -> dict[str, Any]:
        done = subprocess.run(
            self.command(job),
            env=self.environment(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )
        self.err, self.code = done.stderr, done.returncode
        assert "Traceback" not in self.err, self.err
        return dict(json.loads(done.stdout)) if done.stdout else {}

    def folders(self) -> list[Path]:
        """wandb's own run folders, oldest first."""
        return sorted((self.folder / "run" / "wandb").glob("*run-*-the-run*"))

    def record(self) -> Recorded:
        """What the only run folder holds."""
        (folder,) = self.folders()
        return read_run(folder)
