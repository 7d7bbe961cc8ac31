"""How a step runs: operation by operation, compiled, with our fused kernels, or as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_resnet.base.errors import UserError
from dist_resnet.config.schema import Config, ModelConfig
from dist_resnet.kernels import support
from dist_resnet.models.contract import Traits
from dist_resnet.models.norm_act import NormAct
from dist_resnet.native.build import load
from dist_resnet.step.state import TrainState

# On two cores 4 replicas of 32 images are 1.3 times as fast as one after the other, 8 no faster.
_AT_ONCE_ON_CPU = 4


def choose_step_mode(wanted: str, config: Config, device: torch.device) -> tuple[str, str]:
    """A mode other than auto and, for the reader, why.

    auto is fused on a CPU: a step at batch 32 takes 0.9 of eager's time. torch.compile gained
    nothing there, and takes 20 s. On a GPU auto is graph.

    Args:
        wanted: auto, eager, compile, fused or graph.

    Raises:
        UserError: fused or graph was asked for and cannot be had.
    """
    if wanted == "graph" and device.type != "cuda":
        raise UserError("train.step_mode=graph: only on GPUs; use auto on a CPU")
    if wanted in ("eager", "compile"):
        return wanted, wanted
    lacking = _lacking(config, device)
    if wanted == "graph" or (wanted == "auto" and device.type == "cuda"):
        kernels = f"; no kernels of ours: {lacking}" if lacking else ", our kernels"
        return "graph", f"graph (one CUDA graph{kernels})"
    if not lacking:
        return "fused", "fused (BatchNorm, ReLU and addition as one kernel)"
    if wanted == "fused":
        raise UserError(f"train.step_mode=fused: {lacking}; or use eager")
    return "eager", f"eager (slower than fused: {lacking})"


def replicas_at_once(config: Config, local: int, device: torch.device, traits: Traits) -> int:
    """How many of a rank's `local` replicas run as one forward and backward pass; divides them.

    One with parallel.reduction=exact, as the sum over the images of several rounds otherwise than
    the sum of each replica's.
    """
    if config.parallel.reduction == "exact" or traits.alone:
        return 1
    if device.type == "cuda":
        return local
    return max(count for count in range(1, _AT_ONCE_ON_CPU + 1) if local % count == 0)


def told_of_net(config: ModelConfig, state: TrainState, local: int) -> list[str]:
    """What the reader should know of it: its starting weights, how its replicas run, what is
    frozen."""
    lines = [state.told] * bool(state.told)
    frozen = [name for name, p in state.flat.model.named_parameters() if not p.requires_grad]
    if frozen:
        lines.append(f"frozen: {len(frozen)} parameters, such as {frozen[0]}")
    if local > 1 and state.traits.alone:
        lines.append(f"a process's {local} replicas one after the other: {state.traits.alone}")
    momentum, modules = config.bn_momentum, state.flat.model.modules()
    if momentum is not None and not any(isinstance(module, _BatchNorm) for module in modules):
        lines.append(f"model.bn_momentum={momentum:g}: does nothing with a net without BatchNorm")
    return lines


def forward_function(
    mode: str, model: nn.Module, replicas: int = 1, channels_last: bool = True
) -> Callable[[Tensor], Tensor]:
    """The model's forward pass in training, as `mode` (not auto) wants it.

    Args:
        replicas: whose images a batch holds side by side.
        channels_last: the order that our kernels are made for.
    """
    ours = [module for module in model.modules() if isinstance(module, NormAct)]
    for module in ours:
        module.fused = mode in ("fused", "graph") and channels_last
        module.replicas = replicas
    if mode == "compile":
        # Ours are one graph; others' nets may have code that must stay Python.
        compiled: Any = torch.compile(model, fullgraph=bool(ours), dynamic=False)
        return compiled
    return model


def _lacking(config: Config, device: torch.device) -> str:
    """What our fused kernels need and do not find; empty: nothing."""
    if not config.precision.channels_last:
        return "needs precision.channels_last=true"
    if device.type != "cpu":
        return support.lacking(device)
    try:
        load("norm_act")
    except UserError as error:
        return str(error)
    return ""
