"""Training statistics, summed on the device and read by the host only when it logs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NONE = -1


@dataclass(frozen=True)
class Means:
    """Means over the steps since the totals were last taken."""

    loss: float
    top1: float
    grad_norm: float
    steps: int


class Totals:
    """Sums of loss, top-1 and gradient norm over two windows: since the last log, and this epoch's.

    They hold global values, equal on all ranks, and are part of the state: a run continued in the
    middle of a window logs the same figures.
    """

    LOG, EPOCH = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)
        self.first_bad_step = torch.tensor(_NONE, device=device)
        self._one = torch.ones((), device=device)

    def add(self, loss: Tensor, top1: Tensor, grad_norm: Tensor, step: Tensor, bad: Tensor) -> None:
        """Count one step. All arguments 0-dimensional on the device; nothing waits for them."""
        self.sums += torch.stack([loss, top1, grad_norm, self._one])
        first = (self.first_bad_step == _NONE) & bad
        self.first_bad_step.copy_(torch.where(first, step, self.first_bad_step))

    def take(self, window: int) -> Means:
        """Read one window and start it anew. Waits for the device."""
        loss, top1, grad_norm, steps = self.sums[window].tolist()
        self.sums[window].zero_()
        count = max(steps, 1)
        return Means(loss / count, top1 / count, grad_norm / count, int(steps))

    def bad_step(self) -> int | None:
        """The first step whose loss or gradient was not finite. Waits for the device."""
        step = int(self.first_bad_step)
        return None if step == _NONE else step

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.cpu().clone(), "first_bad_step": int(self.first_bad_step)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.sums.copy_(saved["sums"])
        self.first_bad_step.fill_(saved["first_bad_step"])
