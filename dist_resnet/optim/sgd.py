"""SGD over a model's flat parameters, loss scaling for fp16, the weight of the moving average."""

import inspect
from typing import Any

import torch
from torch import Tensor

from dist_resnet.config.schema import OptimConfig
from dist_resnet.distributed.flat import FlatModel
from dist_resnet.optim.groups import flat_groups

SMALLEST_SCALE = 2.0**-14  # below fp16's own smallest normal number the gradients are infinite
_SCALE_START = 65536.0  # and
_SCALE_PATIENCE = 2000  # steps without overflow before it doubles: as torch.amp.GradScaler


_sgd_step = inspect.unwrap(torch.optim.SGD.step)


class WithoutCompiler(torch.optim.Optimizer):
    """torch's methods without the decorators that load its compiler: 2 s of every start."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class FlatSGD(WithoutCompiler, torch.optim.SGD):
    """torch's fused SGD; over a model's flat values it is two updates, not one a parameter.

    The momentum starts at zero, which equals torch's first step from the gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = False,
    ) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        with torch.no_grad():
            _sgd_step(self)

    # As if torch had put its hooks (register_optimizer_step_post_hook) and its profiler's mark
    # around it already, which nothing here uses: a fifth of a small net's update.
    step.hooked = True  # type: ignore[attr-defined]

    @staticmethod
    def groups(flat: FlatModel, config: OptimConfig) -> list[dict[str, Any]]:
        """What it is given in place of the model's own parameters."""
        return flat_groups(flat, config)


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
