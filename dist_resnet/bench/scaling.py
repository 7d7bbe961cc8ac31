"""One rank and two as measured here, and what follows for more replicas on stated networks."""

import statistics
from typing import Any

from dist_resnet.bench.jobs import Job, Worker, working
from dist_resnet.bench.measure import (
    Candidate,
    Spread,
    Timing,
    measure,
    paired_ratio,
    speed_row,
    spread,
)
from dist_resnet.bench.network import BYTES, NETWORKS, as_measured, predict
from dist_resnet.bench.report import Report, Settings

STEPS = 50
REPLICAS = (8, 64, 1024)
ONE, TWO, APART = "1 rank", "2 ranks", "2 ranks that do not communicate"
REDUCE, COLLECTIVE = "as in a step", "by a collective"


def run(settings: Settings) -> Report:
    """Measure, then predict."""
    steps = 2 if settings.quick else STEPS
    batch = settings.config.data.batch_size_per_replica
    report = Report("scaling", plot=("measured", "images_per_second"))
    pairs = ("wandb.mode=offline", "parallel.threads=1", *settings.pairs)
    options = {"steps": steps}
    size, count = exchange_size(settings), 5 if settings.quick else 200
    jobs = [
        Job(ONE, "ours", 1, pairs, options),
        Job(f"{ONE}, the other", "ours", 1, pairs, options),
        Job(TWO, "ours", 2, pairs, options),
    ]
    step_ms: list[float] = []
    reduce_us: dict[str, list[float]] = {REDUCE: [], COLLECTIVE: []}
    for name in reduce_us:
        asked = {"size": size, "count": count, "collective": name == COLLECTIVE}
        jobs.append(Job(name, "all_reduce", 2, pairs, asked))
    with working(jobs) as (workers, failures):
        candidates = _candidates(workers, steps * batch, count, step_ms, reduce_us)
        timings = measure(candidates, settings.rounds)
    for facts in (step_ms, *reduce_us.values()):
        del facts[: len(facts) // (settings.rounds + 1)]  # of the turn that warmed up
    for name, reason in failures.items():
        timings[name] = Timing(name, 1, failure=reason)
    _report_measured(report, timings)
    for name, found in reduce_us.items():
        _report_reduce(report, timings.get(name), spread(found), size, name)
    report.settings = {
        "batch_size_per_replica": batch,
        "steps_per_turn": steps,
        "rounds": settings.rounds,
        "exchanged_bytes": 4 * size,
    }
    own_us = None
    if speed := timings[ONE].images_per_second:
        own_us = 1e6 * batch / speed
    _report_predicted(report, settings.step_microseconds, own_us, step_ms, reduce_us, batch)
    if abs(4 * size / BYTES - 1) > 0.2:
        report.notes.append(
            f"the stated networks' figures are for {BYTES:,} bytes, this model sums {4 * size:,}"
        )
    return report


def exchange_size(settings: Settings) -> int:
    """Values in the buffer that the ranks sum in each step."""
    from dist_resnet.distributed.flat import flatten_model
    from dist_resnet.models.build import build_model

    return flatten_model(build_model(settings.config.model, 10)).exchange.numel()


def _candidates(
    workers: dict[str, Worker],
    images: int,
    count: int,
    step_ms: list[float],
    reduce_us: dict[str, list[float]],
) -> list[Candidate]:
    """Those that can be run with the workers there are; facts of their turns go to the lists."""
    found = []
    one, other = workers.get(ONE), workers.get(f"{ONE}, the other")
    two = workers.get(TWO)
    if one:

        def alone(worker: Worker = one) -> None:
            worker.run()
            step_ms.extend(worker.facts["step_ms"])

        found.append(Candidate(ONE, images, alone))
    if one and other:

        def apart(first: Worker = one, second: Worker = other) -> None:
            first.begin()
            second.begin()
            first.finish()
            second.finish()

        found.append(Candidate(APART, 2 * images, apart))
    if two:
        found.append(Candidate(TWO, 2 * images, two.run))
    for name, microseconds in reduce_us.items():
        if reduce := workers.get(name):

            def reducing(worker: Worker = reduce, kept: list[float] = microseconds) -> None:
                worker.run()
                kept.extend(worker.facts["microseconds"])

            found.append(Candidate(name, count, reducing))
    return found


def _report_measured(report: Report, timings: dict[str, Timing]) -> None:
    one = timings.get(ONE)
    for name, ranks in ((ONE, 1), (APART, 2), (TWO, 2)):
        if name not in timings:
            continue
        row = speed_row(timings[name], one)
        if one and (ratio := paired_ratio(timings[name], one)):
            row["efficiency"] = ratio.median / ranks
            row["efficiency_quartiles"] = [ratio.lower / ranks, ratio.upper / ranks]
        report.add("measured", row)
    report.notes += [
        "measured: the whole training loop, one thread a rank, one replica a rank; efficiency:"
        " over as many times one rank alone, paired by round. Ranks that do not communicate show"
        " what they lose to each other's use of memory and caches",
    ]


def _report_reduce(
    report: Report, timing: Timing | None, found: Spread | None, size: int, name: str
) -> None:
    row: dict[str, Any] = {"name": f"2 ranks, {name}"}
    if found is not None:
        row["bytes"] = 4 * size
        row["microseconds"] = found.median
        row["microseconds_quartiles"] = [found.lower, found.upper]
        row["calls"] = found.count
    elif timing and timing.failure:
        row["failure"] = timing.failure
    if len(row) > 1:
        report.add("all-reduce", row)


def jitter(step_ms: list[float]) -> float:
    """Standard deviation of a step from its quartiles: a rare hiccup of the machine is no jitter.

    A normal distribution's quartiles are 1.349 standard deviations apart.
    """
    found = spread(step_ms)
    return 0.0 if found is None else (found.upper - found.lower) / 1.349


def _report_predicted(
    report: Report,
    given_us: float | None,
    own_us: float | None,
    step_ms: list[float],
    reduce_us: dict[str, list[float]],
    batch: int,
) -> None:
    step_us = given_us or own_us
    if step_us is None:
        report.notes.append("no prediction: one rank alone could not be measured")
        return
    said = "as given by --step-us" if given_us else "as measured here on one rank"
    sigma_us = 1000 * jitter(step_ms)
    networks = list(NETWORKS)
    if all(reduce_us.values()):
        medians = {name: statistics.median(found) for name, found in reduce_us.items()}
        networks.append(as_measured(medians[REDUCE], medians[COLLECTIVE]))
    for network in networks:
        # Two ranks here are there to be held against what was measured.
        counts = REPLICAS if network.doubling is None else (2, *REPLICAS)
        for replicas in counts:
            found = predict(replicas, step_us, sigma_us, network.all_reduce(replicas), batch)
            row: dict[str, Any] = {
                "name": f"{replicas:,} replicas",
                "network": network.name,
                "all_reduce_us": network.all_reduce(replicas),
                "step_us": found.step_us,
                "images_per_second": found.images_per_second,
                "efficiency": found.efficiency,
                "global_batch": found.global_batch,
                "warning": found.warning,
            }
            report.add("predicted", row)
    report.notes += [
        f"predicted: T(N) = t1 + T_AR(N) + sigma sqrt(2 ln N) with t1 = {step_us:,.0f} us ({said})"
        f" and sigma = {sigma_us:,.0f} us (quartiles of the steps measured here / 1.349)."
        " Efficiency looks best where a step is slowest: read it with images per second",
        "warning: the recipe's test error rises from about 7.3% at global batch 128 to 8.1% at"
        " 1,024, 8.7% at 2,048 and 10.2% at 4,096 (hysts/pytorch_image_classification)",
        *(f"{network.name}: {network.source}" for network in networks),
    ]
