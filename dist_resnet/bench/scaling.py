"""One rank and two of this machine, and their all-reduce.

What follows for more replicas on other networks is in docs/scaling.md.
"""

from collections.abc import Callable

import torch

from dist_resnet.bench.measure import Run, figure, measure, speed_row, wait_for_device
from dist_resnet.bench.report import Report, Settings
from dist_resnet.bench.workers import Gate, Job, Worker, in_turns, working
from dist_resnet.config.schema import Config
from dist_resnet.distributed.flat import flatten_model
from dist_resnet.distributed.group import World, all_reduce_sum
from dist_resnet.distributed.shared_sum import build_sum
from dist_resnet.models.build import build_model
from dist_resnet.step.measures import MEASURES

STEPS, CALLS = 50, 200
ONE, OTHER, TWO = "1 rank", "the other rank", "2 ranks"
APART = "2 ranks that do not communicate"
REDUCE = {"as in a step": False, "by a collective": True}


def run(settings: Settings) -> Report:
    """Measure."""
    steps, calls = (2, 5) if settings.quick else (STEPS, CALLS)
    batch = settings.config.data.batch_size_per_replica
    size = flatten_model(build_model(settings.config.model, 10), len(MEASURES)).exchange.numel()
    pairs, options = ("wandb.mode=offline", "parallel.threads=1", *settings.pairs), {"steps": steps}
    report = Report("scaling", plot=("measured", "images_per_second"))
    report.settings = {
        "batch_size_per_replica": batch,
        "steps_per_turn": steps,
        "exchanged_bytes": 4 * size,
    }
    jobs = [
        Job(name, "our_loop:train", steps * batch * ranks, ranks, pairs, options)
        for name, ranks in ((ONE, 1), (OTHER, 1), (TWO, 2))
    ]
    for name, collective in REDUCE.items():
        asked = {"size": size, "calls": calls, "collective": collective}
        jobs.append(Job(name, "scaling:all_reduce", calls, 2, pairs, asked))
    with working(jobs) as workers:
        candidates = {
            ONE: workers[ONE].ready,
            APART: lambda: _side_by_side(workers[ONE], workers[OTHER]),
            **{name: workers[name].ready for name in (TWO, *REDUCE)},
        }
        timings = measure(candidates, settings.rounds)
    for name, ranks in ((ONE, 1), (APART, 2), (TWO, 2)):
        row = speed_row(timings[name], timings[ONE])
        if shares := [ratio / ranks for ratio in timings[name].ratios(timings[ONE])]:
            row |= figure("efficiency", shares)
        report.add("measured", row)
    for name in REDUCE:
        found = timings[name]
        row = {"name": f"2 ranks, {name}", "bytes": 4 * size}
        row |= figure("microseconds", [1e6 / speed for speed in found.speeds])
        report.add("all-reduce", row | {"calls": calls * len(found.speeds)})
    report.notes += [
        "measured: the whole training loop, one thread a rank, one replica a rank; efficiency:"
        " over as many times one rank alone, paired by round. Ranks that do not communicate show"
        " what they lose to each other's use of memory and caches",
        f"all-reduce: of the buffer that a step exchanges; the mean of {calls} calls in each round",
    ]
    return report


def _side_by_side(one: Worker, other: Worker) -> tuple[int, Run]:
    """Both at once; `one` is ready already."""
    images, _ = other.ready()

    def run() -> None:
        for worker in (one, other):
            worker.begin()
        for worker in (one, other):
            worker.finish()

    return one.job.images + images, run


def all_reduce(
    config: Config, world: World, gate: Gate, size: int, calls: int, collective: bool
) -> None:
    """Sum `size` float32 values over the ranks, `calls` times a turn.

    Args:
        collective: whether by the process group's, or as a step does.
    """
    buffer = torch.zeros(size, device=world.device)
    replace_by_sum: Callable[[torch.Tensor], None] = all_reduce_sum
    if not collective:
        replace_by_sum = build_sum(size, buffer.dtype, world.device)
    for tensor in in_turns(lambda: buffer, calls, gate):
        replace_by_sum(tensor)
        wait_for_device()
