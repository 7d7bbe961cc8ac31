"""A small checkpoint, of which a test says what matters to it."""

from typing import Any

import torch

from dist_resnet.config.load import to_dict
from dist_resnet.config.schema import Config
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.step.state import Snapshot


def checkpoint_of(step: int = 1, config: Config | None = None, **entries: Any) -> Checkpoint:
    """Of a run with `config` at `step`, whose weights are random."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(40, 9, generator=generator), "b": torch.arange(5)}
    state = Snapshot(
        step=step,
        model=weights,
        optimizer={"own": {"calls": step}},
        ema=None,
        loss_scale=None,
        totals={"sums": torch.ones(2, 5), "finite": True, "finite_steps": step},
        best={"val/top1": 0.5},
    )
    common: dict[str, Any] = {
        "config": to_dict(config or Config()),
        "classes": ["cat", "dog"],
        "mean": [1.0, 2.0, 3.0],
        "std": [4.0, 5.0, 6.0],
        "image_size": [32, 32],
    }
    return Checkpoint(**({"state": state} | common | entries))
