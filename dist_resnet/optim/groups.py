"""Which parameters an optimizer is given together: by weight decay, and biases by their rate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dist_resnet.config.schema import OptimConfig
from dist_resnet.distributed.flat import FlatModel


def parameter_groups(
    flat: FlatModel, config: OptimConfig, wanted: Callable[[Tensor], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """The model's own parameters, as groups of `torch.optim.Optimizer`; none of them is empty.

    Biases have one of their own where optim.bias_lr_factor gives them a rate of their own.

    Args:
        wanted: which parameters.
    """
    parameters = [p for p in flat.parameters if wanted(p)]
    decayed = [p for p in parameters if p.storage_offset() < flat.num_decayed]
    others = [p for p in parameters if p.storage_offset() >= flat.num_decayed]
    if config.bias_lr_factor == 1:
        return _groups((decayed, config.weight_decay), (others, 0.0))
    named = flat.model.named_parameters()
    biases = {id(p) for name, p in named if name.rpartition(".")[2] == "bias"}
    own = _groups(([p for p in others if id(p) in biases], 0.0))
    rest = [p for p in others if id(p) not in biases]
    rate = {"lr": config.lr * config.bias_lr_factor}
    return [*_groups((decayed, config.weight_decay), (rest, 0.0)), *(g | rate for g in own)]


def flat_groups(flat: FlatModel, config: OptimConfig, first: int = 0) -> list[dict[str, Any]]:
    """The same as one parameter a group, for optimizers that treat every value by itself.

    Args:
        first: where the values that they update begin.
    """
    if config.bias_lr_factor != 1:  # biases lie between others
        return parameter_groups(flat, config, lambda p: int(p.storage_offset()) >= first)
    decayed = flat_parameter(flat, first, flat.num_decayed)
    others = flat_parameter(flat, flat.num_decayed, flat.values.numel())
    return _groups(([decayed], config.weight_decay), ([others], 0.0))


def flat_parameter(flat: FlatModel, start: int, stop: int) -> nn.Parameter:
    """A part of the flat values, its `.grad` that of the gradients."""
    parameter = nn.Parameter(flat.values[start:stop])
    parameter.grad = flat.gradients[start:stop]
    return parameter


def _groups(*parts: tuple[list[Any], float]) -> list[dict[str, Any]]:
    return [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in parts
        if sum(p.numel() for p in parameters)
    ]
