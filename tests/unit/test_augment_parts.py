"""Reflect padding, alternating flip, jitter, random erasing and CutMix, one image at a time."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomErasing
from torchvision.transforms import functional as V

from dist_resnet.augment import Augmenter, ChoiceDrawer, Normalisation
from dist_resnet.augment.colour import jitter
from dist_resnet.augment.erase import erasing, rectangles
from dist_resnet.augment.geometry import crop_reflected
from dist_resnet.base.randomness import alternate, step_keys, turn_keys
from dist_resnet.config.schema import AugmentConfig

ALPHA = 1e-4
MEAN, STD = (125.307, 122.950, 113.865), (62.993, 62.089, 66.705)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("height", "width", "padding"), [(32, 32, 4), (12, 20, 1), (7, 5, 9), (1, 2, 3)]
)
def test_reflect_padding_is_numpys(
    height: int, width: int, padding: int, rng: np.random.Generator
) -> None:
    images = rng.integers(0, 256, (64, height, width, 3), dtype=np.uint8)
    top, left = rng.integers(0, 2 * padding + 1, (2, 64))
    tensors = (torch.from_numpy(x) for x in (images, top, left))
    found = crop_reflected(*tensors, padding).numpy()
    around = ((padding, padding), (padding, padding), (0, 0))
    for i, image in enumerate(images):
        padded = np.pad(image, around, mode="reflect")
        window = padded[top[i] : top[i] + height, left[i] : left[i] + width]
        assert np.array_equal(found[i], window)


def test_every_image_flips_in_every_other_epoch_from_a_fair_start() -> None:
    samples, steps_per_epoch = torch.arange(4000), 7
    turns = turn_keys(3, 4 * steps_per_epoch, steps_per_epoch)
    sides = torch.stack([alternate(turn, samples) for turn in turns])
    epochs = sides.view(4, steps_per_epoch, -1)
    assert bool((epochs == epochs[:, :1]).all())  # the same wherever in an epoch it comes
    assert torch.equal(epochs[1:, 0], ~epochs[:-1, 0])
    assert stats.binomtest(int(sides[0].sum()), 4000, 0.5).pvalue > ALPHA
    both = int((sides[0, 1:] & sides[0, :-1]).sum())  # of neighbours
    assert stats.binomtest(both, 3999, 0.25).pvalue > ALPHA
    other = alternate(turn_keys(4, 1, 1)[0], samples)
    assert stats.binomtest(int((other == sides[0]).sum()), 4000, 0.5).pvalue > ALPHA


@pytest.mark.parametrize("by_torch", [False, True])
def test_alternating_flip_is_what_the_pipeline_does(
    by_torch: bool, rng: np.random.Generator
) -> None:
    config = AugmentConfig(crop_padding=0, flip="alternating", mixup_alpha=0)
    images = torch.from_numpy(rng.integers(0, 256, (40, 6, 9, 3), dtype=np.uint8))
    drawer, augmenter = _made(config, (6, 9))
    samples, key, turns = torch.arange(40), step_keys(1, 1)[0], turn_keys(1, 2, 1)
    plain = augmenter.by_torch(images, drawer.by_torch(key, samples, turns[0]))
    for turn in turns:
        draw = drawer.by_torch if by_torch else drawer
        augment = augmenter.by_torch if by_torch else augmenter
        found = augment(images, draw(key, samples, turn))
        mirrored = alternate(turn, samples) != alternate(turns[0], samples)
        expected = torch.where(mirrored.view(-1, 1, 1, 1), plain.flip(3), plain)
        assert torch.equal(found, expected)


def _made(config: AugmentConfig, size: tuple[int, int]) -> tuple[ChoiceDrawer, Augmenter]:
    statistics = Normalisation.of(MEAN, STD, size[1], CPU)
    return ChoiceDrawer(config, size, 0.0, 0, CPU), Augmenter(config, statistics)


@pytest.mark.parametrize(("brightness", "contrast"), [(0.4, 0.4), (1.0, 0.0), (0.0, 0.9)])
def test_jitter_is_torchvisions(
    brightness: float, contrast: float, rng: np.random.Generator
) -> None:
    """On the scale 0 to 1, to a hundredth of a level."""
    pixels = rng.integers(0, 256, (30, 3, 8, 11)).astype(np.float32)
    mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (MEAN, STD))
    draws = torch.from_numpy(rng.random((30, 2), dtype=np.float32))
    statistics = Normalisation.of(MEAN, STD, 11, CPU)
    found = jitter(torch.from_numpy((pixels - mean) / std), draws, statistics, brightness, contrast)
    for i, image in enumerate(torch.from_numpy(pixels / 255)):
        lighter, stronger = (
            1 + strength * (2 * float(draw) - 1)
            for strength, draw in zip((brightness, contrast), draws[i], strict=True)
        )
        expected = V.adjust_contrast(V.adjust_brightness(image, lighter), stronger)
        error = found[i] * torch.from_numpy(std) + torch.from_numpy(mean) - 255 * expected
        assert float(error.abs().max()) < 0.01


def _rectangle(draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int] | None:
    """torchvision's RandomErasing.get_params, its random numbers given."""
    for attempt in range(10):
        area = height * width * (0.02 + 0.31 * float(draws[2 + attempt]))
        ratio = np.exp(np.log(0.3) + (np.log(3.3) - np.log(0.3)) * float(draws[12 + attempt]))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            i = int(float(draws[0]) * (height - h + 1))
            j = int(float(draws[1]) * (width - w + 1))
            return i, j, h, w
    return None


@pytest.mark.parametrize("size", [(32, 32), (9, 40), (2, 2)])
def test_erasing_image_by_image(size: tuple[int, int], rng: np.random.Generator) -> None:
    images = rng.normal(size=(200, 3, *size)).astype(np.float32)
    draws = rng.random((200, 23), dtype=np.float32)
    draws[0] = 1 - 2.0**-24
    found = erasing(torch.from_numpy(images), torch.from_numpy(draws), 0.6).numpy()
    erased = 0
    for i, image in enumerate(images):
        expected = image.copy()
        box = _rectangle(draws[i, 1:], *size)
        if draws[i, 0] < 0.6 and box is not None:
            top, left, h, w = box
            expected[:, top : top + h, left : left + w] = 0
            erased += 1
        assert np.array_equal(found[i], expected)
    assert 80 < erased < 160 or size == (2, 2)


def test_erasings_rectangles_are_distributed_as_torchvisions(rng: np.random.Generator) -> None:
    count, side = 4000, 32
    boxes, there = rectangles(
        torch.from_numpy(rng.random((count, 22), dtype=np.float32)), side, side, 0.02, 0.33
    )
    assert bool(there.all())
    ours = boxes.numpy()
    picture = torch.zeros(3, side, side)
    torch.manual_seed(5)
    made = [RandomErasing.get_params(picture, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in ours]
    theirs = np.array([box[:4] for box in made])
    for of in (
        lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0],
        lambda b: b[:, 1], lambda b: b[:, 0] + b[:, 2],
    ):  # fmt: skip
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > ALPHA


def _boxes(config: AugmentConfig, size: tuple[int, int], steps: int) -> list[tuple[float, Tensor]]:
    drawer, _ = _made(config, size)
    found = []
    for key in step_keys(9, steps):
        choices = drawer(key, torch.arange(4))
        assert choices.lam is not None
        assert choices.weights is not None
        found.append((float(choices.lam), choices.weights))
    return found


def test_cutmix_image_by_image(rng: np.random.Generator) -> None:
    """A box of the partner, and the labels' weight the area that is left, pixel by pixel."""
    config = AugmentConfig(crop_padding=0, flip=False, mix="cutmix")
    height, width = 9, 14
    images = rng.integers(0, 256, (16, height, width, 3), dtype=np.uint8)
    drawer, augmenter = _made(config, (height, width))
    sizes = set()
    for key in step_keys(2, 40):
        choices = drawer(key, torch.from_numpy(rng.permutation(999)[:16]))
        assert choices.partner is not None
        assert choices.lam is not None
        assert choices.weights is not None
        rows, columns = np.nonzero(choices.weights.numpy() == 0)
        own = np.ones((height, width), bool)
        if len(rows):  # one rectangle, and nothing else
            own[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        assert np.array_equal(choices.weights.numpy(), own.astype(np.float32))
        assert float(choices.lam) == np.float32(own.sum() / own.size)
        sizes.add(int(own.sum()))
        found = augmenter(torch.from_numpy(images), choices).permute(0, 2, 3, 1).numpy()
        for i, partner in enumerate(choices.partner.tolist()):
            mixed = np.where(own[:, :, None], images[i], images[partner])
            expected = (mixed.astype(np.float64) - MEAN) / STD
            assert np.abs(found[i] - expected).max() < 1e-6
    assert len(sizes) > 20


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmixs_boxes_are_those_of_its_paper(alpha: float, rng: np.random.Generator) -> None:
    """Yun et al.'s rand_bbox, from NumPy's numbers: the distribution of the weight."""
    height, width, count = 32, 20, 2000
    config = AugmentConfig(crop_padding=0, flip=False, mix="cutmix", cutmix_alpha=alpha)
    ours = [lam for lam, _ in _boxes(config, (height, width), count)]
    theirs = []
    for lam in rng.beta(alpha, alpha, count):
        cut = np.sqrt(1 - lam)
        h, w = int(height * cut), int(width * cut)
        y, x = rng.integers(height), rng.integers(width)
        y1, y2 = np.clip([y - h // 2, y + h // 2], 0, height)
        x1, x2 = np.clip([x - w // 2, x + w // 2], 0, width)
        theirs.append(1 - (y2 - y1) * (x2 - x1) / (height * width))
    assert stats.ks_2samp(ours, theirs).pvalue > ALPHA


def test_both_takes_turns_by_a_fair_draw() -> None:
    config = AugmentConfig(crop_padding=0, flip=False, mixup_alpha=1.0, mix="both")
    boxed = [set(weights.unique().tolist()) <= {0.0, 1.0} for _, weights in
             _boxes(config, (16, 16), 1000)]  # fmt: skip
    assert stats.binomtest(sum(boxed), 1000, 0.5).pvalue > ALPHA
    mixup, _ = _made(AugmentConfig(crop_padding=0, flip=False, mixup_alpha=1.0), (16, 16))
    cutmix = _boxes(AugmentConfig(crop_padding=0, flip=False, mix="cutmix"), (16, 16), 1000)
    for step, (lam, weights) in enumerate(_boxes(config, (16, 16), 1000)):
        alone = mixup(step_keys(9, 1000)[step], torch.arange(4)).lam
        if boxed[step]:
            assert lam == cutmix[step][0]
            assert torch.equal(weights, cutmix[step][1])
        else:
            assert alone is not None
            assert lam == float(alone)
            assert bool((weights == alone).all())
