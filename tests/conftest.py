"""Fixtures that all tests share."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from dist_resnet.base import watchdog
from dist_resnet.base.errors import UserError
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.images import ImageSet, Split
from dist_resnet.data.prepare import prepare, prepare_builtin
from dist_resnet.data.sources.embedded import load_synthetic
from dist_resnet.data.sources.folder import load_folder
from dist_resnet.native import build

# Nothing leaves this machine, nothing asks for a key; and these tests are no rank of anything.
os.environ["WANDB_MODE"] = "offline"
for _name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(_name, None)

# A signal ignored here would be ignored by all that the tests start: by `make test &` in a script
# SIGINT and SIGQUIT are, by nohup SIGHUP. A handler that does nothing is not handed down.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)

# The same examples in every run, and no folder of past failures.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

CIFAR10_ARCHIVES = ("cifar10-train.tar.xz", "cifar10-test.tar.xz")

# Most of these tests wait, for processes that start or end: two at a time take half as long. What
# stops jobs, or makes hosts and queues of this machine, stays in one process of pytest's.
_BESIDE = (
    "test_api", "test_augmentations", "test_bench_commands", "test_demonstration", "test_examples",
    "test_hostile", "test_hostile_data", "test_own_data_runs", "test_own_model",
    "test_own_optimizer", "test_random_configurations", "test_recipe_row", "test_report_browser",
    "test_report_run", "test_teachers", "test_use", "test_wandb",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which of two processes (`-n 2 --dist loadgroup`) runs a test."""
    for item in items:
        alone = item.path.parent.name == "integration" and item.path.stem not in _BESIDE
        item.add_marker(pytest.mark.xdist_group("machine" if alone else "beside"))


def pytest_runtest_setup() -> None:
    """Before every test and its fixtures: sums in one order, whatever number a test before has set.

    And no fight for the cores between tests that spawn ranks.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def watchdog_disarmed() -> Iterator[None]:
    """A loop that a test runs by itself leaves the watchdog armed: it ends pytest minutes later."""
    yield
    watchdog.disarm()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The embedded digits, prepared once for all tests. Read only."""
    return prepare_builtin("digits", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_images() -> ImageSet:
    """53 and 29 images of 12x12 in 5 classes: primes, so that nothing divides by accident."""
    images = load_synthetic(53, 29, classes=5, size=12, seed=3)
    splits = (Split(part.images[:], part.labels) for part in (images.train, images.test))
    return ImageSet(images.classes, *splits)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_images: ImageSet) -> Dataset:
    """`tiny_images`, prepared. Read only."""
    return prepare(tiny_images, tmp_path_factory.mktemp("data") / "tiny", "synthetic", "tiny")


@pytest.fixture(scope="session")
def cifar10_archives() -> tuple[Path, Path]:
    """The .tar.xz of real CIFAR-10's training and test images; skips where they are not."""
    train, test = (_cifar10_place() / name for name in CIFAR10_ARCHIVES)
    if not (train.is_file() and test.is_file()):
        pytest.skip(f"no CIFAR-10 archives in {train.parent}; set DIST_RESNET_CIFAR10")
    return train, test


@pytest.fixture(scope="session")
def cifar10(request: pytest.FixtureRequest) -> Dataset:
    """Real CIFAR-10, prepared; skips where there is none.

    DIST_RESNET_CIFAR10 names a prepared folder or one that holds the archives. These are prepared
    once and kept in the system's folder for temporary files for the next runs.
    """
    place = _cifar10_place()
    if Dataset.exists(place):
        return Dataset.load(place)
    train, test = request.getfixturevalue("cifar10_archives")
    facts = [path.stat() for path in (train, test)]
    key = "-".join(f"{fact.st_size:x}.{fact.st_mtime_ns:x}" for fact in facts)
    folder = Path(tempfile.gettempdir()) / f"dist_resnet-tests-{os.getuid()}" / f"cifar10-{key}"
    if not Dataset.exists(folder):
        with tempfile.TemporaryDirectory() as scratch:
            prepare(load_folder(train, test, Path(scratch)), folder, "folder", "cifar10")
    return Dataset.load(folder)


def _cifar10_place() -> Path:
    default = Path(__file__).parents[2] / "shared" / "cifar10"
    return Path(os.environ.get("DIST_RESNET_CIFAR10", default))


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's generator, the same in every run."""
    return np.random.default_rng(20240607)


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests of what is compiled; skips where nothing can be."""
    try:
        build.load("norm_act")
    except UserError as error:
        pytest.skip(f"nothing can be compiled here: {error}")


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where kernels are kept, empty: they are compiled anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path / "dist_resnet"
    build.load.cache_clear()
