"""What follows the mean gradient in a step: the optimizer, the moving average and the totals."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_resnet.config.schema import OptimConfig
from dist_resnet.kernels import support
from dist_resnet.optim.sgd import SMALLEST_SCALE
from dist_resnet.step.state import TrainState

Update = Callable[[float | Tensor, float | Tensor], None]
"""Takes the step's learning rate and the newest values' weight in the moving average: numbers, or
0-dimensional float32 tensors."""


def build_update(state: TrainState, config: OptimConfig) -> Update:
    """By our kernels for SGD without loss scaling where they run, else by PyTorch's operations."""
    plain = config.name == "sgd" and state.loss_scale is None
    plain = plain and config.clip_norm == 0 and config.bias_lr_factor == 1
    if plain and support.usable(state.flat.values.device):
        return _update_by_kernels(state, config)
    return update_by_torch(state, config)


def update_by_torch(state: TrainState, config: OptimConfig) -> Update:
    """On any device, for any optimizer, with loss scaling where the state has it."""
    flat, scaling = state.flat, state.loss_scale

    def update(lr: float | Tensor, ema_weight: float | Tensor) -> None:
        overflow = None
        if scaling is not None:
            flat.gradients.div_(scaling.scale)
        torch.linalg.vector_norm(flat.gradients, out=flat.norm)
        clip(flat.gradients, flat.norm, config.clip_norm)  # what is logged is the norm before
        if scaling is not None:
            # fp16 probes for overflow: an infinite gradient is then a skipped step, no divergence,
            # unless no scale is small enough. Skipped steps leave the mean norm finite.
            overflow = (~torch.isfinite(flat.norm)).float()
            scaling.update(overflow)
            norm = torch.where(overflow > 0, 0.0, flat.norm)
            flat.norm.copy_(torch.where(scaling.scale > SMALLEST_SCALE, norm, torch.inf))
        state.optimizer.step(lr, overflow)
        if state.ema is not None:
            size = flat.values.numel()
            state.ema[:size].lerp_(flat.values, ema_weight)
            state.ema[size:].lerp_(flat.statistics, ema_weight)
        state.totals.add(flat.row)

    return update


def clip(gradients: Tensor, norm: Tensor, limit: float) -> None:
    """Scale `gradients`, of L2 norm `norm`, to at most `limit`; 0 leaves them.

    As torch.nn.utils.clip_grad_norm_.
    """
    if limit:
        gradients.mul_((limit / (norm + 1e-6)).clamp(max=1.0))


def _update_by_kernels(state: TrainState, config: OptimConfig) -> Update:
    from dist_resnet.kernels import update as kernels  # Triton is not everywhere

    flat, momentum = state.flat, _joined_momentum(state)

    def update(lr: float | Tensor, ema_weight: float | Tensor) -> None:
        squares = kernels.update(
            flat.values,
            flat.exchange,
            momentum,
            state.ema,
            flat.num_decayed,
            lr,
            ema_weight,
            config.momentum,
            config.weight_decay,
            config.nesterov,
        )
        kernels.account(squares, flat.row, *state.totals.tensors)

    return update


def _joined_momentum(state: TrainState) -> Tensor:
    """SGD's momentum as one tensor, float32 (P,), of which it holds views from now on."""
    optimizer = state.optimizer.optimizer
    kept = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    joined = torch.cat([entry["momentum_buffer"] for entry in kept])
    parts = joined.split([entry["momentum_buffer"].numel() for entry in kept])
    for entry, part in zip(kept, parts, strict=True):
        entry["momentum_buffer"] = part
    return joined
