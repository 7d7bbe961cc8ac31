"""SGD over the two flat groups of parameters, and the moving average of the weights."""

import torch
from torch import Tensor, nn

from dist_resnet.flat import FlatModel
from dist_resnet.schema import OptimConfig


def build_optimizer(flat: FlatModel, config: OptimConfig) -> torch.optim.SGD:
    """Fused SGD; its momentum starts at zero, which equals torch's first step from the gradient."""
    groups = []
    for part, decay in (
        (slice(0, flat.num_decayed), config.weight_decay),
        (slice(flat.num_decayed, None), 0.0),
    ):
        parameter = nn.Parameter(flat.values[part], requires_grad=True)
        parameter.grad = flat.gradients[part]
        groups.append({"params": [parameter], "weight_decay": decay})
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    for parameter in flat_parameters(optimizer):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def flat_parameters(optimizer: torch.optim.SGD) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def momentum_buffers(optimizer: torch.optim.SGD) -> Tensor:
    """float32 (P,): a copy of the momentum, in the order of `FlatModel.values`."""
    parameters = flat_parameters(optimizer)
    return torch.cat([optimizer.state[p]["momentum_buffer"] for p in parameters])


def set_momentum_buffers(optimizer: torch.optim.SGD, momentum: Tensor) -> None:
    offset = 0
    for parameter in flat_parameters(optimizer):
        part = momentum[offset : offset + parameter.numel()]
        optimizer.state[parameter]["momentum_buffer"].copy_(part)
        offset += parameter.numel()


def ema_weight(decay: float, step: int) -> float:
    """Weight of the newest values after step `step` (from 0).

    The decay starts at 1/10 and rises to its value, or the random initial weights would dominate
    the first 1 / (1 - decay) steps.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
