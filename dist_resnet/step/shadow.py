"""Weights in the type of the activations: one cast a step, where autocast makes one a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_resnet.distributed.flat import FlatModel


class Shadow:
    """A copy, in a lower type, of the weights of a model's convolutions and dense layers.

    For models that have no other parameters of two dimensions and more: autocast casts no others.
    """

    def __init__(self, flat: FlatModel, dtype: torch.dtype) -> None:
        layers = [m for m in flat.model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
        weights = {id(layer.weight) for layer in layers}
        assert all(p.ndim < 2 or id(p) in weights for p in flat.parameters)
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
        leaves = {id(p): leaf for p, leaf in zip(flat.parameters, self.leaves, strict=True)}
        self._holders: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
            (module._parameters, name, parameter, leaves[id(parameter)])
            for module in flat.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and leaves.get(id(parameter), parameter) is not parameter
        ]

    def refresh(self) -> None:
        """Follow the parameters."""
        with torch.no_grad():
            self._copy.copy_(self._source)

    def forward(self, images: Tensor) -> Tensor:
        """The model's forward pass with these weights in the place of its own."""
        # As torch.func.functional_call, without what it looks up and checks in every step.
        for holder, name, _, leaf in self._holders:
            holder[name] = leaf
        try:
            logits: Tensor = self._model(images)
        finally:
            for holder, name, parameter, _ in self._holders:
                holder[name] = parameter
        return logits
