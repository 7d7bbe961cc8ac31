"""Augmentations together: streams that do not touch each other, replicas, kernels, your own."""

import importlib
import re
import sys
import types
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_resnet.augment import (
    Augmenter,
    ChoiceDrawer,
    Choices,
    Normalisation,
    normalise,
    within_kernels,
)
from dist_resnet.augment.trial import check_signatures, try_extras
from dist_resnet.base.errors import UserError
from dist_resnet.base.randomness import step_keys, turn_keys
from dist_resnet.config import builtins
from dist_resnet.config.load import load_config
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.step.replica_pass import KernelPass, TorchPass, pass_kind
from tests.helpers.jobs import ROOT

MEAN, STD = (125.307, 122.950, 113.865), (62.993, 62.089, 66.705)
CPU = torch.device("cpu")
SIZE, COUNT = (16, 12), 32
STATISTICS = Normalisation.of(MEAN, STD, SIZE[1], CPU)
KEY, TURN = step_keys(6, 3)[2], turn_keys(6, 3, 2)[2]

EVERYTHING = AugmentConfig(
    cutout=4, padding_mode="reflect", flip="alternating", trivial=True, jitter=0.4, erasing=0.5,
    mix="both", extra=["jitter", {"name": "erasing", "args": {"probability": 0.7}}],
)  # fmt: skip
ONE_LESS = {
    "cutout": {"cutout": 0}, "trivial": {"trivial": False}, "jitter": {"jitter": 0},
    "erasing": {"erasing": 0}, "first extra": {"extra": EVERYTHING.extra[1:]},
    "second extra": {"extra": EVERYTHING.extra[:1]}, "crop": {"crop_padding": 0},
    "CutMix": {"mix": "mixup"}, "alternating": {"flip": True},
}  # fmt: skip

OWN_STREAM = ("trivial", "jitter", "erasing", "first extra", "second extra")


def _images(count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(256, (count, *SIZE, 3), generator=generator).byte()


def _samples(count: int = COUNT) -> Tensor:
    return torch.randperm(50_000, generator=torch.Generator().manual_seed(5))[:count]


def _choices(config: AugmentConfig, by_torch: bool = False) -> Choices:
    drawer = ChoiceDrawer(config, SIZE, 0.3, 10, CPU)
    return (drawer.by_torch if by_torch else drawer)(KEY, _samples(), TURN)


@pytest.mark.parametrize("off", list(ONE_LESS))
@pytest.mark.parametrize("by_torch", [False, True])
def test_one_augmentation_more_changes_no_other_draw(off: str, by_torch: bool) -> None:
    whole = _choices(EVERYTHING, by_torch)
    less = _choices(replace(EVERYTHING, **ONE_LESS[off]), by_torch)  # type: ignore[arg-type]
    of_mixing = {"lam", "weights"} if off == "CutMix" else set()
    of_mixing |= {"flip"} if off == "alternating" else set()
    for field in fields(Choices):
        found, expected = getattr(less, field.name), getattr(whole, field.name)
        if found is None or field.name in of_mixing:
            continue
        if field.name == "draws":
            assert len(expected) - len(found) == (off in OWN_STREAM)
            assert all(torch.equal(found[name], expected[name]) for name in found)
        else:
            assert torch.equal(found, expected), field.name


def test_the_recipes_draws_are_the_first_versions() -> None:
    """Beside everything that came later, with the same lanes."""
    config = replace(EVERYTHING, mix="mixup", flip=True)
    before = AugmentConfig(cutout=4)
    found, expected = _choices(config), _choices(before)
    for name in ("top", "left", "flip", "cut_top", "cut_left", "partner", "lam", "keep"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_no_two_streams_agree() -> None:
    config = replace(EVERYTHING, extra=["jitter", "jitter", "erasing"])
    draws = _choices(config).draws
    assert draws is not None
    assert sorted(draws) == [
        "augment.erasing", "augment.jitter", "augment.trivial", "erasing", "jitter", "jitter#2",
    ]  # fmt: skip
    columns = [tuple(column.tolist()) for found in draws.values() for column in found.T]
    assert len(set(columns)) == len(columns)
    on_every_rank = torch.cat([found.flatten() for found in draws.values()])
    assert float(on_every_rank.min()) >= 0
    assert float(on_every_rank.max()) < 1
    assert float(on_every_rank.mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"flip": "alternating"}, {"padding_mode": "reflect"}, {"trivial": True},
        {"jitter": 0.4, "cutout": 4}, {"erasing": 0.8}, {"mix": "cutmix"}, {"mix": "both"},
        {"extra": ["jitter"]}, {"mix": "cutmix", "mixup_alpha": 0.0},
    ],
)  # fmt: skip
def test_the_kernels_part_of_a_pipeline_is_torchs(settings: dict[str, object]) -> None:
    config = AugmentConfig(**settings)  # type: ignore[arg-type]
    augmenter = Augmenter(config, STATISTICS)
    found = augmenter(_images(), _choices(config))
    expected = augmenter.by_torch(_images(), _choices(config, by_torch=True))
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert within_kernels(config) == (settings in ({}, {"flip": "alternating"}))


def test_replicas_side_by_side_are_augmented_as_alone() -> None:
    """One rank of four replicas, and four ranks of one."""

    def inputs(images: Tensor, samples: Tensor, replicas: int) -> Tensor:
        draw = ChoiceDrawer(EVERYTHING, SIZE, 0.0, 0, CPU)
        own = TorchPass(EVERYTHING, 0.0, draw, STATISTICS, replicas, torch.float32)
        return own.inputs(images, samples, KEY, TURN)[0]

    images, samples = _images(4 * 9), _samples(4 * 9)
    on_every_rank = inputs(images, samples, 4)
    parts = zip(images.chunk(4), samples.chunk(4), strict=True)
    assert torch.equal(on_every_rank, torch.cat([inputs(*part, 1) for part in parts]))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, KernelPass), ({"flip": "alternating"}, KernelPass), ({"jitter": 0.1}, TorchPass)],
)
def test_on_a_gpu_our_kernels_do_what_they_can(
    settings: dict[str, object], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_resnet.step.replica_pass.support.usable", lambda device: True)
    config = AugmentConfig(**settings)  # type: ignore[arg-type]
    assert pass_kind(config, CPU) is kind


def test_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes first, then what the user brings, then holes of the mean, and mixing at the end."""
    seen = []

    def look(images: Tensor, draws: Tensor) -> Tensor:
        seen.append(images.clone())
        return images + 100

    module = types.ModuleType("order_of_parts")
    module.look = look  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "order_of_parts", module)
    config = AugmentConfig(cutout=6, jitter=0.5, erasing=1.0, extra=["order_of_parts:look"])
    choices = _choices(config)
    found = Augmenter(config, STATISTICS)(_images(), choices)
    without = replace(config, cutout=0, erasing=0, mixup_alpha=0, extra=[])
    assert torch.equal(seen[0], Augmenter(without, STATISTICS)(_images(), _choices(without)))
    assert choices.lam is not None
    unmixed = replace(config, mixup_alpha=0.0)
    alone = Augmenter(unmixed, STATISTICS)(_images(), replace(choices, lam=None, partner=None))
    assert bool((alone == 0).any())  # holes, in images that are far from the mean
    assert bool(((alone == 0) | (alone > 90)).all())
    mixed = choices.lam * alone + (1 - choices.lam) * alone[choices.partner]
    torch.testing.assert_close(found, mixed, rtol=1e-5, atol=1e-4)


def test_a_built_in_one_is_a_function_and_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "greying.py").write_text(
        "def grey(images, draws, share=0.5):\n"
        "    chosen = (draws[:, 0] < share).view(-1, 1, 1, 1)\n"
        "    return images.mean(dim=1, keepdim=True).where(chosen, images)\n"
        "grey.lanes = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(builtins.AUGMENTATIONS, "grey", "greying:grey")
    config = load_config(["augment.extra=[{name: grey, args: {share: 0.3}}]"]).augment
    config = replace(config, crop_padding=0, flip=False, mixup_alpha=0.0)
    try_extras(config, SIZE, STATISTICS)
    choices = _choices(config)
    found = Augmenter(config, STATISTICS)(_images(), choices)
    plain = normalise(_images(), STATISTICS)
    assert choices.draws is not None
    assert choices.draws["grey"].shape == (COUNT, 1)
    for i, draw in enumerate(choices.draws["grey"][:, 0].tolist()):
        expected = plain[i].mean(dim=0).expand(3, -1, -1) if draw < 0.3 else plain[i]
        torch.testing.assert_close(found[i], expected)


def test_the_pages_example(brought: Callable[..., AugmentConfig]) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    (source,) = re.findall(r"```python\n(def posterise.*?)```", page, re.DOTALL)
    (given,) = re.findall(r"extra: \[\{name: \"my_aug:posterise\", args: (.*?)\}\]", page)
    config = brought(source.replace("posterise", "f"), given)
    try_extras(config, SIZE, STATISTICS)
    config = replace(config, crop_padding=0, flip=False, mixup_alpha=0.0)
    choices = _choices(config)
    found = Augmenter(config, STATISTICS)(_images(), choices)
    assert choices.draws is not None
    ((_, draws),) = choices.draws.items()
    assert draws.shape == (COUNT, 1)
    for i, image in enumerate(normalise(_images(), STATISTICS)):
        chosen = float(draws[i, 0]) < 0.5
        expected = torch.round(image * 3) / 3 if chosen else image
        assert torch.equal(found[i], expected)


BAD = {
    "shape": ("return images[:, :, 1:]", "shape (8, 3, 15, 12) for (8, 3, 16, 12)"),
    "type": ("return images.half()", "type torch.float16"),
    "tuple": ("return images, 1", "returned a tuple"),
    "nan": ("return images / 0", "not finite"),
    "python": ("import random; return images * random.random()", "draws from Python's random"),
    "numpy": ("import numpy; return images * numpy.random.rand()", "draws from numpy.random"),
    "torch": ("import torch; return images + torch.rand(1)", "draws from torch's generator"),
    "state": ("kept.append(1); return images * len(kept)", "other images for the same"),
    "raises": ("return images[0, 5]", "bad_ones.py:"),
}


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., AugmentConfig]:
    """Writes a module of the user's; the recipe with its function."""

    def write(source: str, args: str = "{}") -> AugmentConfig:
        (tmp_path / "bad_ones.py").write_text(f"kept = []\n{source}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "bad_ones", raising=False)
        importlib.invalidate_caches()
        return load_config([f"augment.extra=[{{name: 'bad_ones:f', args: {args}}}]"]).augment

    return write


def _tried(config: AugmentConfig) -> None:
    """As a run does it."""
    check_signatures(config)
    try_extras(config, SIZE, STATISTICS)


def _refused(config: AugmentConfig) -> str:
    with pytest.raises(UserError) as caught:
        _tried(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_one_is_one_line(name: str, brought: Callable[..., AugmentConfig]) -> None:
    body, expected = BAD[name]
    line = _refused(brought(f"def f(images, draws):\n    {body}"))
    assert line.startswith("augment.extra=bad_ones:f: ")
    assert expected in line


def test_arguments_are_held_against_the_signature(brought: Callable[..., AugmentConfig]) -> None:
    right = "def f(images, draws, strength):\n    return images * strength"
    assert "did you mean strength?" in _refused(brought(right, "{strenght: 1}"))
    assert "needs the argument strength" in _refused(brought(right))
    assert "set by the training itself" in _refused(brought(right, "{strength: 1, draws: 2}"))
    assert "must take (images, draws)" in _refused(brought("def f(images):\n    return images"))
    assert "lanes='4'" in _refused(
        brought("def f(images, draws):\n    return images\nf.lanes = '4'")
    )
    line = _refused(
        brought("def f(images, draws, strength):\n    return images * strength", "{strength: a}")
    )
    assert "TypeError" in line


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[erazing]", "did you mean erasing?"), ("[{args: {}}]", "must be"), ("[1]", "must be"),
        ("[{name: 'a:b', arguments: {}}]", "must be"), ("[{name: 'a:b', args: 3}]", "must be"),
    ],
)  # fmt: skip
def test_names_are_checked_with_the_configuration(value: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"augment\.extra") as caught:
        load_config([f"augment.extra={value}"])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "key"),
    [
        (["augment.padding_mode=reflect", "augment.crop_padding=0"], "augment.padding_mode"),
        (["augment.mix=both", "augment.mixup_alpha=0"], "augment.mix="),
    ],
)
def test_what_would_do_nothing_is_refused(pairs: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key):
        load_config(pairs)


def test_an_error_in_mid_training_is_one_line_too(brought: Callable[..., AugmentConfig]) -> None:
    # The trial has eight images.
    source = "def f(images, draws):\n    return images if len(images) < 9 else images[99]"
    config = brought(source)
    try_extras(config, SIZE, STATISTICS)
    draw = ChoiceDrawer(config, SIZE, 0.0, 0, CPU)
    own = TorchPass(config, 0.0, draw, STATISTICS, 1, torch.float32)
    with pytest.raises(UserError, match=r"augment.extra=bad_ones:f: raised IndexError.*bad_ones"):
        own.inputs(_images(), _samples(), KEY, TURN)


def test_what_users_hand_back_in_another_order_of_memory(
    brought: Callable[..., AugmentConfig],
) -> None:
    source = "def f(images, draws):\n    return images.contiguous()"
    config = brought(source)
    try_extras(config, SIZE, STATISTICS)
    found = Augmenter(config, STATISTICS)(_images(), _choices(config))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(
        found.numpy(), Augmenter(AugmentConfig(), STATISTICS)(_images(), _choices(config)).numpy()
    )
