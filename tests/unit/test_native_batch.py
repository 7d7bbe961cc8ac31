"""The kernels for a batch against torch's operations, which other tests hold to NumPy."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_resnet.augment import Augmenter, ChoiceDrawer, Choices, Normalisation
from dist_resnet.base.errors import UserError
from dist_resnet.base.randomness import sample_lanes, step_keys
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.native import batch, build

CPU = torch.device("cpu")
MEAN, STD = (125.307, 122.950, 113.865), (62.993, 62.089, 66.705)
OFF = AugmentConfig(crop_padding=0, flip=False, mixup_alpha=0.0)


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Else torch would be compared with itself."""
    if not batch.usable(torch.zeros(1)):
        pytest.skip("no C++ compiler")


def _batch(
    config: AugmentConfig, step: int, count: int = 32, size: tuple[int, int] = (32, 32)
) -> tuple[torch.Tensor, Choices, Normalisation]:
    rng = np.random.default_rng(step)
    images = torch.from_numpy(rng.integers(0, 256, (count, *size, 3), dtype=np.uint8))
    draw = ChoiceDrawer(config, size, 0.0, 0, CPU)
    samples = torch.from_numpy(rng.permutation(50_000)[:count])
    statistics = Normalisation.of(MEAN, STD, size[1], CPU)
    return images, draw(step_keys(7, step + 1)[step], samples), statistics


def test_a_compiler_that_is_no_program_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "c++"
    broken.write_bytes(b"\x00not a program")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    for cached in (build.load, batch._library):
        cached.cache_clear()
    try:
        assert not batch.usable(torch.zeros(1))
        with pytest.raises(UserError, match=r"batch\.cpp cannot be compiled"):
            build.load("batch")
    finally:
        for cached in (build.load, batch._library):
            cached.cache_clear()


@pytest.mark.usefixtures("fresh_cache")
def test_two_threads_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = build._compile, []

    def counted(command: list[str]) -> bytes:
        calls.append(command)
        return original(command)

    monkeypatch.setattr(build, "_compile", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build.load, ["batch", "batch"])
    assert first._name == second._name
    assert len(calls) == 1


EVERYTHING = AugmentConfig(cutout=8)
SETTINGS = {
    "none": OFF,
    "recipe": AugmentConfig(),
    "all": EVERYTHING,
    "crop": replace(OFF, crop_padding=4),
    "flip": replace(OFF, flip=True),
    "cutout": replace(OFF, cutout=5),
    "mixup": replace(OFF, mixup_alpha=1.0),
    "far": replace(OFF, crop_padding=40),  # most windows lie outside of the image
}


def _assert_same_choices(drawer: ChoiceDrawer, key: torch.Tensor, samples: torch.Tensor) -> None:
    found, expected = drawer(key, samples), drawer.by_torch(key, samples)
    for field in fields(Choices):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if theirs is None:
            assert ours is None, field.name
        else:
            assert ours.dtype == theirs.dtype, field.name
            assert ours.shape == theirs.shape, field.name
            assert torch.equal(ours, theirs), field.name


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.15, 0.3, 0.45])
def test_choices_are_those_of_torch(config: AugmentConfig, dropout: float) -> None:
    drawer = ChoiceDrawer(config, (32, 40), dropout, 64, CPU)
    generator = torch.Generator().manual_seed(1)
    for key in step_keys(5, 30):
        _assert_same_choices(drawer, key, torch.randperm(50_000, generator=generator)[:32])


@pytest.mark.parametrize("count", [1, 2, 500])
@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_choices_of_any_key_and_number_of_samples(key: int, count: int) -> None:
    samples = torch.tensor([0, 49_999, 2**40])[torch.arange(count) % 3]  # twins: partners tie
    _assert_same_choices(
        ChoiceDrawer(EVERYTHING, (32, 32), 0.999, 3, CPU), torch.tensor(key), samples
    )


def test_a_draw_at_the_edge_of_dropout() -> None:
    key, samples = step_keys(5, 1)[0], torch.arange(4)
    edge = int(sample_lanes(key, samples, 8)[2, 7])  # the last lane: of the only feature
    drawer = ChoiceDrawer(OFF, (8, 8), edge / 2**32, 1, CPU)
    _assert_same_choices(drawer, key, samples)
    assert drawer(key, samples).keep[2] > 0  # type: ignore[index]


def test_samples_that_are_a_column_of_a_table() -> None:
    samples = torch.arange(12).view(4, 3)[:, 1]
    _assert_same_choices(ChoiceDrawer(EVERYTHING, (8, 8), 0.5, 9, CPU), torch.tensor(3), samples)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_augmentation_is_that_of_torch_bit_for_bit(config: AugmentConfig) -> None:
    for step in range(20):
        images, choices, statistics = _batch(config, step)
        before = images.clone()
        found = Augmenter(config, statistics)(images, choices)
        expected = Augmenter(config, statistics).by_torch(images, choices)
        assert torch.equal(found, expected)
        for result in (found, expected):
            assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, before)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (9, 33), (64, 48)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    """To one rounding: torch does not fuse products and sums beyond its last whole vector."""
    config = AugmentConfig(crop_padding=2, cutout=3)
    for step in range(20):
        images, choices, statistics = _batch(config, step, 5, size)
        found = Augmenter(config, statistics)(images, choices)
        expected = Augmenter(config, statistics).by_torch(images, choices)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.4999999, 0.5, 0.7, 1.0])
def test_every_weight_of_mixup(lam: float) -> None:
    config = replace(OFF, mixup_alpha=1.0)
    images, choices, statistics = _batch(config, 0)
    choices = replace(choices, lam=torch.tensor(lam))
    found = Augmenter(config, statistics)(images, choices)
    assert torch.equal(found, Augmenter(config, statistics).by_torch(images, choices))


@pytest.mark.parametrize("count", [1, 2, 32])
def test_the_bits_do_not_depend_on_the_number_of_threads(count: int) -> None:
    config = EVERYTHING
    images, choices, statistics = _batch(config, 3, count)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(Augmenter(config, statistics)(images, choices))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = AugmentConfig()
    images, choices, statistics = _batch(config, 0)
    expected = Augmenter(config, statistics)(images, choices)
    for cached in (build.load, batch._library):
        cached.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    try:
        assert not batch.usable(images)
        assert torch.equal(Augmenter(config, statistics)(images, choices), expected)
        assert torch.equal(_batch(config, 0)[1].left, choices.left)
    finally:
        for cached in (build.load, batch._library):
            cached.cache_clear()
