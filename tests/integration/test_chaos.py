"""Ranks and whole jobs killed at random moments: the run ends bit for bit like the undisturbed one.

`python -m tests.helpers.chaos` does it with more kills, and with the whole net.
"""

import random
from pathlib import Path

import pytest

from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.images import ImageSet, Split
from dist_resnet.data.prepare import prepare
from tests.helpers.chaos import disturbed_run, settings_for, undisturbed_run
from tests.helpers.jobs import differences


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory, cifar10: Dataset) -> Dataset:
    """Every 25th image of CIFAR-10: with 31 or 20 steps an epoch, kills fall around its end too."""
    train, test = (read_back(path) for path in (cifar10.train_path, cifar10.test_path))
    few = [Split(split.images[::25], split.labels[::25]) for split in (train, test)]
    images = ImageSet(cifar10.classes, *few)
    return prepare(images, tmp_path_factory.mktemp("data") / "few", "folder", "few")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("reduction", "ranks", "kills", "trees"), [("fast", [3], 3, 1), ("exact", [1, 2, 4], 1, 4)]
)
def test_killed_runs_end_like_the_undisturbed_one(
    tmp_path: Path, few_images: Dataset, reduction: str, ranks: list[int], kills: int, trees: int
) -> None:
    """An exact one also where each start is on another number of ranks."""
    data = few_images.folder
    extra = [
        "model.widths=[4,4,4]",
        f"parallel.reduction={reduction}",
        f"parallel.replicas={max(ranks)}",
    ]
    plain = settings_for(tmp_path, "undisturbed", data.parent, data.name, extra)
    undisturbed_run(tmp_path, "undisturbed", max(ranks), plain)
    base = settings_for(tmp_path, "disturbed", data.parent, data.name, extra)
    disturbed_run(tmp_path, base, ranks, kills, trees, random.Random(1))
    assert differences(tmp_path / "undisturbed", tmp_path / "disturbed") == []
