"""Training statistics, summed on the device and read by the host only when it logs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Means:
    """Means over the steps of a window."""

    loss: float
    measures: dict[str, float]
    grad_norm: float
    steps: int


class Totals:
    """Sums of loss, measures and gradient norm over two windows: since the last log, this epoch's.

    They hold global values, equal on all ranks, and are part of the state: a run continued in the
    middle of a window logs the same figures, and so does one that was to end there and is made
    longer, as a window is read without an end and begins anew with its first step. Steps are
    counted from the run's first.
    """

    LOG, EPOCH = 0, 1

    def __init__(self, device: torch.device, measures: Sequence[str] = ("top1",)) -> None:
        self._measures = list(measures)
        self.sums = torch.zeros(2, len(measures) + 4, dtype=torch.float64, device=device)
        self._finite = torch.ones((), device=device)
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, row: Tensor) -> None:
        """Count one step; nothing waits for the device.

        Args:
            row: float32 (M + 4,): loss, measures, anything, norm of the gradient, 1.
        """
        self.sums += row
        # Neither can be minus infinity, and NaN is not below infinity.
        self._finite *= row[0] + row[-2] < torch.inf
        self._finite_steps += self._finite.long()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, whether all was finite, and the number of steps until it was not."""
        return self.sums, self._finite, self._finite_steps

    def begin(self, window: int) -> None:
        """Count from the next step on."""
        self.sums[window].zero_()

    def means(self, window: int) -> Means:
        """Of one window so far. Waits for the device."""
        *sums, steps = self.sums[window].tolist()
        loss, *measured, _, grad_norm = (value / max(steps, 1) for value in sums)
        named = dict(zip(self._measures, measured, strict=True))
        return Means(loss, named, grad_norm, int(steps))

    def bad_step(self) -> int | None:
        """The first step whose loss or gradient was not finite. Waits for the device."""
        return None if self._finite > 0 else int(self._finite_steps)

    def state_dict(self) -> dict[str, Any]:
        finite = bool(self._finite > 0), int(self._finite_steps)
        kept = {"finite": finite[0], "finite_steps": finite[1], "measures": self._measures}
        return {"sums": self.sums.cpu().clone(), **kept}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        # A version with other measures begins its windows anew.
        if saved.get("measures", ["top1"]) == self._measures:
            self.sums.copy_(saved["sums"])
        self._finite.fill_(saved["finite"])
        self._finite_steps.fill_(saved["finite_steps"])
