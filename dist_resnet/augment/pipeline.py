"""The augmentations in their order, of a whole batch on its device.

Shapes: N images, H W pixels; images arrive as uint8 (N, H, W, 3).
"""

from collections.abc import Callable

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
        self._crop = crop if config.padding_mode == "zero" else crop_reflected
        self._trivial = self._bound(keyed(config, "trivial"))
        self._before_cutout = self._bound([*keyed(config, "jitter"), *extras(config)])
        self._erasing = self._bound(keyed(config, "erasing"))
        self._whole, self._begin = within_kernels(config), _begins_in_kernel(config)

    def __call__(self, images: Tensor, choices: Choices) -> Tensor:
        """uint8 (N, H, W, 3) to float32 (N, 3, H, W), channels-last."""
        if not (self._begin and batch.usable(images)):
            return self.by_torch(images, choices)
        c, whole = choices, self._whole
        floats = batch.augment(
            images,
            None if c.top is None or c.left is None else (c.top, c.left, self.config.crop_padding),
            c.flip,
            (c.cut_top, c.cut_left, self.config.cutout)
            if whole and c.cut_top is not None and c.cut_left is not None
            else None,
            (c.partner, c.lam) if whole and c.partner is not None and c.lam is not None else None,
            self.statistics.mean,
            self.statistics.scale,
        )
        return floats if whole else self._behind(floats, choices)

    def by_torch(self, images: Tensor, choices: Choices) -> Tensor:
        """The same on any device: the definition."""
        c = choices
        if c.top is not None and c.left is not None:
            images = self._crop(images, c.top, c.left, self.config.crop_padding)
        if c.flip is not None:
            images = flip(images, c.flip)
        images = _applied(self._trivial, images, c)
        return self._behind(normalise(images, self.statistics), c)

    def _behind(self, images: Tensor, c: Choices) -> Tensor:
        """What comes after normalisation, of float32 (N, 3, H, W)."""
        images = _applied(self._before_cutout, images, c)
        if c.cut_top is not None and c.cut_left is not None:
            images = cutout(images, c.cut_top, c.cut_left, self.config.cutout)
        images = _applied(self._erasing, images, c)
        if c.partner is not None and c.lam is not None:
            images = mixup(images, c.partner, c.lam if c.weights is None else c.weights)
        # What users bring may hand back another order.
        return images.contiguous(memory_format=torch.channels_last)

    def _bound(self, found: list[Named]) -> "list[_Bound]":
        return [(named.stream, named.bound(self.statistics)) for named in found]


_Bound = tuple[str, Callable[[Tensor, Tensor], Tensor]]  # with the stream that it draws from


def _applied(functions: list[_Bound], images: Tensor, choices: Choices) -> Tensor:
    for stream, function in functions:
        assert choices.draws is not None
        images = function(images, choices.draws[stream])
    return images
