"""FFCV and resident loaders against the arrays that were prepared; leaving early; failures."""

import gc
import hashlib
import io
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.config.plan import Plan, make_plan
from dist_resnet.config.schema import Config, DataConfig, TrainConfig
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.ffcv_loader import FfcvLoader, _SafeIterator, epoch_iterator
from dist_resnet.data.images import ImageSet
from dist_resnet.data.order import rank_order
from dist_resnet.data.stream import ResidentLoader, open_loader, training_batches

CPU = torch.device("cpu")
BATCH = 7
Loaders = dict[str, FfcvLoader | ResidentLoader]


@pytest.fixture(scope="module")
def loaders(tiny: Dataset) -> Loaders:
    """Both kinds, once: compiling FFCV's takes a second."""
    return {
        "ffcv": FfcvLoader(tiny.train_path, BATCH, CPU),
        "resident": ResidentLoader(tiny.train_path, BATCH, CPU),
    }


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The threads after the test are those before it."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.is_alive()]
    assert not left, left


both = pytest.mark.parametrize("kind", ["ffcv", "resident"])


def _collect(loader: Any, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(i.numpy().copy(), t.numpy().copy()) for i, t in loader.batches(order)]


@both
@pytest.mark.parametrize(
    "order",
    [
        np.arange(53),
        np.arange(53)[::-1],
        np.random.default_rng(0).permutation(53),
        np.array([5, 5, 5, 0, 52, 0]),
        np.array([52]),
        np.random.default_rng(1).permutation(53)[:42].reshape(6, 7),
        np.arange(14, dtype=np.int32),
        np.random.default_rng(2).integers(0, 53, 400),
    ],
    ids=["forwards", "backwards", "shuffled", "twice", "one", "two-dimensional", "int32", "long"],
)
@pytest.mark.usefixtures("no_leak")
def test_batches_are_the_prepared_arrays(
    kind: str, order: np.ndarray, loaders: Loaders, tiny_images: ImageSet
) -> None:
    found = _collect(loaders[kind], order)
    flat = order.reshape(-1)
    assert len(loaders[kind]) == 53
    starts = range(0, len(flat), BATCH)
    assert [len(t) for _, t in found] == [min(BATCH, len(flat) - s) for s in starts]
    for number, (images, labels) in enumerate(found):
        chosen = flat[number * BATCH : (number + 1) * BATCH]
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert np.array_equal(images, tiny_images.train.images[chosen])
        assert np.array_equal(labels, tiny_images.train.labels[chosen])


@both
def test_no_indices_no_batches(kind: str, loaders: Loaders) -> None:
    assert _collect(loaders[kind], np.array([], np.int64)) == []


@both
@pytest.mark.parametrize("bad", [53, -1, 10**9])
@pytest.mark.usefixtures("no_leak")
def test_an_index_out_of_range_is_refused(kind: str, bad: int, loaders: Loaders) -> None:
    with pytest.raises(IndexError):
        _collect(loaders[kind], np.array([0, 1, bad, 2]))
    assert len(_collect(loaders[kind], np.arange(8))) == 2  # and nothing is broken


@both
@pytest.mark.parametrize("how", ["close", "forget", "raise"])
@pytest.mark.usefixtures("no_leak")
def test_an_epoch_can_be_left_at_any_batch(
    kind: str, how: str, loaders: Loaders, tiny_images: ImageSet
) -> None:
    order = np.random.default_rng(3).permutation(53)
    gc.collect()
    gc.freeze()  # what the session has kept so far need not be looked at nine times
    for leave in range(9):  # 8 batches
        batches: Any = loaders[kind].batches(order)
        for _ in range(leave):
            next(batches)
        if how == "close":
            batches.close()
        elif how == "raise":
            with pytest.raises((ZeroDivisionError, StopIteration)):
                batches.throw(ZeroDivisionError())
        del batches
        if how == "forget":
            gc.collect()
        assert not [t for t in threading.enumerate() if isinstance(t, _SafeIterator)]
    gc.unfreeze()
    images, _ = next(iter(loaders[kind].batches(order)))
    assert np.array_equal(images.numpy(), tiny_images.train.images[order[:BATCH]])


@pytest.mark.usefixtures("no_leak")
def test_a_slow_consumer_gets_every_batch_intact(loaders: Loaders, tiny_images: ImageSet) -> None:
    """FFCV decodes ahead into a ring: what is in use must not be overwritten."""
    order = np.random.default_rng(4).integers(0, 53, 70)
    for number, (images, _) in enumerate(loaders["ffcv"].batches(order)):
        time.sleep(0.02)
        chosen = order[number * BATCH : (number + 1) * BATCH]
        assert np.array_equal(images.numpy(), tiny_images.train.images[chosen])


@pytest.mark.usefixtures("no_leak")
def test_resident_batches_stay_valid(loaders: Loaders, tiny_images: ImageSet) -> None:
    order = np.random.default_rng(5).permutation(53)
    kept = torch.cat([images for images, _ in list(loaders["resident"].batches(order))])
    assert np.array_equal(kept.numpy(), tiny_images.train.images[order])


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.usefixtures("no_leak")
def test_an_exception_in_the_thread_reaches_the_consumer(
    at: int, loaders: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = _SafeIterator.run_pipeline

    def broken(self: Any, number: int, *rest: Any) -> Any:
        if number == at:
            raise OSError("the disk is gone")
        return original(self, number, *rest)

    monkeypatch.setattr(_SafeIterator, "run_pipeline", broken)
    batches = loaders["ffcv"].batches(np.arange(53))
    for _ in range(at):
        next(batches)
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert len(_collect(loaders["ffcv"], np.arange(53))) == 8


@pytest.mark.usefixtures("no_leak")
def test_leaving_while_the_thread_fails_does_not_hang(
    loaders: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = _SafeIterator.run_pipeline

    def broken(self: Any, number: int, *rest: Any) -> Any:
        if number == 4:
            raise OSError("the disk is gone")
        return original(self, number, *rest)

    monkeypatch.setattr(_SafeIterator, "run_pipeline", broken)
    batches: Any = loaders["ffcv"].batches(np.arange(53))
    next(batches)
    time.sleep(0.3)  # the thread has failed, or waits with a full queue
    batches.close()


@pytest.mark.usefixtures("no_leak")
def test_the_thread_computes_on_its_own_gpu_from_the_start(
    loaders: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA is played: FFCV's streams do nothing. A thread starts on GPU 0, whatever its parent."""
    calls: list[tuple[object, ...]] = []

    def note(what: str) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            calls.append((what, threading.current_thread().name, *arguments[:1]))
            return MagicMock()

        return call

    class Event(MagicMock):
        def record(self, _stream: object) -> None:
            note("event")()

    monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
    monkeypatch.setattr(torch.cuda, "Stream", note("Stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", note("current_stream"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext(note("stream")()))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    loader, gpu = loaders["ffcv"], torch.device("cuda", 3)
    monkeypatch.setattr(loader, "_device", gpu)
    assert len(_collect(loader, np.arange(53))) == 8
    main = threading.current_thread().name
    inside = [(what, *rest) for what, thread, *rest in calls if thread != main]
    assert inside[0] == ("set_device", gpu), "before anything else that opens a context"
    assert "stream" in [what for what, *_ in inside]

    calls.clear()
    monkeypatch.setattr(loader, "_device", CPU)
    monkeypatch.setattr(epoch_iterator, "IS_CUDA", True)  # a GPU is here, and not used
    assert len(_collect(loader, np.arange(53))) == 8
    assert calls == []


@both
def test_torchs_thread_count_is_kept(kind: str, tiny: Dataset) -> None:
    torch.set_num_threads(3)
    try:
        loader = open_loader(kind, tiny.test_path, 5, CPU)
        assert torch.get_num_threads() == 3
        for _ in loader.batches(np.arange(29)):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_missing_ffcv_is_one_line(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dist_resnet.data.ffcv_loader", None)
    with pytest.raises(UserError, match=r"cannot import ffcv.*make setup"):
        open_loader("ffcv", tiny.train_path, 16, CPU)
    assert len(open_loader("resident", tiny.train_path, 16, CPU)) == 53


def _plan(ranks: int, epochs: int = 3) -> Plan:
    return make_plan(
        Config(data=DataConfig(batch_size_per_replica=BATCH), train=TrainConfig(epochs=epochs)),
        53,
        ranks,
    )


@both
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_stream_of_a_run_from_any_step(
    kind: str, ranks: int, loaders: Loaders, tiny_images: ImageSet
) -> None:
    plan, indices = _plan(ranks), np.arange(53)
    for rank in range(ranks):
        expected = np.concatenate(
            [rank_order(9, epoch, 0, indices, plan, rank) for epoch in range(3)]
        )
        assert len(expected) == plan.total_steps
        for start in [0, 1, plan.steps_per_epoch, plan.total_steps - 1, plan.total_steps]:
            stream = training_batches(loaders[kind], 9, indices, plan, rank, start, CPU)
            count = 0
            for count, batch in enumerate(stream, 1):
                chosen = expected[start + count - 1]
                assert batch.samples.tolist() == chosen.tolist()
                assert np.array_equal(batch.images.numpy(), tiny_images.train.images[chosen])
                assert batch.labels.tolist() == tiny_images.train.labels[chosen].tolist()
            assert count == plan.total_steps - start


def test_the_stream_ends_at_max_steps(loaders: Loaders) -> None:
    config = Config(data=DataConfig(batch_size_per_replica=BATCH), train=TrainConfig(max_steps=10))
    plan = make_plan(config, 53, 1)
    stream = training_batches(loaders["resident"], 0, np.arange(53), plan, 0, 4, CPU)
    assert len(list(stream)) == 6


def test_digits_through_both_loaders(digits: Dataset) -> None:
    """The embedded set: 1,437 images, the same bits from both."""
    order = np.random.default_rng(6).permutation(1437)
    both = [open_loader(kind, digits.train_path, 100, CPU) for kind in ("ffcv", "resident")]
    for (a, s), (b, t) in zip(*(loader.batches(order) for loader in both), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(s, t)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_real_images_are_those_of_the_png_files(
    cifar10: Dataset, cifar10_archives: tuple[Path, Path]
) -> None:
    def key(name: str, pixels: np.ndarray) -> tuple[str, str]:
        return name, hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()

    expected: Counter[tuple[str, str]] = Counter()
    with tarfile.open(cifar10_archives[1]) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".png") else None
            if file is not None:
                with Image.open(io.BytesIO(file.read())) as image:
                    expected[key(Path(member.name).parts[-2], np.asarray(image))] += 1
    assert sum(expected.values()) == 10_000
    for kind in ("ffcv", "resident"):
        loader, found = open_loader(kind, cifar10.test_path, 500, CPU), Counter()
        for images, labels in loader.batches(np.random.default_rng(0).permutation(10_000)):
            names = [cifar10.classes[label] for label in labels.tolist()]
            found.update(key(n, p) for n, p in zip(names, images.numpy(), strict=True))
        assert found == expected
