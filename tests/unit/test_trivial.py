"""TrivialAugment against torchvision's operations on one image at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op

from dist_resnet.augment.trivial import BINS, OPERATIONS, TrivialAugment

_SPACE = TrivialAugmentWide()._augmentation_space(BINS)
_MOVED_BY_FRACTIONS = ("ShearX", "ShearY", "Rotate")


def _pictures(rng: np.random.Generator, count: int, height: int, width: int) -> Tensor:
    """Uniform noise, a smooth one of few levels, and two that some operations must leave alone."""
    noise = rng.integers(0, 256, (count, height, width, 3))
    noise[1::4] = 90 + noise[1::4] // 8
    noise[2::4] //= 128  # two values
    noise[3] = 77
    return torch.from_numpy(noise.astype(np.uint8))


def _by_torchvision(image: Tensor, name: str, magnitude: int, sign: int) -> Tensor:
    """(H, W, 3), as TrivialAugmentWide.forward calls it."""
    magnitudes, signed = _SPACE[name]
    value = float(magnitudes[magnitude].item()) if magnitudes.ndim > 0 else 0.0
    value = -value if signed and sign else value
    done = _apply_op(image.permute(2, 0, 1), name, value, InterpolationMode.NEAREST, None)
    return done.permute(1, 2, 0)


def test_the_operations_are_torchvisions() -> None:
    assert tuple(_SPACE) == OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 14)])
def test_an_operation_is_torchvisions(
    name: str, height: int, width: int, rng: np.random.Generator
) -> None:
    """At every magnitude and sign, level for level.

    A pixel that a shear or a rotation finds between two others may be either of them.
    """
    count = 2 * BINS
    images = _pictures(rng, count, height, width)
    magnitude, sign = torch.arange(count) % BINS, torch.arange(count) // BINS
    operation = torch.full((count,), OPERATIONS.index(name))
    found = TrivialAugment().apply(images, operation, magnitude, sign)
    assert found.dtype == torch.uint8
    others = 0
    for i, image in enumerate(images):
        expected = _by_torchvision(image, name, int(magnitude[i]), int(sign[i]))
        others += int((found[i] != expected).any(dim=2).sum())
    allowed = 0.01 if name in _MOVED_BY_FRACTIONS else 0.0
    assert others <= allowed * count * height * width


def test_each_image_has_its_own_and_all_are_equally_likely(rng: np.random.Generator) -> None:
    """Together they give what each gives alone; draws at the edges stay within the tables."""
    images = _pictures(rng, 96, 12, 12)
    draws = torch.from_numpy(rng.random((96, 3), dtype=np.float32))
    draws[0], draws[1] = 0.0, 1 - 2.0**-24
    both = TrivialAugment()
    on_every_rank = both(images, draws)
    for i in range(96):
        name = OPERATIONS[int(np.floor(float(draws[i, 0]) * 14))]
        magnitude, sign = int(np.floor(float(draws[i, 1]) * 31)), int(draws[i, 2] >= 0.5)
        expected = _by_torchvision(images[i], name, magnitude, sign)
        differ = (on_every_rank[i] != expected).any(dim=2).float().mean()
        assert differ <= (0.1 if name in _MOVED_BY_FRACTIONS else 0), name
        assert torch.equal(on_every_rank[i], both(images[i : i + 1], draws[i : i + 1])[0])


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3)])
def test_tiny_images(size: tuple[int, int], rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (14, *size, 3), dtype=np.uint8))
    for magnitude in (0, 7, 30):
        operation, zeros = torch.arange(14), torch.zeros(14, dtype=torch.int64)
        found = TrivialAugment().apply(images, operation, zeros + magnitude, zeros)
        for i, name in enumerate(OPERATIONS):
            if name not in _MOVED_BY_FRACTIONS:
                expected = _by_torchvision(images[i], name, magnitude, 0)
                assert torch.equal(found[i], expected), name
