"""Other frameworks' overhead a step, on a tiny model, and their speed with this one.

All train on the same synthetic batches from memory, with the same loss, optimizer and precision;
each loop is as the framework has one write it. A framework that is not installed, or fails, has a
line that says so.
"""

import contextlib
import importlib.metadata
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from dist_resnet.bench.measure import speed_row
from dist_resnet.bench.peer_loops import DENSE, LOOPS, SIDE
from dist_resnet.bench.report import Report, Settings
from dist_resnet.bench.workers import Job, measure_jobs
from dist_resnet.data.prepare import prepare
from dist_resnet.data.sources.embedded import load_synthetic

TINY_STEPS, MODEL_STEPS, TINY_BATCH = 1000, 50, 32  # steps are of a turn
# More threads than one only get in each other's way here.
_TINY = (
    f"model.name={DENSE}", "data.dataset=tiny", f"data.batch_size_per_replica={TINY_BATCH}",
    "precision.dtype=fp32", "parallel.threads=1",
)  # fmt: skip
_NOTES = [
    f"overhead: one dense layer on images of {SIDE} x {SIDE}, batch {TINY_BATCH}, fp32,"
    " cross-entropy, SGD with momentum; the bare loop is torch alone, on two ranks with its own"
    " DDP. Two ranks share the cores",
    "ours includes what it always does: accuracy, gradient norm, finite check, the check for"
    " signals; it takes uint8 and normalises. Logging is off everywhere, progress bars too",
    "images per second: the configured model, precision and layout for all, synthetic images of"
    " 32 x 32 in memory",
    "Composer has no bf16 on CPUs: for its images per second there add precision.dtype=fp32",
    "timm: its ClassificationTask and AverageMeter as in the loop of its repository's train.py,"
    " which is not part of the package and reads the loss back after every update",
]


def run(settings: Settings) -> Report:
    """Measure the tiny model in one process and two, then the configured model."""
    report = Report("peers", plot=("images per second", "images_per_second"))
    batch, names, versions = settings.config.data.batch_size_per_replica, ["ours"], {}
    for name, (package, _) in LOOPS.items():
        try:
            if package is not None:
                versions[package] = importlib.metadata.version(package)
            names.append(name)
        except importlib.metadata.PackageNotFoundError:
            report.add("frameworks", {"name": name, "failure": f"{package} is not installed"})
    report.settings = {
        "batch_size_per_replica": batch,
        "peer_versions": versions,
        "dataset": "synthetic",
    }
    with tempfile.TemporaryDirectory() as root:
        for dataset, side, size in (("tiny", SIDE, TINY_BATCH), ("images", 32, batch)):
            with contextlib.redirect_stderr(io.StringIO()):
                images = load_synthetic(64 * size, 1, size=side)
                prepare(images, Path(root) / dataset, "synthetic", dataset)
        data = (f"data.root={root}", "data.dataset=images", "data.loader=resident")
        # One loss for all; longer than all turns.
        pairs = (*settings.pairs, *data, "augment.mixup_alpha=0", "train.epochs=5000")
        for ranks in (1, 2):
            for row in _rows(settings, names, (*pairs, *_TINY), TINY_STEPS, TINY_BATCH, ranks):
                report.add("overhead, tiny model", _as_overhead(row, TINY_BATCH * ranks))
        for ranks in (1, 2) if settings.full else (1,):
            threads = max(1, len(os.sched_getaffinity(0)) // ranks)
            shared = (f"parallel.threads={threads}",) if ranks > 1 else ()
            rows = _rows(settings, names, (*pairs, *shared), MODEL_STEPS, batch, ranks)
            report.add("images per second", *rows)
    report.notes += _NOTES
    return report


def _rows(
    settings: Settings, names: list[str], pairs: tuple[str, ...], steps: int, batch: int, ranks: int
) -> list[dict[str, Any]]:
    """Of all frameworks, `steps` steps a turn on `batch` images a rank."""
    steps = 3 if settings.quick else steps
    jobs = [
        Job(name, "peer_loops:train", steps * batch * ranks, ranks, pairs,
            {"framework": name, "steps": steps})
        for name in names
    ]  # fmt: skip
    timings = measure_jobs(jobs, settings.rounds)
    return [speed_row(timings[name], timings["bare loop"], ranks=ranks) for name in names]


def _as_overhead(row: dict[str, Any], images: int) -> dict[str, Any]:
    """A row of speeds as one of milliseconds a step of so many `images`."""
    speed = row.pop("images_per_second", None)
    if speed is None:
        return row
    del row["images_per_second_quartiles"]
    first = {"ranks": row["ranks"], "name": row["name"], "ms_per_step": 1000 * images / speed}
    return first | row
