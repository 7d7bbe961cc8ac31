"""Steady-state speed from file to logged figure, beside the loop everyone writes.

The plain loop is fp32 and NCHW; the tuned one has our precision and channels-last, so that no
credit is taken for flags that anyone could set. Both do the recipe's mixup and dropout.
"""

import os

from dist_resnet.bench.jobs import Job, as_candidate, working
from dist_resnet.bench.measure import (
    Timing,
    fastest,
    measure,
    paired_ratio,
    speed_row,
)
from dist_resnet.bench.report import Report, Settings

STEPS = 50  # a turn: the default interval between two logs, so every turn of ours logs once
OURS, MEMORY = "ours", "ours, fed from memory"
PLAIN, TUNED = "plain loop", "plain loop, bf16, channels-last"


def run(settings: Settings) -> Report:
    """Measure one process and two ranks."""
    steps = 2 if settings.quick else STEPS
    jobs = _jobs(settings, steps)
    report = Report("train", plot=("end to end", "images_per_second"))
    batch = settings.config.data.batch_size_per_replica
    report.settings = {
        "batch_size_per_replica": batch,
        "steps_per_turn": steps,
        "rounds": settings.rounds,
        "dataset": settings.config.data.dataset,
        "model": settings.config.model.name,
        "loader": settings.config.data.loader,
    }
    with working(jobs) as (workers, failures):
        candidates = [
            as_candidate(worker, steps * batch * worker.job.ranks) for worker in workers.values()
        ]
        timings = measure(candidates, settings.rounds)
    timings |= {name: Timing(name, 1, failure=reason) for name, reason in failures.items()}
    ranks = {job.name: job.ranks for job in jobs}
    reference = _best(timings, jobs, ranks=1, tuned=False)
    for name in ranks:
        report.add("end to end", speed_row(timings[name], reference, ranks=ranks[name]))
    _compare(report, timings, jobs)
    report.notes += [
        f"ratio: to {reference.name!r}, the faster of the plain one-process loops; medians and"
        " quartiles of the ratios of each round",
        "ours: loop.Trainer with loader, device augmentation, metrics.jsonl and W&B offline; fed"
        " from memory: the same loop and step on images augmented before, nothing recorded",
        "start-up, compilation, evaluation and checkpoints are not in these figures",
    ]
    return report


def _jobs(settings: Settings, steps: int) -> list[Job]:
    """One process with all threads; two ranks that share them."""
    pairs = ("wandb.mode=offline", *settings.pairs)
    cores = len(os.sched_getaffinity(0))
    jobs = []
    for ranks in (1, 2):
        suffix = "" if ranks == 1 else ", 2 ranks"
        ddp = "" if ranks == 1 else ", 2 ranks DDP"
        # Two ranks on two cores have none left for the DataLoader's workers.
        many = (0, 2) if ranks == 1 or cores > 4 else (0,)
        for tuned, name in ((False, f"{PLAIN}, fp32"), (True, TUNED)):
            for workers in many if not settings.quick else (0,):
                options = {"steps": steps, "workers": workers, "tuned": tuned}
                full = f"{name}{ddp}, {workers} workers"
                jobs.append(Job(full, "reference", ranks, pairs, options))
        for memory, name in ((False, OURS), (True, MEMORY)):
            options = {"steps": steps, "from_memory": memory}
            jobs.append(Job(name + suffix, "ours", ranks, pairs, options))
    return jobs


def _best(timings: dict[str, Timing], jobs: list[Job], ranks: int, tuned: bool) -> Timing:
    """The reference loop with whatever number of workers served it best."""
    return fastest(
        [timings[j.name] for j in jobs if j.ranks == ranks and j.options.get("tuned") is tuned]
    )


def _compare(report: Report, timings: dict[str, Timing], jobs: list[Job]) -> None:
    """The figures that the goals are about."""
    plain = _best(timings, jobs, ranks=1, tuned=False)
    tuned = _best(timings, jobs, ranks=1, tuned=True)
    ddp = _best(timings, jobs, ranks=2, tuned=True)
    two = f"{OURS}, 2 ranks"
    for name, own, other in (
        ("ours, 1 process / plain loop", timings[OURS], plain),
        ("ours, 1 process / plain loop with bf16 and channels-last", timings[OURS], tuned),
        ("ours, 2 ranks / plain loop, 1 process", timings[two], plain),
        ("ours, 2 ranks / DDP with bf16 and channels-last, 2 ranks", timings[two], ddp),
    ):
        row: dict[str, object] = {"name": name}
        if ratio := paired_ratio(own, other):
            row |= {"ratio": ratio.median, "ratio_quartiles": [ratio.lower, ratio.upper]}
        else:
            row["failure"] = "not measured"
        report.add("ratios", row)
    for name, own, memory in (
        ("1 process", timings[OURS], timings[MEMORY]),
        ("2 ranks", timings[two], timings[f"{MEMORY}, 2 ranks"]),
    ):
        if ratio := paired_ratio(own, memory):
            report.add(
                "share of loader, augmentation, logging and W&B",
                {
                    "name": name,
                    "percent": 100 * (1 - ratio.median),
                    "percent_quartiles": [100 * (1 - ratio.upper), 100 * (1 - ratio.lower)],
                },
            )
