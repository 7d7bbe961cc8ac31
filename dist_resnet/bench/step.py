"""One training step in every mode, as a share of the machine's limits, and where its time goes."""

import functools
import itertools
from typing import Any

from dist_resnet.base.errors import UserError, one_line
from dist_resnet.bench.measure import Candidate, Timing, measure, speed_row
from dist_resnet.bench.report import Report, Settings

STEPS = 20  # a turn
BANDS = (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False))


def run(settings: Settings) -> Report:
    """Measure the modes, the ceilings and the parts."""
    report = Report("step", plot=("modes", "images_per_second"))
    steps = 2 if settings.quick else STEPS
    batch = settings.config.data.batch_size_per_replica
    candidates: list[Candidate] = []
    failed: list[Timing] = []
    limits: dict[str, dict[str, Any]] = {}
    for mode, dtype, channels_last in _modes(settings):
        layout = "channels-last" if channels_last else "NCHW"
        name = f"{mode}, {dtype}, {layout}"
        try:
            made = _Made(settings, mode, dtype, channels_last)
            band = f"{dtype}, {layout}"
            if band not in limits:
                limits[band] = made.limits(0.05 if settings.quick else 1.0)
            made.run(5)  # compiles, and captures a graph
        except Exception as error:  # a mode may be missing here; its row says why
            failed.append(Timing(name, 1, failure=one_line(error)))
        else:
            candidates.append(Candidate(name, steps * batch, functools.partial(made.run, steps)))
    timings = measure(candidates, settings.rounds)
    reference = next(iter(timings.values()), None)
    for timing in [*timings.values(), *failed]:
        row = speed_row(timing, reference)
        row |= _shares(timing, limits.get(timing.name.split(", ", 1)[1]), batch)
        report.add("modes", row)
    report.add("limits", *({"name": name, **facts} for name, facts in limits.items()))
    report.settings = {
        "batch_size_per_replica": batch,
        "steps_per_turn": steps,
        "rounds": settings.rounds,
        "model": settings.config.model.name,
    }
    _add_parts(report, settings)
    report.notes += _NOTES
    return report


_NOTES = [
    "every step is the trainer's own, with augmentation and mixup, fed with uint8 batches kept in"
    " memory; one replica, one process",
    "percent of limit: the longer of FLOPs / matrix-product rate and bytes / bandwidth, both rates"
    " measured here, over the time of the step. Bytes are those of a step without fusion, so a"
    " compiled step may pass 100",
    "percent of convolutions alone: time of the model's convolutions, forward and backward, and"
    " nothing else, over the time of the step",
    "bandwidth: adding buffers as large as the activations that a step keeps (where these fit into"
    " a cache, it is the cache's)",
    "step by parts: with timers around them (on a GPU each waits, so the sum exceeds a free step);"
    " operators: self time, from torch.profiler",
]


def _modes(settings: Settings) -> list[tuple[str, str, bool]]:
    """(step_mode, dtype, channels_last); compiling takes a minute or more: all with --full."""
    from dist_resnet.machine.devices import cuda_count

    on_gpu = cuda_count(settings.config.parallel.device) > 0
    modes = [("eager", *band) for band in BANDS]
    if not on_gpu:
        modes += [("fused", *band) for band in BANDS if band[1]]
    compiled = BANDS if settings.full else BANDS[:1]
    if not settings.quick:
        modes += [("compile", *band) for band in compiled]
    if on_gpu:
        modes += [("eager", "fp16", True), ("compile", "fp16", True)]
        modes += [("graph", "bf16", True), ("graph", "fp16", True)]
    return modes


class _Made:
    """A trainer's step in one mode, with a few batches in memory."""

    def __init__(self, settings: Settings, mode: str, dtype: str, channels_last: bool) -> None:
        from dist_resnet.bench.our_loop import kept, make_step, quiet
        from dist_resnet.config.load import load_config
        from dist_resnet.config.plan import make_plan
        from dist_resnet.distributed.group import start
        from dist_resnet.step.captured import as_configured
        from dist_resnet.training.session import open_session

        layout = str(channels_last).lower()
        pairs = (f"train.step_mode={mode}", f"precision.dtype={dtype}", "parallel.replicas=1")
        config = quiet(load_config([*settings.pairs, *pairs, f"precision.channels_last={layout}"]))
        session = open_session(config, start(config.parallel.device, 600))
        plan = make_plan(config, len(session.train_indices), 1)
        self.step = make_step(session, plan)
        self.advance = as_configured(self.step, _refuse)
        self.stream = functools.partial(session.batches, plan)
        self.draw = itertools.cycle(kept(self.stream())).__next__

    def run(self, steps: int) -> None:
        """So many steps, and wait for the device."""
        from dist_resnet.bench.parts import now

        for _ in range(steps):
            self.advance(self.draw())
        now()

    def limits(self, seconds: float) -> dict[str, float]:
        """What a step computes and moves, and how fast this machine could."""
        from dist_resnet.bench.roofline import limits

        step, batch = self.step, self.draw()
        key, turn = step.keys[0], step.turn(0)
        images, _ = step.replica_pass.inputs(batch.images, batch.samples, key, turn)
        if not step.config.precision.channels_last:
            images = images.contiguous()

        def forward_and_backward() -> None:
            step.sum_over_group(batch.images, batch.labels, batch.samples, key, turn)

        return limits(forward_and_backward, step.state.flat.model, images, step.precision, seconds)


def _refuse(reason: str) -> None:
    raise UserError(reason)


def _shares(timing: Timing, limit: dict[str, Any] | None, batch: int) -> dict[str, float]:
    speed = timing.images_per_second
    if speed is None or limit is None:
        return {}
    step_ms = 1000 * batch / speed
    bound = max(limit["compute_ms"], limit["memory_ms"])
    return {
        "ms_per_step": step_ms,
        "percent_of_limit": 100 * bound / step_ms,
        "percent_of_convolutions_alone": 100 * limit["convolutions_ms"] / step_ms,
    }


def _add_parts(report: Report, settings: Settings) -> None:
    """Of the configured precision, layout and mode (a graph has no parts), with the real loader."""
    from dist_resnet.bench.parts import operators_of_step, parts_of_step

    config = settings.config
    mode = config.train.step_mode if config.train.step_mode != "graph" else "eager"
    made = _Made(settings, mode, config.precision.dtype, config.precision.channels_last)
    stream, steps = made.stream(), 3 if settings.quick else 50
    try:
        report.add("step by parts", *parts_of_step(made.step, stream.__next__, steps))
        report.add("operators", *operators_of_step(made.step, stream.__next__, steps // 2 + 1))
    finally:
        stream.close()
