"""Dropout of features whose choices are a function of (seed, step, sample), as of every sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class SampleDropout(nn.Module):
    """Dropout of a layer's input features, N samples of F features each.

    The training step sets `factors`; without them, in another training loop, it is `nn.Dropout`.
    """

    factors: Tensor | None = None
    """float32 (N, F): 0, or 1 / (1 - probability)."""

    def __init__(self, features: int, probability: float) -> None:
        super().__init__()
        self.features, self.probability = features, probability

    def forward(self, x: Tensor) -> Tensor:
        """(N, F) to (N, F)."""
        if not self.training:
            return x
        if self.factors is None:
            return F.dropout(x, self.probability)
        if torch.compiler.is_compiling():  # which makes one kernel of it
            return (x * self.factors).to(x.dtype)
        result: Tensor = _Scaled.apply(x, self.factors)
        return result

    def extra_repr(self) -> str:
        return f"features={self.features}, p={self.probability}"


class _Scaled(torch.autograd.Function):
    """x times float32 factors, rounded once to x's type, as `nn.Dropout` leaves it.

    A plain product is float32; its casts to and fro are two more kernels of a GPU's step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return torch.mul(x, factors, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return torch.mul(gradient, factors, out=torch.empty_like(gradient)), None


def dropouts(model: nn.Module) -> list[SampleDropout]:
    """Those of a model that drop anything, in the order in which they take their factors."""
    return [m for m in model.modules() if isinstance(m, SampleDropout) and m.probability > 0]


def set_factors(modules: Sequence[SampleDropout], factors: Tensor | None) -> None:
    """Give each its own columns of (N, sum of their features); None: to be drawn by torch."""
    if len(modules) == 1:
        modules[0].factors = factors
        return
    widths = [module.features for module in modules]
    parts = [None] * len(modules) if factors is None else factors.split(widths, dim=1)
    for module, part in zip(modules, parts, strict=True):
        module.factors = part


def probability_of(modules: Sequence[SampleDropout]) -> float:
    """The one probability of all of them; 0 where there are none."""
    found = {module.probability for module in modules}
    assert len(found) <= 1, "one probability for all of a model's dropouts"
    return found.pop() if found else 0.0


def num_features(modules: Sequence[SampleDropout]) -> int:
    return sum(module.features for module in modules)
