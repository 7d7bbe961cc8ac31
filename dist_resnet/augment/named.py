"""The augmentations that draw from streams of their own: built-in ones, and the user's.

Each is a callable (images, draws, **args) -> images, with images float32 (N, 3, H, W), normalised,
and draws float32 (N, lanes) uniform in [0, 1); `lanes` is an attribute of the callable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_resnet.augment.normalisation import Normalisation
from dist_resnet.augment.trivial import TrivialAugment
from dist_resnet.config.builtins import AUGMENTATIONS
from dist_resnet.config.plugins import is_plugin, resolve, signature, within_step
from dist_resnet.config.schema import AugmentConfig

KEY = "augment.extra"
_DEFAULT_LANES = 4


@dataclass(frozen=True)
class Named:
    """An augmentation with its arguments."""

    stream: str
    """What its draws are keyed by."""
    name: str
    function: Callable[..., Any]
    args: dict[str, Any]

    @property
    def lanes(self) -> int:
        """How many draws it takes for an image."""
        return getattr(self.function, "lanes", _DEFAULT_LANES)

    def bound(self, statistics: Normalisation) -> Callable[[Tensor, Tensor], Tensor]:
        """It as a function of images and draws alone."""
        args, taken = dict(self.args), signature(self.function)
        if taken is not None and "statistics" in taken:
            args["statistics"] = statistics
        function = partial(self.function, **args)
        if not is_plugin(self.name):
            return function

        def guarded(images: Tensor, draws: Tensor) -> Tensor:
            with within_step(KEY, self.name), torch.no_grad():
                return function(images, draws)

        return guarded


def keyed(config: AugmentConfig, name: str) -> list[Named]:
    """The built-in one that the key augment.NAME turns on, or none."""
    strength = getattr(config, name)
    if not strength:
        return []
    if name == "trivial":  # of bytes, and with tables
        return [Named("augment.trivial", name, TrivialAugment(), {})]
    args = {
        "jitter": {"brightness": strength, "contrast": strength},
        "erasing": {"probability": strength},
    }[name]
    return [Named(f"augment.{name}", name, resolve(KEY, AUGMENTATIONS[name]), args)]


def extras(config: AugmentConfig) -> list[Named]:
    """Those of augment.extra, in its order.

    Raises:
        UserError: there is no such callable.
    """
    found: list[Named] = []
    for entry in config.extra:
        parts: dict[str, Any] = entry if isinstance(entry, dict) else {"name": entry}
        name = parts["name"]
        before = sum(other.name == name for other in found)
        stream = f"{name}#{before + 1}" if before else name
        function = resolve(KEY, AUGMENTATIONS.get(name, name))
        found.append(Named(stream, name, function, parts.get("args", {})))
    return found


def all_named(config: AugmentConfig) -> list[Named]:
    """All that are on."""
    return [
        *keyed(config, "trivial"),
        *keyed(config, "jitter"),
        *extras(config),
        *keyed(config, "erasing"),
    ]
