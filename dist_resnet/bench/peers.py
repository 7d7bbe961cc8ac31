"""Other frameworks' overhead a step, on a tiny model, and their speed with this one.

All train on the same batches from memory, with the same loss, optimizer and precision; each loop
is as the framework has one write it. A framework that is not installed, or fails, has a line that
says so.
"""

import importlib.metadata
import os

from dist_resnet.bench.measure import speed_row
from dist_resnet.bench.report import Report, Settings
from dist_resnet.bench.workers import Job, measure_jobs

PACKAGES = {
    "bare loop": None,
    "ours": None,
    "Fabric": "lightning",
    "Lightning": "lightning",
    "Accelerate": "accelerate",
    "Composer": "mosaicml",
    "timm": "timm",
}
TINY_STEPS, MODEL_STEPS = 1000, 50  # a turn
DENSE = "dist_resnet.bench.peer_loops:dense"
BATCH = "data.batch_size_per_replica"


def run(settings: Settings) -> Report:
    """Measure the tiny model in one process and two, then the configured model."""
    report = Report("peers", plot=("images per second", "images_per_second"))
    present, versions = [], {}
    for name, package in PACKAGES.items():
        try:
            if package is not None:
                versions[package] = importlib.metadata.version(package)
            present.append(name)
        except importlib.metadata.PackageNotFoundError:
            row = {"name": name, "failure": f"{package} is not installed"}
            report.add("frameworks", row)
    report.settings = {
        "rounds": settings.rounds,
        "peer_versions": versions,
        "batch_size_per_replica": settings.config.data.batch_size_per_replica,
    }
    for ranks in (1, 2):
        _measure(report, settings, present, ranks, tiny=True)
    _measure(report, settings, present, 1, tiny=False)
    if settings.full:
        _measure(report, settings, present, 2, tiny=False)
    report.notes += [
        "overhead: one dense layer on images of 4 x 4, batch 32, fp32, cross-entropy, SGD with"
        " momentum; the bare loop is torch alone, on two ranks with its own DDP. Two"
        " ranks share the cores",
        "ours includes what it always does: accuracy, gradient norm, finite check, the check for"
        " signals; it takes uint8 and normalises. Logging is off"
        " everywhere, progress bars too",
        "images per second: the configured model, precision and layout for all, batches in memory",
        "Composer has no bf16 on CPUs: for its images per second there add precision.dtype=fp32",
        "timm: its ClassificationTask and AverageMeter as in the loop of its repository's train.py,"
        " which is not part of the package and reads the loss back after every update",
    ]
    return report


def _measure(
    report: Report, settings: Settings, present: list[str], ranks: int, tiny: bool
) -> None:
    steps = 3 if settings.quick else TINY_STEPS if tiny else MODEL_STEPS
    pairs, batch = settings.pairs, settings.config.data.batch_size_per_replica
    if tiny:
        # More threads than one only get in each other's way here.
        own = ("precision.dtype=fp32", "parallel.threads=1", f"{BATCH}=32", f"model.name={DENSE}")
        pairs, batch = (*pairs, *own), 32
    elif ranks > 1:
        pairs = (*pairs, f"parallel.threads={max(1, len(os.sched_getaffinity(0)) // ranks)}")
    options = {"steps": steps}
    jobs = [
        Job(name, "peer_loops:train", steps * batch * ranks, ranks, pairs,
            options | {"framework": name})
        for name in present
    ]  # fmt: skip
    timings = measure_jobs(jobs, settings.rounds)
    for name in present:
        row = speed_row(timings[name], timings["bare loop"], ranks=ranks)
        if tiny and (speed := row.pop("images_per_second", None)):
            del row["images_per_second_quartiles"]
            first = {"ranks": ranks, "name": name, "ms_per_step": 1000 * batch * ranks / speed}
            row = first | row
        report.add("overhead, tiny model" if tiny else "images per second", row)
