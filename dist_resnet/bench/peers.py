"""Other frameworks' overhead a step, on a tiny model, and their speed with this one.

All train on the same batches from memory, with the same loss, optimizer and precision; each loop
is as the framework has one write it. A framework that is not installed, or fails, has a line that
says so.
"""

import importlib.metadata
import os

from dist_resnet.bench.jobs import Job, as_candidate, working
from dist_resnet.bench.measure import Timing, measure, speed_row
from dist_resnet.bench.report import Report, Settings

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
        "overhead: Linear(32, 10), batch 32, fp32, cross-entropy, SGD with momentum; the bare loop"
        " is torch alone (two ranks: its DistributedDataParallel). Two ranks share the cores",
        "ours includes what it always does: accuracy, gradient norm, finite check, the check for"
        " signals; logging is off everywhere, progress bars too",
        "images per second: the configured model, precision and layout for all, batches in memory",
        "Composer has no bf16 on CPUs: for its images per second there add precision.dtype=fp32",
        "timm: its ClassificationTask and AverageMeter as in the loop of its repository's train.py,"
        " which is not part of the package and reads the loss back after every update",
    ]
    return report


def _measure(
    report: Report, settings: Settings, present: list[str], ranks: int, tiny: bool
) -> None:
    steps = TINY_STEPS if tiny else MODEL_STEPS
    if settings.quick:
        steps = 3
    pairs = settings.pairs
    if tiny:
        # More threads than one only get in each other's way here.
        tiny_pairs = ("precision.dtype=fp32", "parallel.threads=1", f"{BATCH}=32")
        pairs = (*pairs, *tiny_pairs)
    elif ranks > 1:
        pairs = (*pairs, f"parallel.threads={max(1, len(os.sched_getaffinity(0)) // ranks)}")
    jobs = [
        Job(name, "peer", ranks, pairs, {"framework": name, "steps": steps, "tiny": tiny})
        for name in present
    ]
    batch = 32 if tiny else settings.config.data.batch_size_per_replica
    with working(jobs) as (workers, failures):
        candidates = [as_candidate(w, steps * batch * ranks) for w in workers.values()]
        timings = measure(candidates, settings.rounds)
    timings |= {name: Timing(name, 1, failure=reason) for name, reason in failures.items()}
    reference = timings["bare loop"]
    for name in present:
        row = speed_row(timings[name], reference, ranks=ranks)
        if tiny:
            seconds = timings[name].images_per_second
            row.pop("images_per_second", None)
            row.pop("images_per_second_quartiles", None)
            if seconds:
                row = {
                    "ranks": ranks,
                    "name": name,
                    "ms_per_step": 1000 * batch * ranks / seconds,
                    **row,
                }
        report.add("overhead, tiny model" if tiny else "images per second", row)
