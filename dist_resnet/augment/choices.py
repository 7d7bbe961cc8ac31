"""Every random choice of a batch, from the step's key and the samples' indices.

Shapes: N images, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_resnet.augment.mix import LAM_QUANTILES, beta_quantiles, outside_box
from dist_resnet.augment.named import all_named
from dist_resnet.base.randomness import alternate, below, named_key, named_lanes, sample_lanes
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.native import batch

# Lanes of a sample's draws; dropout takes the ones from _DROPOUT on. What came later has streams of
# its own name.
_TOP, _LEFT, _FLIP, _CUT_TOP, _CUT_LEFT, _PARTNER, _LAM, _DROPOUT = range(8)
# Of the stream that CutMix draws from.
_BOX_LAM, _BOX_ROW, _BOX_COLUMN, _WHICH = range(4)


@dataclass(frozen=True)
class Choices:
    """Every random choice of one replica's batch; None: that augmentation is off."""

    top: Tensor | None = None
    """int64 (N,): row of the padded image at which the crop starts."""
    left: Tensor | None = None
    """int64 (N,): column likewise."""
    flip: Tensor | None = None
    """bool (N,)."""
    cut_top: Tensor | None = None
    """int64 (N,): centre row of cutout's square."""
    cut_left: Tensor | None = None
    """int64 (N,): centre column."""
    partner: Tensor | None = None
    """int64 (N,): position in the batch of the image that is mixed in."""
    lam: Tensor | None = None
    """float32, 0-dimensional: weight of the image itself."""
    keep: Tensor | None = None
    """float32 (N, features): factor of each feature under dropout, 0 or 1 / (1 - p)."""
    weights: Tensor | None = None
    """float32 (H, W): weight of the image itself by pixel; None: `lam` everywhere."""
    draws: Mapping[str, Tensor] | None = None
    """float32 (N, lanes) by the name of its stream, uniform in [0, 1)."""


class ChoiceDrawer:
    """Draws the choices of a batch of images of one size."""

    def __init__(
        self,
        config: AugmentConfig,
        image_size: tuple[int, int],
        dropout: float,
        features: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.height, self.width = image_size
        self.dropout = dropout
        self.features = features if dropout else 0
        mixup = config.mix != "cutmix" and config.mixup_alpha
        self.lam_table = beta_quantiles(config.mixup_alpha).to(device) if mixup else None
        self.box_table = (
            None if config.mix == "mixup" else beta_quantiles(config.cutmix_alpha).to(device)
        )
        self.mixes = self.lam_table is not None or self.box_table is not None
        self.lanes = {named.stream: named.lanes for named in all_named(config)}
        alternating = config.flip == "alternating"
        self.streams = alternating or bool(self.lanes) or self.box_table is not None

    def __call__(self, key: Tensor, samples: Tensor, turn: Tensor | None = None) -> Choices:
        """Choices of one replica's batch.

        Args:
            key: int64, 0-dimensional, of the step.
            samples: int64 (N,), indices in the training set. How the batch is mixed is a draw of
                the first.
            turn: int64, 0-dimensional, of the step's epoch, for augment.flip=alternating.
        """
        if not batch.usable(samples):
            return self.by_torch(key, samples, turn)
        config = self.config
        cropped, cut, mixed = config.crop_padding, config.cutout, self.mixes
        integers, flip, lam, keep = batch.draw_choices(
            key,
            samples,
            2 * cropped + 1 if cropped else 0,
            (self.height, self.width) if cut else (0, 0),
            self.box_table if self.lam_table is None else self.lam_table,
            self.features,
            self.dropout,
        )
        top, left, cut_top, cut_left, partner = integers.unbind()
        choices = Choices(
            top=top if cropped else None,
            left=left if cropped else None,
            flip=flip if config.flip else None,
            cut_top=cut_top if cut else None,
            cut_left=cut_left if cut else None,
            partner=partner if mixed else None,
            lam=lam if mixed else None,
            keep=keep if self.dropout else None,
        )
        return self._with_streams(choices, key, samples, turn) if self.streams else choices

    def by_torch(self, key: Tensor, samples: Tensor, turn: Tensor | None = None) -> Choices:
        """The same on any device."""
        draws = sample_lanes(key, samples, _DROPOUT + self.features)
        config = self.config
        shifts = 2 * config.crop_padding + 1
        choices = Choices(
            top=below(draws[:, _TOP], shifts) if config.crop_padding else None,
            left=below(draws[:, _LEFT], shifts) if config.crop_padding else None,
            flip=draws[:, _FLIP] < 1 << 31 if config.flip else None,
            cut_top=below(draws[:, _CUT_TOP], self.height) if config.cutout else None,
            cut_left=below(draws[:, _CUT_LEFT], self.width) if config.cutout else None,
            partner=torch.argsort(draws[:, _PARTNER], stable=True) if self.mixes else None,
            lam=None
            if self.lam_table is None
            # Not by indexing, which would read the index on the host: a wait in every step.
            else torch.take(self.lam_table, below(draws[0, _LAM], LAM_QUANTILES)),
            keep=dropout_factors(draws[:, _DROPOUT:], self.dropout) if self.dropout else None,
        )
        return self._with_streams(choices, key, samples, turn) if self.streams else choices

    def flips(self, drawn: Tensor, samples: Tensor, turn: Tensor | None) -> Tensor:
        """`drawn`, bool (N,), of every step anew, or in its place what alternates by epoch."""
        if self.config.flip != "alternating":
            return drawn
        assert turn is not None, "augment.flip=alternating follows the epoch"
        return alternate(turn, samples)

    def _with_streams(
        self, choices: Choices, key: Tensor, samples: Tensor, turn: Tensor | None
    ) -> Choices:
        """With what is drawn from streams that have names."""
        if choices.flip is not None and self.config.flip == "alternating":
            choices = replace(choices, flip=self.flips(choices.flip, samples, turn))
        if self.lanes:
            lanes = self.lanes.items()
            draws = {name: named_lanes(key, name, samples, n) for name, n in lanes}
            choices = replace(choices, draws=draws)
        return choices if self.box_table is None else self._with_box(choices, key, samples)

    def _with_box(self, choices: Choices, key: Tensor, samples: Tensor) -> Choices:
        """With the box of CutMix, or under augment.mix=both of either."""
        assert self.box_table is not None
        draws = sample_lanes(named_key(key, "augment.mix"), samples[:1], 4)[0]
        lam = torch.take(self.box_table, below(draws[_BOX_LAM], LAM_QUANTILES))
        row, column = below(draws[_BOX_ROW], self.height), below(draws[_BOX_COLUMN], self.width)
        weights = outside_box(lam, row, column, self.height, self.width).float()
        # The share that is left, not the one that was drawn: the box ends at the image's edge.
        share = weights.sum() / weights.numel()
        if self.config.mix == "both":
            assert choices.lam is not None
            boxed = draws[_WHICH] < 1 << 31
            share = torch.where(boxed, share, choices.lam)
            weights = torch.where(boxed, weights, choices.lam)
        return replace(choices, lam=share, weights=weights)


def dropout_factors(draws: Tensor, probability: float) -> Tensor:
    """0 with `probability`, else 1 / (1 - probability), for draws uniform in [0, 2^32)."""
    # The quotient is rounded once, as the kernels take it.
    return torch.where(draws >= round(probability * (1 << 32)), 1 / (1 - probability), 0.0)
