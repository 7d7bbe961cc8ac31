"""Learning rates: how the peak follows the global batch, and how the rate moves with the step."""

import math

from dist_resnet.config.schema import OptimConfig, ScheduleConfig

ONECYCLE_RISE = 0.3  # share of the run, and
ONECYCLE_START = 1 / 25  # first rate / peak: the defaults of torch's OneCycleLR
ONECYCLE_END = 1e-4  # last rate / first rate


def scale_factor(optim: OptimConfig, global_batch_size: int) -> float:
    """Peak rate / configured rate.

    Linear: Goyal et al. 2017. Square root: Krizhevsky 2014; it is the rule of adaptive optimisers
    rather than of SGD (Granziol et al. 2022).
    """
    ratio = global_batch_size / optim.reference_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]


def learning_rates(
    schedule: ScheduleConfig, peak: float, steps_per_epoch: int, total_steps: int
) -> list[float]:
    """The rate of every step, 0 to `total_steps` - 1."""
    # Rounding must not make it the whole run: it ends before the last step.
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), total_steps - 1)
    if schedule.name == "onecycle":
        rise = warmup or round(ONECYCLE_RISE * total_steps)
        return [peak * _onecycle(step, rise, total_steps) for step in range(total_steps)]
    if schedule.name == "step":
        marks = [mark * steps_per_epoch for mark in schedule.milestones]
        factors = [0.1 ** sum(step >= mark for mark in marks) for step in range(total_steps)]
    else:
        span = total_steps - warmup
        progress = [max(0, step - warmup) / span for step in range(total_steps)]
        factors = [0.5 * (1 + math.cos(math.pi * share)) for share in progress]
    return [
        peak * factor * min(1.0, (step + 1) / (warmup + 1)) for step, factor in enumerate(factors)
    ]


def _onecycle(step: int, rise: int, total: int) -> float:
    """Straight lines up, then down (Smith and Topin 2018), as torch's OneCycleLR draws them."""
    end = ONECYCLE_START * ONECYCLE_END
    top = max(rise - 1, 1)
    if step <= top:
        return ONECYCLE_START + (1 - ONECYCLE_START) * step / top
    return 1 + (end - 1) * (step - top) / max(total - 1 - top, 1)
