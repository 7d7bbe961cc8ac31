"""Weights in the type of the activations: one cast a step, where autocast makes one a layer."""

import torch
from torch import Tensor, nn

from dist_resnet.distributed.flat import FlatModel


def fits(flat: FlatModel) -> bool:
    """Whether autocast would cast every decayed parameter: those of no other modules."""
    modules = [m for m in flat.model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    cast = {id(module.weight) for module in modules}
    return all(id(p) in cast for _, p in flat.named_parameters() if p.ndim >= 2)


class Shadow:
    """A copy, in a lower type, of the weights of a model's convolutions and dense layers."""

    def __init__(self, flat: FlatModel, dtype: torch.dtype) -> None:
        self._source = flat.values[: flat.num_decayed]
        self._copy = torch.empty_like(self._source, dtype=dtype)
        self._model = flat.model
        self.leaves: list[Tensor] = []
        """What gradients are taken of, in the order of `FlatModel.parameters`."""
        for parameter in flat.parameters:
            place = parameter.shape, parameter.stride(), parameter.storage_offset()
            lower = parameter.storage_offset() < flat.num_decayed
            self.leaves.append(
                self._copy.as_strided(*place).requires_grad_() if lower else parameter
            )
        by_identity = dict(zip(map(id, flat.parameters), self.leaves, strict=True))
        self._tensors = {n: by_identity[id(p)] for n, p in flat.named_parameters()}

    def refresh(self) -> None:
        """Follow the parameters."""
        with torch.no_grad():
            self._copy.copy_(self._source)

    def forward(self, images: Tensor) -> Tensor:
        """The model's forward pass with these weights in the place of its own."""
        return torch.func.functional_call(self._model, self._tensors, (images,))
