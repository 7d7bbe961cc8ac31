"""How a step runs: operation by operation, compiled, or with our fused kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_resnet.errors import UserError
from dist_resnet.models.resnet import NormAct, ResNet
from dist_resnet.native.build import load
from dist_resnet.schema import Config


def choose_step_mode(wanted: str, config: Config, device: torch.device) -> tuple[str, str]:
    """A mode other than auto and, for the reader, why.

    auto is fused on a CPU: a step at batch 32 takes 0.9 of eager's time. torch.compile gained
    nothing there, and takes 20 s. Everywhere else auto is eager.

    Args:
        wanted: auto, eager, compile, fused or graph.

    Raises:
        UserError: fused or graph was asked for and cannot be had.
    """
    if wanted == "graph" and device.type != "cuda":
        raise UserError("train.step_mode=graph: only on GPUs; use auto on a CPU")
    if wanted not in ("auto", "fused"):
        return wanted, wanted
    try:
        _require_fused(config, device)
    except UserError as error:
        if wanted == "fused":
            raise UserError(f"train.step_mode=fused: {error}; or use eager") from None
        return "eager", "eager" if device.type == "cuda" else f"eager (slower than fused: {error})"
    return "fused", "fused (BatchNorm, ReLU and addition as one kernel)"


def forward_function(mode: str, model: ResNet) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The model's forward pass in training, as `mode` (not auto) wants it."""
    for module in model.modules():
        if isinstance(module, NormAct):
            module.fused = mode == "fused"
    if mode in ("compile", "graph"):
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
        return compiled
    return model


def _require_fused(config: Config, device: torch.device) -> None:
    if device.type != "cpu":
        raise UserError("only on CPUs")
    if not config.precision.channels_last:
        raise UserError("needs precision.channels_last=true")
    load("norm_act")
