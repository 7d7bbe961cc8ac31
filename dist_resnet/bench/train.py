"""Steady-state speed from file to logged figure, beside the loop everyone writes.

The plain loop is fp32 and NCHW; the tuned one has our precision and channels-last, so that no
credit is taken for flags that anyone could set. Both do the recipe's mixup and dropout.
"""

import itertools
import os

from dist_resnet.bench.measure import Timing, fastest, figure, speed_row
from dist_resnet.bench.report import Report, Settings
from dist_resnet.bench.workers import Job, measure_jobs

STEPS = 50  # a turn: the default interval between two logs, so every turn of ours logs once
OURS, MEMORY = "ours", "ours, fed from memory"
TWO, MEMORY_TWO = f"{OURS}, 2 ranks", f"{MEMORY}, 2 ranks"
PLAIN, TUNED = "plain loop, fp32", "plain loop, bf16, channels-last"


def run(settings: Settings) -> Report:
    """Measure one process and two ranks."""
    steps = 2 if settings.quick else STEPS
    jobs = _jobs(settings, steps)
    report = Report("train", plot=("end to end", "images_per_second"))
    data = settings.config.data
    report.settings = {
        "batch_size_per_replica": data.batch_size_per_replica,
        "steps_per_turn": steps,
        "loader": data.loader,
    }
    timings = measure_jobs(jobs, settings.rounds)
    plain = _best(timings, jobs, ranks=1, tuned=False)
    for job in jobs:
        report.add("end to end", speed_row(timings[job.name], plain, ranks=job.ranks))
    tuned, ddp = (_best(timings, jobs, ranks, tuned=True) for ranks in (1, 2))
    for name, own, other in (
        ("ours, 1 process / plain loop", OURS, plain),
        ("ours, 1 process / plain loop with bf16 and channels-last", OURS, tuned),
        ("ours, 2 ranks / plain loop, 1 process", TWO, plain),
        ("ours, 2 ranks / DDP with bf16 and channels-last, 2 ranks", TWO, ddp),
    ):
        report.add("ratios", {"name": name} | figure("ratio", timings[own].ratios(other)))
    for name, own, memory in (("1 process", OURS, MEMORY), ("2 ranks", TWO, MEMORY_TWO)):
        shares = [100 * (1 - ratio) for ratio in timings[own].ratios(timings[memory])]
        table = "share of loader, augmentation, logging and W&B"
        report.add(table, {"name": name} | figure("percent", shares))
    report.notes += [
        f"ratio: to {plain.name!r}, the faster of the plain one-process loops; medians and"
        " quartiles of the ratios of each round",
        "ours: training.loop.Trainer with loader, device augmentation, metrics.jsonl and W&B"
        " offline; fed from memory: the same loop and step, which then normalises and mixes only;"
        " nothing recorded",
        "start-up, compilation, evaluation and checkpoints are not in these figures",
    ]
    return report


def _jobs(settings: Settings, steps: int) -> list[Job]:
    """One process with all threads; two ranks that share them."""
    pairs = ("wandb.mode=offline", *settings.pairs)
    batch, cores = settings.config.data.batch_size_per_replica, len(os.sched_getaffinity(0))
    jobs = []
    for ranks, ddp, names in (
        (1, "", (OURS, MEMORY)),
        (2, ", 2 ranks DDP", (TWO, MEMORY_TWO)),
    ):
        turn = steps * batch * ranks
        # Two ranks on two cores have none left for the DataLoader's workers.
        many = (0, 2) if (ranks == 1 or cores > 4) and not settings.quick else (0,)
        for name, workers in itertools.product((PLAIN, TUNED), many):
            options = {"steps": steps, "workers": workers, "tuned": name == TUNED}
            full = f"{name}{ddp}, {workers} workers"
            jobs.append(Job(full, "reference_loop:train", turn, ranks, pairs, options))
        for name in names:
            options = {"steps": steps, "from_memory": name in (MEMORY, MEMORY_TWO)}
            jobs.append(Job(name, "our_loop:train", turn, ranks, pairs, options))
    return jobs


def _best(timings: dict[str, Timing], jobs: list[Job], ranks: int, tuned: bool) -> Timing:
    """The reference loop with whatever number of workers served it best."""
    return fastest(
        [timings[j.name] for j in jobs if j.ranks == ranks and j.options.get("tuned") is tuned]
    )
