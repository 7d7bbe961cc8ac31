"""One training step in every mode, as a share of the machine's limits, and where its time goes."""

import itertools
from functools import partial

from dist_resnet.base.errors import UserError
from dist_resnet.bench.measure import Run, Timing, measure, speed_row
from dist_resnet.bench.our_loop import kept, make_step, opened
from dist_resnet.bench.parts import profiled
from dist_resnet.bench.report import Report, Settings
from dist_resnet.bench.roofline import count_work, limits
from dist_resnet.config.load import load_config
from dist_resnet.distributed.group import start
from dist_resnet.machine.devices import cuda_count
from dist_resnet.step.captured import as_configured

STEPS = 20  # a turn
BANDS = (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False))
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
    "step by parts, and operators with their self time: from torch.profiler, whose own time is in"
    " them (on a GPU each part waits, so the sum exceeds a free step)",
]


def run(settings: Settings) -> Report:
    """Measure the modes, the ceilings and the parts."""
    report = Report("step", plot=("modes", "images_per_second"))
    steps = 2 if settings.quick else STEPS
    batch = settings.config.data.batch_size_per_replica
    seconds = 0.05 if settings.quick else 1.0
    found: dict[str, dict[str, float]] = {}

    def ready(mode: str, band: str, dtype: str, channels_last: bool) -> tuple[int, Run]:
        made = _Made(settings, mode, dtype, channels_last)
        if band not in found:
            found[band] = made.limits(seconds)
        made.run(5)  # compiles, and captures a graph
        return steps * batch, partial(made.run, steps)

    candidates = {}
    for mode, dtype, channels_last in _modes(settings):
        band = f"{dtype}, {'channels-last' if channels_last else 'NCHW'}"
        candidates[f"{mode}, {band}"] = partial(ready, mode, band, dtype, channels_last)
    timings = measure(candidates, settings.rounds)
    reference = next((timing for timing in timings.values() if timing.speeds), None)
    for name, timing in timings.items():
        shares = _shares(timing, found.get(name.split(", ", 1)[1], {}), batch)
        report.add("modes", speed_row(timing, reference) | shares)
    report.add("limits", *({"name": name} | facts for name, facts in found.items()))
    report.settings = {"batch_size_per_replica": batch, "steps_per_turn": steps}
    _add_parts(report, settings)
    report.notes += _NOTES
    return report


def _modes(settings: Settings) -> list[tuple[str, str, bool]]:
    """(step_mode, dtype, channels_last); compiling takes a minute or more: all with --full."""
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
        pairs = (f"train.step_mode={mode}", f"precision.dtype={dtype}")
        layout = f"precision.channels_last={str(channels_last).lower()}"
        config = load_config([*settings.pairs, *pairs, layout])
        session, plan = opened(config, start(config.parallel.device, 600))
        self.step = make_step(session, plan)
        self.stream = partial(session.batches, plan)
        self.draw = itertools.cycle(kept(self.stream())).__next__
        self._advance = as_configured(self.step, _refuse)

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self._advance(self.draw())

    def limits(self, seconds: float) -> dict[str, float]:
        """What a step computes and moves, and how fast this machine could."""
        step, batch = self.step, self.draw()
        key, turn = step.keys[0], step.turn(0)
        work = count_work(
            lambda: step.sum_over_group(batch.images, batch.labels, batch.samples, key, turn)
        )
        return limits(work, len(batch.images), step.precision, step.device, seconds)


def _refuse(reason: str) -> None:
    raise UserError(reason)


def _shares(timing: Timing, limit: dict[str, float], batch: int) -> dict[str, float]:
    speed = timing.images_per_second
    if speed is None or not limit:
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
    config = settings.config
    mode = config.train.step_mode if config.train.step_mode != "graph" else "eager"
    made = _Made(settings, mode, config.precision.dtype, config.precision.channels_last)
    stream = made.stream()
    try:
        parts, operators = profiled(made.step, stream.__next__, 3 if settings.quick else 26)
    finally:
        stream.close()
    report.add("step by parts", *parts)
    report.add("operators", *operators)
