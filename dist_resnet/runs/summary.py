"""summary.json: what a run came to."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.runs.diagnosis import Row, diagnose


def last_evaluation(rows: Sequence[Row]) -> Row:
    """The last evaluation among the rows of metrics.jsonl: of a run that was killed at its end.

    Raises:
        UserError: there is none.
    """
    for row in reversed(rows):
        if row.get("val/top1") is not None:
            return row
    raise UserError("metrics.jsonl holds no evaluation; see python -m dist_resnet.evaluate")


def summarise(
    rows: Sequence[Row], last: Row, best: Mapping[str, float], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        rows: of metrics.jsonl, for the diagnosis.
        last: row of the last evaluation: its figures are the run's, never the best one's.
        best: val/top1 and step of the best evaluation, told beside them.
        facts: what is known otherwise: speed, plan, dataset, versions, hardware.
    """
    top1, gap = last["val/top1"], last["gap/top1"]
    return {
        "step": last["step"],
        "epoch": last["epoch"],
        **{key: value for key, value in last.items() if key.startswith(("val/", "gap/"))},
        # Over the last epoch, as trained on: augmented, under mixup weighted by lambda.
        "train/top1": None if top1 is None or gap is None else top1 + gap,
        "best/val/top1": best.get("val/top1"),
        "best/step": best.get("step"),
        **facts,
        "diagnosis": diagnose(rows),
    }
