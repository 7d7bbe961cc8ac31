"""Muon for the convolutions, SGD for everything else.

K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", in the form of
their CIFAR-10 speed run: a weight's norm is kept at the root of its filters in place of weight
decay, as BatchNorm after every convolution makes its scale meaningless.

Every rank computes the same update from the same gradients. Matrix products round by the kind of
processor and the number of threads: ranks must not differ in these, or their weights part.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from dist_resnet.flat import FlatModel
from dist_resnet.optim import FlatSGD
from dist_resnet.schema import OptimConfig

# The quintic that drives singular values towards 1, into 0.7 to 1.2, in five iterations.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1: (K, M, N) to (K, M, N).

    Newton-Schulz iterations; a matrix of zeros stays one.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class FlatMuon(FlatSGD):
    """Convolutions of one shape are updated together, as matrices of a row for each filter."""

    def __init__(self, flat: FlatModel, config: OptimConfig) -> None:
        convolutions = [m.weight for m in flat.model.modules() if isinstance(m, nn.Conv2d)]
        count = sum(weight.numel() for weight in convolutions)
        ends = [weight.storage_offset() + weight.numel() for weight in convolutions]
        assert max(ends) == count, "the convolutions must come before every dense layer"
        super().__init__(flat, config, first=count)
        self._momentum_factor, self._nesterov = config.momentum, config.nesterov
        self._relative_rate = config.muon_lr / config.lr
        self._gradients, self._buffer = flat.gradients[:count], self.momentum[:count]
        self._direction = torch.empty_like(self._gradients)
        self._groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight in convolutions:
            # In memory a filter's values follow one another in either layout, and their order is a
            # permutation of columns, which orthogonalisation commutes with.
            start = weight.storage_offset()
            part = slice(start, start + weight.numel())
            pair = [t[part].view(weight.shape[0], -1) for t in (flat.values, self._direction)]
            self._groups[pair[0].shape].append((pair[0], pair[1]))

    def step(self, lr: float | Tensor, overflow: Tensor | None = None) -> None:
        """As `FlatSGD.step`; there is no overflow, for there is no fp16."""
        super().step(lr, overflow)
        self._buffer.mul_(self._momentum_factor).add_(self._gradients)
        self._direction.copy_(self._buffer)
        if self._nesterov:
            self._direction.mul_(self._momentum_factor).add_(self._gradients)
        for (rows, _), pairs in self._groups.items():
            weights = [weight for weight, _ in pairs]
            stacked = torch.stack(weights)
            stacked *= math.sqrt(rows) / stacked.norm(dim=(1, 2), keepdim=True)
            update = orthogonalise(torch.stack([direction for _, direction in pairs]))
            stacked -= update * (lr * self._relative_rate)
            torch._foreach_copy_(weights, stacked.unbind())


def build_optimizer(flat: FlatModel, config: OptimConfig) -> FlatSGD:
    """The configured optimizer."""
    return FlatMuon(flat, config) if config.name == "muon" else FlatSGD(flat, config)
