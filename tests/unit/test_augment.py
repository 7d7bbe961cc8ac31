"""Augmentation against NumPy and Pillow, one image at a time, and the statistics of its choices."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats

from dist_resnet.augment import Augmenter, ChoiceDrawer, Choices, Normalisation, normalise
from dist_resnet.augment.choices import dropout_factors
from dist_resnet.augment.erase import cutout
from dist_resnet.augment.geometry import crop, flip
from dist_resnet.augment.mix import beta_quantiles, mixup
from dist_resnet.base.randomness import sample_lanes, step_keys
from dist_resnet.config.schema import AugmentConfig

ALPHA = 1e-4
MEAN, STD = (125.307, 122.950, 113.865), (62.993, 62.089, 66.705)
CPU = torch.device("cpu")


def _images(rng: np.random.Generator, count: int, height: int = 32, width: int = 32) -> np.ndarray:
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def _drawer(features: int = 64, dropout: float = 0.3, **settings: object) -> ChoiceDrawer:
    config = AugmentConfig(**settings)  # type: ignore[arg-type]
    return ChoiceDrawer(config, (32, 32), dropout, features, CPU)


def _cropped(image: np.ndarray, top: int, left: int, padding: int) -> np.ndarray:
    """One image: a canvas of zeros, and the window cut out of it."""
    height, width, _ = image.shape
    canvas = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    canvas[padding : padding + height, padding : padding + width] = image
    return canvas[top : top + height, left : left + width]


def _holed(image: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """DeVries and Taylor's cutout on one (3, H, W) image, pixel by pixel."""
    result = image.copy()
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            if (top - side // 2 <= row < top - side // 2 + side
                    and left - side // 2 <= column < left - side // 2 + side):  # fmt: skip
                result[:, row, column] = 0
    return result


@pytest.mark.parametrize(
    ("height", "width", "padding"), [(32, 32, 4), (12, 20, 1), (7, 5, 9), (1, 1, 2)]
)
def test_crop_is_numpys_and_pillows(
    height: int, width: int, padding: int, rng: np.random.Generator
) -> None:
    images = _images(rng, 64, height, width)
    top, left = rng.integers(0, 2 * padding + 1, (2, 64))
    found = crop(torch.from_numpy(images), torch.from_numpy(top), torch.from_numpy(left), padding)
    assert found.dtype == torch.uint8
    for i, image in enumerate(images):
        assert np.array_equal(found[i], _cropped(image, top[i], left[i], padding))
        # Pillow fills what lies outside of the image with zeros.
        x, y = int(left[i]) - padding, int(top[i]) - padding
        window = Image.fromarray(image).crop((x, y, x + width, y + height))
        assert np.array_equal(found[i], np.array(window))


def test_flip_is_pillows(rng: np.random.Generator) -> None:
    images = _images(rng, 40, 9, 14)
    mask = rng.integers(0, 2, 40).astype(bool)
    found = flip(torch.from_numpy(images), torch.from_numpy(mask)).numpy()
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        expected = ImageOps.mirror(picture) if mask[i] else picture
        assert np.array_equal(found[i], np.array(expected))


def test_normalise_is_exact_to_a_millionth() -> None:
    values = np.arange(256, dtype=np.uint8)  # all there are, in every channel
    images = np.stack([values, values, values], axis=1).reshape(4, 8, 8, 3)
    statistics = Normalisation.of(MEAN, STD, 8, CPU)
    found = normalise(torch.from_numpy(images.copy()), statistics)
    expected = (images.astype(np.float64) - np.array(MEAN)) / np.array(STD)
    assert found.dtype == torch.float32
    assert found.shape == (4, 3, 8, 8)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - expected).max() <= 1e-6


def test_normalise_does_not_touch_its_input(rng: np.random.Generator) -> None:
    images = torch.from_numpy(_images(rng, 3))
    before = images.clone()
    normalise(images, Normalisation.of(MEAN, STD, 32, CPU))
    assert torch.equal(images, before)


def test_a_channel_that_never_varies() -> None:
    statistics = Normalisation.of((7.0, 0.0, 255.0), (0.0, 1.0, 2.0), 4, CPU)
    images = torch.full((1, 4, 4, 3), 7, dtype=torch.uint8)
    assert normalise(images, statistics)[0, :, 0, 0].tolist() == [0.0, 7.0, -124.0]


@pytest.mark.parametrize("side", [1, 2, 3, 8, 40])
def test_cutout_pixel_by_pixel(side: int, rng: np.random.Generator) -> None:
    images = rng.normal(size=(24, 3, 9, 13)).astype(np.float32)
    top, left = rng.integers(0, 9, 24), rng.integers(0, 13, 24)
    top[:2], left[:2] = (0, 8), (0, 12)  # corners: clipped
    found = cutout(*(torch.from_numpy(x) for x in (images, top, left)), side).numpy()
    for i, image in enumerate(images):
        assert np.array_equal(found[i], _holed(image, top[i], left[i], side))


def test_mixup_is_its_formula(rng: np.random.Generator) -> None:
    images = rng.normal(size=(16, 3, 4, 4)).astype(np.float32)
    partner = rng.permutation(16)
    for lam in (0.0, 0.123, 0.5, 0.9, 1.0):
        found = mixup(torch.from_numpy(images), torch.from_numpy(partner), torch.tensor(lam))
        exact = np.float64(np.float32(lam))
        expected = exact * images.astype(np.float64) + (1 - exact) * images[partner]
        assert np.abs(found.numpy() - expected).max() <= 1e-6
    assert torch.equal(
        mixup(torch.from_numpy(images), torch.from_numpy(partner), torch.tensor(1.0)),
        torch.from_numpy(images),
    )


@pytest.mark.parametrize("side", [0, 8])
def test_the_whole_chain_image_by_image(side: int, rng: np.random.Generator) -> None:
    config = AugmentConfig(cutout=side)
    images = _images(rng, 96)
    drawer = ChoiceDrawer(config, (32, 32), 0.3, 64, CPU)
    choices = drawer(step_keys(1, 3)[2], torch.from_numpy(rng.permutation(50_000)[:96]))
    augmenter = Augmenter(config, Normalisation.of(MEAN, STD, 32, CPU))
    found = augmenter(torch.from_numpy(images), choices)

    def single(i: int) -> np.ndarray:
        assert choices.top is not None
        assert choices.left is not None
        assert choices.flip is not None
        image = _cropped(images[i], int(choices.top[i]), int(choices.left[i]), 4)
        if choices.flip[i]:
            image = image[:, ::-1]
        floats = ((image.astype(np.float64) - MEAN) / STD).transpose(2, 0, 1)
        if side:
            assert choices.cut_top is not None
            assert choices.cut_left is not None
            floats = _holed(floats, int(choices.cut_top[i]), int(choices.cut_left[i]), side)
        return floats

    assert choices.partner is not None
    assert choices.lam is not None
    lam = float(choices.lam)
    for i in range(96):
        expected = lam * single(i) + (1 - lam) * single(int(choices.partner[i]))
        assert np.abs(found[i].numpy() - expected).max() <= 1e-6


def test_without_augmentation_only_normalisation_is_left(rng: np.random.Generator) -> None:
    config = AugmentConfig(crop_padding=0, flip=False, mixup_alpha=0)
    choices = ChoiceDrawer(config, (32, 32), 0.0, 64, CPU)(step_keys(0, 1)[0], torch.arange(8))
    assert all(getattr(choices, field.name) is None for field in fields(Choices))
    images, statistics = torch.from_numpy(_images(rng, 8)), Normalisation.of(MEAN, STD, 32, CPU)
    found = Augmenter(config, statistics)(images, choices)
    assert torch.equal(found, normalise(images, statistics))


def test_all_offsets_and_both_sides_are_equally_likely_and_independent() -> None:
    drawer, found = _drawer(features=0, dropout=0.0), []
    for key in step_keys(11, 100):
        choices = drawer(key, torch.arange(1000))
        assert choices.top is not None
        assert choices.left is not None
        assert choices.flip is not None
        assert int(choices.top.min()) >= 0
        found.append((choices.top * 9 + choices.left) * 2 + choices.flip)
    cells = torch.bincount(torch.cat(found), minlength=162).numpy()
    assert len(cells) == 162
    assert (cells > 0).all()
    assert stats.chisquare(cells).pvalue > ALPHA


def test_choices_of_neighbouring_samples_and_steps_are_independent() -> None:
    drawer = _drawer(features=0, dropout=0.0)
    offsets = torch.stack(
        [c.top * 9 + c.left for k in step_keys(12, 250) if (c := drawer(k, torch.arange(250)))]  # type: ignore[operator]
    )
    for first, second in ((offsets[:, :-1], offsets[:, 1:]), (offsets[:-1], offsets[1:])):
        cells = torch.bincount((first * 81 + second).flatten(), minlength=81 * 81).numpy()
        assert stats.chisquare(cells).pvalue > ALPHA


def test_cutout_centres_are_uniform() -> None:
    choices = _drawer(cutout=8)(step_keys(1, 1)[0], torch.arange(40_000))
    for centre in (choices.cut_top, choices.cut_left):
        assert centre is not None
        counts = torch.bincount(centre, minlength=32).numpy()
        assert len(counts) == 32
        assert stats.chisquare(counts).pvalue > ALPHA


def test_choices_of_a_sample_do_not_depend_on_the_rest_of_its_batch(
    rng: np.random.Generator,
) -> None:
    drawer, key = _drawer(cutout=4), step_keys(3, 9)[8]
    samples = torch.from_numpy(rng.permutation(50_000)[:64])
    shuffled = torch.from_numpy(rng.permutation(64))
    on_every_rank, other = drawer(key, samples), drawer(key, samples[shuffled])
    for name in ("top", "left", "flip", "cut_top", "cut_left", "keep"):
        assert torch.equal(getattr(on_every_rank, name)[shuffled], getattr(other, name)), name
        for i in (0, 31, 63):
            alone = drawer(key, samples[i : i + 1])
            assert torch.equal(getattr(on_every_rank, name)[i], getattr(alone, name)[0]), name


def test_partners_are_a_uniform_permutation_of_the_batch() -> None:
    drawer = _drawer(features=0, dropout=0.0)
    counts = np.zeros((6, 6), int)
    for key in step_keys(21, 3000):
        partner = drawer(key, torch.arange(6)).partner
        assert partner is not None
        assert sorted(partner.tolist()) == list(range(6))
        counts[np.arange(6), partner.numpy()] += 1
    assert stats.chisquare(counts.flatten(), ddof=10).pvalue > ALPHA  # rows and columns are fixed


@pytest.mark.parametrize("alpha", [0.2, 1.0, 0.4, 5.0])
def test_beta_table_is_scipys(alpha: float) -> None:
    table = beta_quantiles(alpha).numpy().astype(np.float64)
    centres = (np.arange(65_536) + 0.5) / 65_536
    assert np.abs(table - stats.beta.ppf(centres, alpha, alpha)).max() < 1e-7
    assert (np.diff(table) >= 0).all()
    assert table.min() >= 0
    assert table.max() <= 1
    assert table.mean() == pytest.approx(0.5, abs=1e-6)
    assert table.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_drawn_weights_are_beta_distributed(alpha: float) -> None:
    drawer = ChoiceDrawer(AugmentConfig(mixup_alpha=alpha), (32, 32), 0.0, 0, CPU)
    drawn = [drawer(key, torch.tensor([k])).lam for k, key in enumerate(step_keys(31, 10_000))]
    lams = np.array([float(lam) for lam in drawn if lam is not None])
    assert len(lams) == 10_000
    # Not kstest: within 1e-7 of 1 lie 2 % of Beta(0.2, 0.2), and float32 has no numbers there.
    points = np.linspace(0.001, 0.999, 999)
    shares = (lams[None, :] <= points[:, None]).mean(axis=1)
    assert np.abs(shares - stats.beta.cdf(points, alpha, alpha)).max() < stats.kstwo.isf(
        ALPHA, 10_000
    )
    # The weight of neighbouring steps: no memory.
    assert abs(np.corrcoef(lams[:-1], lams[1:])[0, 1]) < 4 / 100


def test_the_weight_is_a_draw_of_the_first_sample() -> None:
    drawer, key = _drawer(), step_keys(3, 1)[0]
    samples = torch.tensor([8, 5, 2])
    assert drawer(key, samples).lam == drawer(key, samples[:1]).lam
    lams = {float(drawer(key, torch.tensor([s, 5])).lam) for s in range(50)}  # type: ignore[arg-type]
    assert len(lams) > 40  # replicas mix with different weights


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(probability: float) -> None:
    keep = _drawer(dropout=probability)(step_keys(7, 1)[0], torch.arange(5000)).keep
    assert keep is not None
    assert keep.shape == (5000, 64)
    assert torch.equal(keep.unique(), torch.tensor([0.0, 1 / (1 - probability)]))
    dropped = int((keep == 0).sum())
    assert stats.binomtest(dropped, keep.numel(), probability).pvalue > ALPHA
    by_feature = (keep == 0).sum(dim=0).double()
    spread = (by_feature - 5000 * probability) / (5000 * probability * (1 - probability)) ** 0.5
    assert float(spread.abs().max()) < 4.5
    both = ((keep[:, :-1] == 0) & (keep[:, 1:] == 0)).float().mean()
    assert float(both) == pytest.approx(probability**2, abs=0.005)


def test_dropout_at_the_edges_of_the_draws() -> None:
    edge = round(0.25 * 2**32)
    found = dropout_factors(torch.tensor([0, edge - 1, edge, 2**32 - 1]), 0.25)
    assert found.tolist() == pytest.approx([0, 0, 4 / 3, 4 / 3])


def test_uses_of_one_samples_draws_do_not_overlap() -> None:
    """No two augmentations read the same lane: each alone equals its part of all together."""
    key, samples = step_keys(5, 1)[0], torch.arange(300)
    everything = _drawer(cutout=8)(key, samples)
    lanes = sample_lanes(key, samples, 7 + 64)
    columns = [lane for lane in lanes.T]
    assert len({tuple(column.tolist()) for column in columns}) == 71
    assert everything.flip is not None
    assert everything.keep is not None
    for j in range(64):
        agreement = float(((everything.keep[:, j] > 0) == everything.flip).float().mean())
        assert 0.3 < agreement < 0.7
