"""The optimizer of a run, built in or one's own: `torch.optim.Optimizer` at the schedule's rate."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.config.builtins import OPTIMIZERS
from dist_resnet.config.plugins import (
    calling,
    check_arguments,
    is_plugin,
    label,
    resolve,
    signature,
    takes_any,
    within_step,
)
from dist_resnet.config.schema import Config, OptimConfig
from dist_resnet.distributed.flat import FlatModel
from dist_resnet.optim.groups import parameter_groups
from dist_resnet.optim.saved import OptimizerState
from dist_resnet.optim.trial import KEY, refuse_closure, try_out

_SETTINGS = tuple(f.name for f in fields(OptimConfig) if f.name not in ("name", "args"))


class RunOptimizer:
    """An optimizer whose rates follow the schedule, each group's by a factor of its own."""

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        flat: FlatModel,
        lr: float,
        capturable: bool,
    ) -> None:
        """
        Args:
            lr: with which it was made; a group's factor is its own rate over this.
            capturable: whether its steps may be recorded as a CUDA graph.
        """
        self.plugin = is_plugin(name)
        self.remarks: list[str] = []
        """For the reader: what of the configuration does nothing."""
        self.name = name
        self.optimizer = optimizer
        self.capturable = capturable
        self.state = OptimizerState(optimizer, flat, parted=not self.plugin)
        self._factors = [_share(group["lr"], lr) for group in optimizer.param_groups]
        if self.plugin and capturable:  # a graph reads its rates from memory
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=flat.values.device)

    def step(self, lr: float | Tensor, overflow: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            lr: a number, or a 0-dimensional tensor on the device.
            overflow: float32, 0-dimensional; 1 leaves everything as it is, without a host wait.
        """
        optimizer: Any = self.optimizer
        for group, factor in zip(optimizer.param_groups, self._factors, strict=True):
            rate = lr if factor == 1 else lr * factor
            if self.plugin and isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if overflow is not None:  # as torch.amp.GradScaler hands it over
            optimizer.grad_scale, optimizer.found_inf = None, overflow
        with within_step(KEY, self.name) if self.plugin else nullcontext():
            optimizer.step()
        if overflow is not None:
            del optimizer.grad_scale, optimizer.found_inf


def build_optimizer(flat: FlatModel, config: Config, scaled: bool = False) -> RunOptimizer:
    """The configured optimizer.

    Args:
        scaled: whether the loss is scaled, as in fp16.

    Raises:
        UserError: a name or an argument that does not exist, or an optimizer that cannot serve.
    """
    optim, plugin = config.optim, is_plugin(config.optim.name)
    name = optim.name
    function, args = callable_of(config, flat.values.device)
    make_groups = parameter_groups if plugin else getattr(function, "groups", parameter_groups)
    groups = make_groups(flat, optim)
    decays = not plugin or takes_weight_decay(signature(function) or {})
    if not decays:
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        with calling(KEY, name):
            made = function(groups, **args)
        if not isinstance(made, torch.optim.Optimizer):
            kind = type(made).__name__
            raise UserError(f"{KEY}={name}: gives a {kind}, which is no torch.optim.Optimizer")
        return made

    if plugin:
        refuse_closure(name, function)
        try_out(name, make, groups)
    optimizer = make(groups)
    if scaled and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            f"precision.dtype=fp16: {KEY}={name} cannot skip a step whose gradients overflowed; "
            "use bf16, or fp32 where the GPU has no bf16"
        )
    built = RunOptimizer(name, optimizer, flat, optim.lr, not plugin or "capturable" in args)
    if optim.weight_decay and not decays:
        built.remarks.append(f"optim.weight_decay={optim.weight_decay:g}: {name} has none")
    return built


def callable_of(config: Config, device: torch.device) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the configured optimizer, and what it is called with beside the groups.

    Raises:
        UserError: there is no such callable, or it does not take optim.args.
    """
    optim, own = config.optim, config.optim.args
    function = resolve(KEY, OPTIMIZERS.get(optim.name, optim.name))
    parameters = signature(function) or {}
    if parameters and "lr" not in parameters and not takes_any(parameters):
        raise UserError(f"{KEY}={optim.name}: {label(function)} takes no lr")
    given: dict[str, Any] = {"lr": optim.lr}
    if not is_plugin(optim.name):
        given |= {key: getattr(optim, key) for key in _SETTINGS if key in parameters}
    elif takes_weight_decay(parameters):
        given["weight_decay"] = optim.weight_decay
    check_arguments("optim.args", function, own, [*list(parameters)[:1], *given])
    if config.train.step_mode != "graph":
        return function, given | own
    own = dict(own)
    if own.pop("capturable", "capturable" in parameters) and is_plugin(optim.name):
        given |= {"lr": torch.tensor(optim.lr, device=device), "capturable": True}
    return function, given | own


def takes_weight_decay(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether an optimizer of this signature has weight decay; where it cannot be told, it has."""
    return not parameters or takes_any(parameters) or "weight_decay" in parameters


def _share(rate: float | Tensor, lr: float) -> float:
    """`rate` over `lr`; a tensor has rounded what it was made of."""
    return float(rate) / (float(torch.tensor(lr)) if isinstance(rate, Tensor) else lr)
