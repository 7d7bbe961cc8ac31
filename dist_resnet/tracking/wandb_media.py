"""Pictures and files as wandb's objects. `wandb` is the module, handed in by its only door."""

import re
from collections.abc import Sequence
from typing import Any

from dist_resnet.tracking.tracker import Artifact, Media, Picture, Say

MOST_CELLS = 10_000
"""Rows of a table that W&B keeps; it would cut off the rest without a word."""


def row(wandb: Any, media: Media, classes: Sequence[str], say: Say) -> dict[str, Any]:
    """The row that `run.log` takes, without a confusion matrix that does not fit into a table."""
    shown: dict[str, Any] = {}
    for key, value in media.items():
        if isinstance(value, int):
            shown[key] = value
        elif isinstance(value, Picture):
            shown[key] = wandb.Image(value.pixels, caption=value.caption)
        elif len(value) ** 2 <= MOST_CELLS:
            shown[key] = _confusion_chart(wandb, value, classes)
        else:
            say(
                f"wandb: no {key}: {len(classes):,} classes have more than the"
                f" {MOST_CELLS:,} cells that a table takes; its picture shows all"
            )
    return shown


def artifact(wandb: Any, wanted: Artifact) -> Any:
    """The artifact that `run.log_artifact` takes.

    Raises:
        ValueError: there is no such file.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", wanted.name)  # what W&B allows
    made = wandb.Artifact(name, wanted.kind, metadata=dict(wanted.metadata))
    # By default the file is copied into the user's home folder first.
    made.add_file(str(wanted.path), policy="immutable", skip_cache=True)
    return made


def _confusion_chart(wandb: Any, counts: list[list[int]], classes: Sequence[str]) -> Any:
    """W&B's own confusion matrix, from the counts: its helper wants every image's label."""
    cells = [
        [classes[row], classes[column], count]
        for row, line in enumerate(counts)
        for column, count in enumerate(line)
    ]
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells)
    fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    return wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "val/confusion"})
