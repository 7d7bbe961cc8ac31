"""SGD over a model's flat parameters, loss scaling for fp16, the weight of the moving average."""

from typing import Any

import torch
from torch import Tensor

from dist_resnet.flat import FlatModel
from dist_resnet.schema import OptimConfig

SMALLEST_SCALE = 2.0**-14  # below fp16's own smallest normal number the gradients are infinite
_SCALE_START = 65536.0  # and
_SCALE_PATIENCE = 2000  # steps without overflow before it doubles: as torch.amp.GradScaler


class FlatSGD:
    """torch's fused SGD on two tensors: the decayed parameters and the others.

    The momentum starts at zero, which equals torch's first step from the gradient.
    """

    def __init__(self, flat: FlatModel, config: OptimConfig, first: int = 0) -> None:
        """`first`: where the values that it updates begin."""
        self.momentum = torch.zeros_like(flat.values)
        self._settings: dict[str, Any] = {
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "dampening": 0.0,
            "maximize": False,
            "is_first_step": False,
        }
        self._parts = [
            (
                [flat.values[part]],
                [flat.gradients[part]],
                [self.momentum[part]] if config.momentum else [],
                decay,
            )
            for part, decay in (
                (slice(first, flat.num_decayed), config.weight_decay),
                (slice(flat.num_decayed, None), 0.0),
            )
        ]

    def step(self, lr: float | Tensor, overflow: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            lr: a number, or a 0-dimensional tensor on the device.
            overflow: float32, 0-dimensional; 1 leaves everything as it is, without a host wait.
        """
        for values, gradients, momentum, decay in self._parts:
            # What torch.optim.SGD(fused=True) ends in; what it does before costs 10 us a step.
            torch._fused_sgd_(
                values,
                gradients,
                momentum,
                weight_decay=decay,
                lr=lr,
                found_inf=overflow,
                **self._settings,
            )


class LossScale:
    """A factor that keeps fp16 gradients above underflow (Micikevicius et al. 2018).

    Halved after an overflow, doubled after 2,000 steps without one; all on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(_SCALE_START, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflow: Tensor) -> None:
        """After a step; `overflow`, 0-dimensional, is 1 if its gradients were not finite."""
        good = torch.where(overflow > 0, 0.0, self.good_steps + 1)
        grown = torch.where(good == _SCALE_PATIENCE, self.scale * 2, self.scale)
        self.scale.copy_(torch.where(overflow > 0, self.scale * 0.5, grown))
        self.good_steps.copy_(torch.where(good == _SCALE_PATIENCE, 0.0, good))

    def state_dict(self) -> dict[str, Any]:
        return {"scale": float(self.scale), "good_steps": float(self.good_steps)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.scale.fill_(saved["scale"])
        self.good_steps.fill_(saved["good_steps"])


def ema_weight(decay: float, step: int) -> float:
    """Weight of the newest values after step `step` (from 0).

    The decay starts at 1/10 and rises to its value, or the random initial weights would dominate
    the first 1 / (1 - decay) steps.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
