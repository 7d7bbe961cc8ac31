"""Muon for the convolutions, SGD for everything else.

K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", in the form of
their CIFAR-10 speed run: a weight's norm is kept at the root of its filters in place of weight
decay, as BatchNorm after every convolution makes its scale meaningless.

Every rank computes the same update from the same gradients. Matrix products round by the kind of
processor and the number of threads: ranks must not differ in these, or their weights part.
"""

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
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x.mT if tall else x


class FlatMuon(FlatSGD):
    """Convolutions are updated together, as matrices of a row for each filter.

    On a CPU those of one shape are; on a GPU all, filled up with zeros, which stay zeros: 55
    launches in place of 426, in bfloat16 as in the speed run.
    """

    def __init__(self, flat: FlatModel, config: OptimConfig) -> None:
        convolutions = [m.weight for m in flat.model.modules() if isinstance(m, nn.Conv2d)]
        count = sum(weight.numel() for weight in convolutions)
        ends = [weight.storage_offset() + weight.numel() for weight in convolutions]
        assert max(ends) == count, "the convolutions must come before every dense layer"
        super().__init__(flat, config, first=count)
        self._momentum_factor, self._nesterov = config.momentum, config.nesterov
        self._relative_rate = config.muon_lr / config.lr
        self._gradients, self._buffer = flat.gradients[:count], self.momentum[:count]
        self._values = flat.values[:count]
        shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in convolutions:
            shapes[weight.shape[0], weight[0].numel()].append(weight)
        if flat.values.is_cuda:
            largest = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
            self._stacks = [_Stack(convolutions, largest)]
        else:
            self._stacks = [_Stack(weights, shape) for shape, weights in shapes.items()]

    def step(self, lr: float | Tensor, overflow: Tensor | None = None) -> None:
        """As `FlatSGD.step`; there is no overflow, for there is no fp16."""
        super().step(lr, overflow)
        self._buffer.mul_(self._momentum_factor).add_(self._gradients)
        direction = self._buffer
        if self._nesterov:
            direction = self._gradients.add(self._buffer, alpha=self._momentum_factor)
        for stack in self._stacks:
            weights = stack.matrices(self._values)
            weights *= stack.norms / weights.norm(dim=(1, 2), keepdim=True)
            update = orthogonalise(stack.matrices(direction).to(stack.dtype))
            weights -= update * (lr * self._relative_rate)
            stack.put_back(weights, self._values)


class _Stack:
    """Matrices of several weights, one of zeros around those that are smaller than the largest."""

    def __init__(self, weights: list[Tensor], shape: tuple[int, int]) -> None:
        rows, columns = shape
        device = weights[0].device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape = (len(weights), rows, columns)
        heights = torch.tensor([float(weight.shape[0]) for weight in weights], device=device)
        self.norms = heights.sqrt().view(-1, 1, 1)
        cells, places = [], []
        for number, weight in enumerate(weights):
            # In memory a filter's values follow one another in either layout, and their order is a
            # permutation of columns, which orthogonalisation commutes with.
            own = torch.arange(weight.numel()).view(weight.shape[0], -1)
            row = torch.arange(weight.shape[0]).view(-1, 1)
            cells.append((number * rows + row) * columns + own - row * own.shape[1])
            places.append(int(weight.storage_offset()) + own)
        self._cells = torch.cat([cell.flatten() for cell in cells]).to(device)
        self._places = torch.cat([place.flatten() for place in places]).to(device)

    def matrices(self, values: Tensor) -> Tensor:
        """(K, M, N) of the flat `values`."""
        filled = values.new_zeros(self.shape)
        filled.view(-1).index_copy_(0, self._cells, values.index_select(0, self._places))
        return filled

    def put_back(self, matrices: Tensor, values: Tensor) -> None:
        """The inverse, into the flat `values`."""
        own = matrices.reshape(-1).index_select(0, self._cells)
        values.index_copy_(0, self._places, own)


def build_optimizer(flat: FlatModel, config: OptimConfig) -> FlatSGD:
    """The configured optimizer."""
    return FlatMuon(flat, config) if config.name == "muon" else FlatSGD(flat, config)
