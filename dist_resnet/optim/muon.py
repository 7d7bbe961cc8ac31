"""Muon for the convolutions, SGD for everything else.

K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", in the form of
their CIFAR-10 speed run: a weight's norm is kept at the root of its filters in place of weight
decay, as BatchNorm after every convolution makes its scale meaningless.

Every rank computes the same update from the same gradients. Matrix products round by the kind of
processor and the number of threads: ranks must not differ in these, or their weights part.
"""

from collections import defaultdict
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_resnet.base.errors import UserError
from dist_resnet.config.schema import OptimConfig
from dist_resnet.distributed.flat import FlatModel
from dist_resnet.optim.groups import flat_groups, flat_parameter, parameter_groups
from dist_resnet.optim.sgd import FlatSGD, WithoutCompiler

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


class FlatMuon(WithoutCompiler):
    """Convolutions are updated together, as matrices of a row for each filter.

    On a CPU those of one shape are; on a GPU all, filled up with zeros, which stay zeros: 55
    launches in place of 426, in bfloat16 as in the speed run.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float | Tensor,
        muon_lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
    ) -> None:
        """`groups`: as `FlatMuon.groups` makes them."""
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        first, *others = groups
        super().__init__([first | {"lr": muon_lr}, *others], settings)
        self._sgd = FlatSGD(others, lr, momentum, nesterov) if others else None
        if self._sgd is not None:
            self.state.update(self._sgd.state)
        for parameter in first["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        shapes: dict[tuple[int, int], list[_Place]] = defaultdict(list)
        for place in first["matrices"]:
            shapes[place.rows, place.columns].append(place)
        device = first["params"][0].device
        if device.type == "cuda":
            largest = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
            self._stacks = [_Stack(first["matrices"], largest, device)]
        else:
            self._stacks = [_Stack(places, shape, device) for shape, places in shapes.items()]

    @staticmethod
    def groups(flat: FlatModel, config: OptimConfig) -> list[dict[str, Any]]:
        """The convolutions first, with the places of their matrices; then those of SGD.

        Raises:
            UserError: there are none.
        """
        own = {id(parameter) for parameter in flat.parameters}
        modules = [m for m in flat.model.modules() if isinstance(m, nn.Conv2d)]
        # Once, where several share one.
        found = {id(m.weight): m.weight for m in modules if id(m.weight) in own}
        weights: list[Tensor] = [*found.values()]
        if not weights:
            trained = " that is trained (optim.freeze)" if modules else ""
            raise UserError(f"optim.name=muon: the model has no convolution{trained}; choose sgd")
        count = sum(weight.numel() for weight in weights)
        if max(weight.storage_offset() + weight.numel() for weight in weights) == count:
            places = [_Place.of(weight, int(weight.storage_offset())) for weight in weights]
            convolutions: list[Tensor] = [flat_parameter(flat, 0, count)]
            others = flat_groups(flat, config, first=count)
        else:  # something else lies between them
            starts = accumulate((weight.numel() for weight in weights[:-1]), initial=0)
            places = [_Place.of(w, int(at)) for w, at in zip(weights, starts, strict=True)]
            convolutions, chosen = [*weights], {id(weight) for weight in weights}
            others = parameter_groups(flat, config, lambda p: id(p) not in chosen)
        return [{"params": convolutions, "matrices": places, "weight_decay": 0.0}, *others]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all groups from their gradients."""
        first = self.param_groups[0]
        if self._sgd is not None:
            self._sgd.param_groups, self._sgd.state = self.param_groups[1:], self.state
            self._sgd.step()
        directions = []
        for parameter in first["params"]:
            gradient, buffer = parameter.grad, self.state[parameter]["momentum_buffer"]
            buffer.mul_(first["momentum"]).add_(gradient)
            nesterov = first["nesterov"]
            directions.append(gradient.add(buffer, alpha=first["momentum"]) if nesterov else buffer)
        values, direction = _joined(first["params"]), _joined(directions)
        for stack in self._stacks:
            weights = stack.matrices(values)
            weights *= stack.norms / weights.norm(dim=(1, 2), keepdim=True)
            update = orthogonalise(stack.matrices(direction).to(stack.dtype))
            weights -= update * first["lr"]
            stack.put_back(weights, values)
        _copy_back(values, first["params"])


class _Place(NamedTuple):
    """Where a matrix lies among the values."""

    start: int
    rows: int
    columns: int

    @staticmethod
    def of(weight: Tensor, start: int) -> "_Place":
        return _Place(start, weight.shape[0], weight[0].numel())


def _joined(tensors: list[Tensor]) -> Tensor:
    """Their values in the order in which they lie in memory; a single flat one itself."""
    if len(tensors) == 1 and tensors[0].ndim == 1:
        return tensors[0]
    return torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors])


def _copy_back(values: Tensor, parameters: list[Tensor]) -> None:
    """The inverse of `_joined`."""
    if values is parameters[0]:
        return
    sizes = [p.numel() for p in parameters]
    for parameter, part in zip(parameters, values.split(sizes), strict=True):
        parameter.as_strided((part.numel(),), (1,)).copy_(part)


class _Stack:
    """Matrices of several weights, one of zeros around those that are smaller than the largest."""

    def __init__(self, places: list[_Place], shape: tuple[int, int], device: torch.device) -> None:
        rows, columns = shape
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape = (len(places), rows, columns)
        heights = torch.tensor([float(place.rows) for place in places], device=device)
        self.norms = heights.sqrt().view(-1, 1, 1)
        cells: list[Tensor] = []
        sources: list[Tensor] = []
        for number, place in enumerate(places):
            # In memory a filter's values follow one another in either layout, and their order is a
            # permutation of columns, which orthogonalisation commutes with.
            own = torch.arange(place.rows * place.columns).view(place.rows, -1)
            row = torch.arange(place.rows).view(-1, 1)
            cells.append((number * rows + row) * columns + own - row * own.shape[1])
            sources.append(own + place.start)
        self._cells = torch.cat([cell.flatten() for cell in cells]).to(device)
        self._places = torch.cat([source.flatten() for source in sources]).to(device)

    def matrices(self, values: Tensor) -> Tensor:
        """(K, M, N) of the flat `values`."""
        filled = values.new_zeros(self.shape)
        filled.view(-1).index_copy_(0, self._cells, values.index_select(0, self._places))
        return filled

    def put_back(self, matrices: Tensor, values: Tensor) -> None:
        """The inverse, into the flat `values`."""
        own = matrices.reshape(-1).index_select(0, self._cells)
        values.index_copy_(0, self._places, own)
