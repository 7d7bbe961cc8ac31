"""summary.json: what a run came to, read from its metrics and its state."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, float | int | None]


def summarise(
    rows: Sequence[Row], best: Mapping[str, float], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        rows: of metrics.jsonl; the last evaluation's figures are the run's, never the best one's.
        best: val/top1 and step of the best evaluation, told beside them.
        facts: what is known otherwise: speed, plan, dataset, versions, hardware.
    """
    evaluations = [row for row in rows if row.get("val/top1") is not None]
    last = dict(evaluations[-1]) if evaluations else {}
    top1, gap = last.get("val/top1"), last.get("gap/top1")
    figures = {key: value for key, value in last.items() if key.startswith(("val/", "gap/"))}
    return {
        "step": last.get("step"),
        "epoch": last.get("epoch"),
        **figures,
        # Over the last epoch, as trained on: augmented, under mixup weighted by lambda.
        "train/top1": None if top1 is None or gap is None else top1 + gap,
        "best/val/top1": best.get("val/top1"),
        "best/step": best.get("step"),
        **facts,
    }
