"""The augmentations in their order, of a whole batch on its device.

Shapes: N images, H W pixels; images arrive as uint8 (N, H, W, 3).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dist_resnet.augment.choices import Choices
from dist_resnet.augment.erase import cutout
from dist_resnet.augment.geometry import crop, crop_reflected, flip
from dist_resnet.augment.mix import mixup
from dist_resnet.augment.named import Named, all_named, extras, keyed
from dist_resnet.augment.normalisation import Normalisation, normalise
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.native import batch

Part = Callable[[Tensor, Choices], Tensor]


def _crop(config: AugmentConfig, statistics: Normalisation) -> list[Part]:
    cut = crop if config.padding_mode == "zero" else crop_reflected

    def part(images: Tensor, choices: Choices) -> Tensor:
        assert choices.top is not None
        assert choices.left is not None
        return cut(images, choices.top, choices.left, config.crop_padding)

    return [part] if config.crop_padding else []


def _flip(config: AugmentConfig, statistics: Normalisation) -> list[Part]:
    def part(images: Tensor, choices: Choices) -> Tensor:
        assert choices.flip is not None
        return flip(images, choices.flip)

    return [part] if config.flip else []


def _normalise(config: AugmentConfig, statistics: Normalisation) -> list[Part]:
    return [lambda images, choices: normalise(images, statistics)]


def _cutout(config: AugmentConfig, statistics: Normalisation) -> list[Part]:
    def part(images: Tensor, choices: Choices) -> Tensor:
        assert choices.cut_top is not None
        assert choices.cut_left is not None
        return cutout(images, choices.cut_top, choices.cut_left, config.cutout)

    return [part] if config.cutout else []


def _mix(config: AugmentConfig, statistics: Normalisation) -> list[Part]:
    def part(images: Tensor, choices: Choices) -> Tensor:
        assert choices.partner is not None
        assert choices.lam is not None
        weight = choices.lam if choices.weights is None else choices.weights
        return mixup(images, choices.partner, weight)

    return [part] if config.mixup_alpha or config.mix == "cutmix" else []


def _parts_of(found: list[Named], statistics: Normalisation) -> list[Part]:
    def part_of(named: Named) -> Part:
        function = named.bound(statistics)

        def part(images: Tensor, choices: Choices) -> Tensor:
            assert choices.draws is not None
            return function(images, choices.draws[named.stream])

        return part

    return [part_of(named) for named in found]


# What there is, in its order: by name what makes the parts of the pipeline, none where it is off.
# From `normalise` on images are float32 (N, 3, H, W).
ORDER: dict[str, Callable[[AugmentConfig, Normalisation], list[Part]]] = {
    "crop": _crop,
    "flip": _flip,
    "trivial": lambda config, statistics: _parts_of(keyed(config, "trivial"), statistics),
    "normalise": _normalise,
    "jitter": lambda config, statistics: _parts_of(keyed(config, "jitter"), statistics),
    "extra": lambda config, statistics: _parts_of(extras(config), statistics),
    "cutout": _cutout,
    "erasing": lambda config, statistics: _parts_of(keyed(config, "erasing"), statistics),
    "mix": _mix,
}


def within_kernels(config: AugmentConfig) -> bool:
    """Whether our kernels, of a CPU and of a GPU, do all that is on."""
    return _begins_in_kernel(config) and config.mix == "mixup" and not all_named(config)


def _begins_in_kernel(config: AugmentConfig) -> bool:
    """Whether they do all that comes up to normalisation."""
    return not config.trivial and (config.padding_mode == "zero" or not config.crop_padding)


class Augmenter:
    """What a configuration does to a batch: a pure function of it and its choices."""

    def __init__(self, config: AugmentConfig, statistics: Normalisation) -> None:
        self.config, self.statistics = config, statistics
        made = {name: make(config, statistics) for name, make in ORDER.items()}
        names = list(made)
        behind = names[names.index("normalise") + 1 :]
        self._all = [part for parts in made.values() for part in parts]
        self._behind = [part for name in behind for part in made[name]]
        self._whole, self._begin = within_kernels(config), _begins_in_kernel(config)

    def __call__(self, images: Tensor, choices: Choices) -> Tensor:
        """uint8 (N, H, W, 3) to float32 (N, 3, H, W), channels-last."""
        if not (self._begin and batch.usable(images)):
            return self.by_torch(images, choices)
        c, config, statistics, whole = choices, self.config, self.statistics, self._whole
        cut = whole and c.cut_top is not None and c.cut_left is not None
        mixed = whole and c.partner is not None and c.lam is not None
        floats = batch.augment(
            images,
            None if c.top is None or c.left is None else (c.top, c.left, config.crop_padding),
            c.flip,
            cast(Any, (c.cut_top, c.cut_left, config.cutout)) if cut else None,
            cast(Any, (c.partner, c.lam)) if mixed else None,
            statistics.mean,
            statistics.scale,
        )
        return floats if whole else _run(self._behind, floats, choices)

    def by_torch(self, images: Tensor, choices: Choices) -> Tensor:
        """The same on any device: the definition."""
        return _run(self._all, images, choices)


def augment(
    images: Tensor, choices: Choices, config: AugmentConfig, statistics: Normalisation
) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W), channels-last."""
    return Augmenter(config, statistics)(images, choices)


def augment_by_torch(
    images: Tensor, choices: Choices, config: AugmentConfig, statistics: Normalisation
) -> Tensor:
    """`augment` on any device."""
    return Augmenter(config, statistics).by_torch(images, choices)


def _run(parts: list[Part], images: Tensor, choices: Choices) -> Tensor:
    for part in parts:
        images = part(images, choices)
    # What users bring may hand back another order.
    return images.contiguous(memory_format=torch.channels_last)
