"""train.early_stop: whether accuracy has fallen clearly from its best at a low learning rate.

The diagnosis finds the same afterwards: `runs.diagnosis.RULES`.
"""

from collections.abc import Mapping, Sequence

from dist_resnet.runs.diagnosis import LOW_RATE, decline_threshold
from dist_resnet.step.state import TrainState


def declines(row: Mapping[str, float | int], state: TrainState, rates: Sequence[float]) -> bool:
    """Judge an evaluation, and note it in `state.best_at_low_rate`.

    A warm-up's low rates do not count; once past its peak no schedule rises again.

    Args:
        row: as it is logged: step, val/top1 (share of 1) and val/images.
        rates: of every step of the schedule.
    """
    step, peak = int(row["step"]), max(rates)
    if step <= rates.index(peak) or rates[step - 1] >= LOW_RATE * peak:
        return False
    top1 = row["val/top1"]
    state.best_at_low_rate = max(state.best_at_low_rate, top1)
    return state.best_at_low_rate - top1 >= decline_threshold(top1, int(row["val/images"]))
