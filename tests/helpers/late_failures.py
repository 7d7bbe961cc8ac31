"""User's code that fails when a test asks for it: an optimizer, an augmentation and a net."""

from typing import Any

from torch import Tensor

from tests.helpers.nets import Plain
from tests.helpers.own_optimizers import Lion

errors: list[Exception] = []
"""What the next call raises."""


def _fail() -> None:
    if errors:
        raise errors.pop()


class LateOptimizer(Lion):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        _fail()
        super().step()


def late_augmentation(images: Tensor, draws: Tensor) -> Tensor:
    _fail()
    return images


class LateNet(Plain):
    def forward(self, x: Tensor) -> Any:
        _fail()
        return super().forward(x)
