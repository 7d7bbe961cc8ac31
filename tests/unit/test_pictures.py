"""Pictures, against pixels computed by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_resnet.config.schema import WandbConfig
from dist_resnet.data.dataset import Dataset
from dist_resnet.tracking import pictures
from dist_resnet.tracking.wandb_session import WandbSession
from dist_resnet.training.gallery import MISTAKES, Gallery, augmented
from tests.helpers.training import BATCH, SIDE, batch_of, small_config, train_step


def test_a_grid_holds_every_image_in_its_place() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((8, 16, 3), 40, np.uint8)
    drawn = pictures.grid(images, columns=3)
    assert drawn.shape == (2 * (32 + 4), 3 * (64 + 4), 3)  # 16 pixels, four times as large
    for place in range(5):
        row, column = divmod(place, 3)
        tile = drawn[row * 36 + 2 : row * 36 + 34, column * 68 + 2 : column * 68 + 66]
        assert (tile == 40 * place).all()
    assert (drawn[36:, 136:] == 255).all()  # no sixth image


def test_captions_stand_below_their_images() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    drawn = pictures.grid(images, ["a\n>b 1.0", "a\n>b 1.0"])
    assert drawn.shape[0] > 64 + 20
    assert (drawn[68:, :68] != 255).any()
    assert np.array_equal(drawn[:, :68], drawn[:, 68:])


@pytest.mark.parametrize("number", [2, 10, 20, 21, 100, 1000])
def test_a_confusion_matrix_of_any_size(number: int) -> None:
    counts = np.diag(np.full(number, 7))
    counts[0] = 0
    counts[0, 1] = 3
    counts[1] = 0  # a class without images
    drawn = pictures.confusion(counts, [f"class {i}" for i in range(number)])
    assert max(drawn.shape) < 2100
    if number > 2:
        pure = drawn.reshape(-1, 3)
        assert (pure == (255, 0, 0)).all(axis=1).any()
        assert (pure == (0, 170, 0)).all(axis=1).any()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("pairs", [["augment.cutout=6"], ["augment.mixup_alpha=0"]])
def test_the_batch_shown_is_the_one_trained_on(pairs: list[str], given: bool) -> None:
    """Under the dataset's own normalisation or a `given` one, which cutout's squares show."""
    if given:
        scale = [[value / 255 for value in row] for row in ((120, 127, 133), (70, 74, 71))]
        pairs = [*pairs, f"data.normalisation={scale}"]
    config = small_config(*pairs, "model.dropout=0.3", "train.step_mode=eager")
    step, batch = train_step(config, 1), batch_of(0, 1)
    seen: list[torch.Tensor] = []
    step.state.flat.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step(batch)
    channels = (120.0, 127.0, 133.0), (70.0, 74.0, 71.0)  # tests.helpers.training.STATISTICS
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in channels)
    expected = (seen[0] * std + mean).permute(0, 2, 3, 1)
    dataset = Dataset(
        folder=Path(), name="x", source="x", classes=("a",) * 5, height=SIDE, width=SIDE,
        num_train=100, num_test=10, fingerprint="", files={}, created_by={},
        mean=(10.0, 200.0, 30.0) if given else channels[0], std=channels[1],
    )  # fmt: skip
    shown = augmented(config, dataset, 0, batch.images, batch.samples)
    assert shown.shape == (BATCH, SIDE, SIDE, 3)
    assert np.abs(shown - expected.detach().clamp(0, 255).numpy()).max() <= 0.51


def test_when_pictures_are_due() -> None:
    config = small_config("eval.every_epochs=2", "wandb.media_every_epochs=5")
    gallery = Gallery(config, None, None)  # type: ignore[arg-type]
    due = [epoch for epoch in range(2, 22, 2) if gallery.mistakes_at(epoch, False) == MISTAKES]
    assert due == [6, 10, 16, 20]
    assert gallery.mistakes_at(3, at_end=True) == MISTAKES


@pytest.mark.parametrize("classes", [150, 1000, 2500])
def test_many_classes_are_drawn_whole(classes: int) -> None:
    counts = np.zeros((classes, classes), np.int64)
    counts[np.arange(classes), np.arange(classes)] = 5
    counts[classes - 1, 0] = 5  # half of the last class is taken for the first
    picture = pictures.confusion(counts, [str(number) for number in range(classes)])
    side = picture.shape[0] - 8
    assert picture.shape == (side + 8, side + 8, 3)
    assert classes <= 3 * side <= 3 * 1000
    right, wrong = [0, 170, 0], [255, 75, 75]
    assert picture[4, 4].tolist() == right
    assert picture[side + 3, 4].tolist() == wrong
    assert picture[4, side + 3].tolist() == [255, 255, 255]


def test_a_table_that_wandb_would_cut_is_not_sent() -> None:
    said: list[str] = []
    session = WandbSession(WandbConfig(), Path("run"), {}, "id", "name", said.append)
    rows: list[dict[str, Any]] = []
    session._run = SimpleNamespace(log=rows.append)
    for classes in (100, 101):
        matrix = [[0] * classes for _ in range(classes)]
        session.show({"step": 3, "val/confusion_matrix": matrix}, ["x"] * classes)
    assert [sorted(row) for row in rows] == [["step", "val/confusion_matrix"], ["step"]]
    (line,) = said
    assert "101 classes" in line
