"""Evaluation against a loop over single images, scikit-learn, and itself on more ranks."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_resnet.augment import Normalisation
from dist_resnet.config.schema import ModelConfig
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.images import ImageSet
from dist_resnet.data.stream import open_loader
from dist_resnet.distributed.group import World
from dist_resnet.models.resnet import ResNet, resnet
from dist_resnet.training.evaluation import Evaluation, Evaluator
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 55.0, 60.0)
CLASSES, COUNT, SIDE = 5, 61, 12


@dataclass
class ArrayLoader:
    """A `Loader` over arrays in memory."""

    images: np.ndarray
    labels: np.ndarray
    batch_size: int

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(indices), self.batch_size):
            chosen = indices[start : start + self.batch_size]
            yield torch.from_numpy(self.images[chosen]), torch.from_numpy(self.labels[chosen])


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    return images, rng.integers(0, CLASSES - 1, COUNT)  # the last class has no image


def _model() -> ResNet:
    return copy.deepcopy(_warmed_up())


@cache
def _warmed_up() -> ResNet:
    """Random, with running statistics of random images, so that its guesses differ."""
    model = resnet(ModelConfig(widths=[8, 8, 16]), CLASSES, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(32, 3, SIDE, SIDE, generator=generator))
    return model


def _evaluate(
    world: World, batch: int, count: int = COUNT, tta: bool = True, mistakes: int = 0
) -> Evaluation:
    images, labels = _data()
    evaluator = Evaluator(
        ArrayLoader(images, labels, batch), np.arange(count),
        Normalisation.of(MEAN, STD, SIDE, CPU), torch.float32, tta, world, CLASSES,
    )  # fmt: skip
    return evaluator(_model(), mistakes)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_in_the_models_layout(channels_last: bool) -> None:
    seen: list[bool] = []

    class Looks(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return images.mean(dim=(2, 3)).repeat(1, 2)[:, :CLASSES]

    images, labels = _data()
    evaluator = Evaluator(
        ArrayLoader(images, labels, 50), np.arange(COUNT), Normalisation.of(MEAN, STD, SIDE, CPU),
        torch.float32, False, ALONE, CLASSES, channels_last,
    )  # fmt: skip
    evaluator(Looks())
    assert set(seen) == {channels_last}


def _one_by_one(model: ResNet, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Each image alone, in float64, its loss written out."""
    model = model.double().eval()
    losses, guesses, with_mirror = [], [], []

    def logits(image: np.ndarray) -> np.ndarray:
        pixels = (image.astype(np.float64) - MEAN) / STD
        with torch.no_grad():
            return model(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()))[0].numpy()

    for image, label in zip(images, labels, strict=True):
        values = logits(image)
        losses.append(np.log(np.exp(values - values.max()).sum()) + values.max() - values[label])
        guesses.append(int(values.argmax()))
        with_mirror.append(int((values + logits(image[:, ::-1])).argmax()))
    return {
        "loss": float(np.mean(losses)),
        "losses": losses,
        "guesses": guesses,
        "tta": with_mirror,
    }


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return _one_by_one(_model(), *_data())


@pytest.mark.parametrize("batch", [1, 4, 61, 500])
def test_a_plain_loop_finds_the_same(batch: int, truth: dict[str, Any]) -> None:
    labels = _data()[1]
    found = _evaluate(ALONE, batch)
    assert len(set(truth["guesses"])) >= 3
    assert found.images == COUNT
    assert found.correct == sum(g == t for g, t in zip(truth["guesses"], labels, strict=True))
    assert found.top1 == found.correct / COUNT
    assert found.correct_tta == sum(g == t for g, t in zip(truth["tta"], labels, strict=True))
    assert found.figures("abcde")["val/top1_tta"] == pytest.approx(found.correct_tta / COUNT)
    assert truth["tta"] != truth["guesses"]
    assert found.loss == pytest.approx(truth["loss"], rel=1e-5)


def test_confusion_and_per_class_are_scikit_learns(truth: dict[str, Any]) -> None:
    from sklearn.metrics import confusion_matrix, recall_score  # not in every rank: it takes 2 s

    labels, found = _data()[1], _evaluate(ALONE, 8)
    expected = confusion_matrix(labels, truth["guesses"], labels=range(CLASSES))
    assert np.array_equal(found.confusion.numpy(), expected)
    recall = recall_score(
        labels, truth["guesses"], labels=range(CLASSES), average=None, zero_division=0
    )
    figures = found.figures("abcde")
    shares = {key: value for key, value in figures.items() if key.startswith("val/per_class/")}
    # Not 0.0 for the absent one: nothing of it was mistaken.
    assert list(shares) == [f"val/per_class/{name}" for name in "abcd"]
    assert list(shares.values()) == pytest.approx(recall.tolist()[:-1])


def test_top5_and_balanced_accuracy_are_scikit_learns() -> None:
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    classes, count = 9, 200
    rng = np.random.default_rng(4)
    # A class is far more frequent than the others, and the last one is absent.
    labels = np.minimum(rng.integers(0, 24, count), classes - 2)
    images = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    model = resnet(ModelConfig(widths=[8, 8, 16]), classes, 3)
    statistics = Normalisation.of(MEAN, STD, SIDE, CPU)
    loader = ArrayLoader(images, labels, 32)
    evaluate = Evaluator(loader, np.arange(count), statistics, torch.float32, False, ALONE, classes)
    found = evaluate(model)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        logits = model.double().eval()((pixels - mean) / std).numpy()
    wanted = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    names = [f"c{k}" for k in range(classes)]
    figures = found.figures(names)
    assert figures["val/top5"] == pytest.approx(wanted)
    assert found.top1 < wanted < 1
    balanced = balanced_accuracy_score(labels, logits.argmax(1))
    assert figures["val/balanced"] == pytest.approx(balanced)
    assert figures["val/balanced"] != pytest.approx(found.top1, abs=0.01)
    assert "val/per_class/c7" in figures
    assert "val/per_class/c8" not in figures
    assert "val/top5" not in _evaluate(ALONE, 8).figures("abcde")  # always 1 of five classes


def test_precision_recall_and_f1_are_scikit_learns(truth: dict[str, Any]) -> None:
    from sklearn.metrics import precision_recall_fscore_support as scores

    labels, guesses = _data()[1], truth["guesses"]
    found = _evaluate(ALONE, 8)
    expected = scores(labels, guesses, labels=range(CLASSES), average=None, zero_division=0)
    for score, *wanted in zip(found.class_scores(), *expected, strict=True):
        assert [score.precision, score.recall, score.f1] == pytest.approx(wanted[:3])
        assert score.images == wanted[3]
    # As scikit-learn: over the classes that occur as truth or as prediction.
    precision, recall, f1, _ = scores(labels, guesses, average="macro", zero_division=0)
    figures = found.figures("abcde")
    assert figures["val/precision_macro"] == pytest.approx(precision)
    assert figures["val/recall_macro"] == pytest.approx(recall)
    assert figures["val/f1_macro"] == pytest.approx(f1)
    assert len({precision, recall, f1, figures["val/balanced"]}) >= 3


@pytest.mark.parametrize("guessed", [0, 4])  # the last class has no image: a prediction only
def test_macro_means_leave_out_what_does_not_occur(guessed: int) -> None:
    from sklearn.metrics import f1_score

    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    confusion[0, 0], confusion[1, 1], confusion[1, guessed] = 3, 2, 4
    rows, columns = confusion.nonzero().repeat_interleave(
        confusion[confusion > 0], dim=0
    ).unbind(1)  # fmt: skip
    found = Evaluation(0.0, 5, 9, None, confusion, 9)
    wanted = f1_score(rows, columns, average="macro", zero_division=0)
    assert found.figures("abcde")["val/f1_macro"] == pytest.approx(wanted)


def test_without_mirror_images() -> None:
    found = _evaluate(ALONE, 8, tta=False)
    assert found.correct_tta is None
    assert "val/top1_tta" not in found.figures("abcde")
    assert found.correct == _evaluate(ALONE, 8).correct


def test_only_the_given_indices_count(truth: dict[str, Any]) -> None:
    images, labels = _data()
    chosen = np.array([3, 60, 11, 30, 2])
    evaluator = Evaluator(
        ArrayLoader(images, labels, 2), chosen, Normalisation.of(MEAN, STD, SIDE, CPU),
        torch.float32, False, ALONE, CLASSES,
    )  # fmt: skip
    found = evaluator(_model())
    assert found.images == 5
    assert found.correct == sum(truth["guesses"][i] == labels[i] for i in chosen)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    images, labels = _data()
    model = _model().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator = Evaluator(
        ArrayLoader(images, labels, 8), np.arange(COUNT),
        Normalisation.of(MEAN, STD, SIDE, CPU), torch.float32, False, ALONE, CLASSES,
    )  # fmt: skip
    first, second = evaluator(model), evaluator(model)
    assert model.training is training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert first.loss == second.loss


@pytest.mark.parametrize("wanted", [3, 500])
def test_the_worst_mistakes_are_those_of_a_plain_loop(wanted: int, truth: dict[str, Any]) -> None:
    labels, found = _data()[1], _evaluate(ALONE, 8, mistakes=wanted)
    wrong = [i for i in range(COUNT) if truth["guesses"][i] != labels[i]]
    expected = sorted(wrong, key=lambda i: -truth["losses"][i])[:wanted]
    worst = found.mistakes
    assert worst is not None
    assert worst.positions.tolist() == expected
    assert worst.labels == [labels[i] for i in expected]
    assert worst.guesses == [truth["guesses"][i] for i in expected]
    assert worst.losses == pytest.approx([truth["losses"][i] for i in expected], rel=1e-4)
    alone = _evaluate(ALONE, 8)
    assert (found.loss, found.correct, alone.mistakes) == (alone.loss, alone.correct, None)


def test_images_of_places_in_the_evaluated_set() -> None:
    images, labels = _data()
    evaluator = Evaluator(
        ArrayLoader(images, labels, 2), np.array([7, 3, 60, 11]),
        Normalisation.of(MEAN, STD, SIDE, CPU), torch.float32, False, ALONE, CLASSES,
    )  # fmt: skip
    assert np.array_equal(evaluator.images(np.array([2, 0, 3])).numpy(), images[[60, 7, 11]])
    assert len(evaluator.images(np.array([], dtype=np.int64))) == 0


def _mistakes_on_ranks(world: World) -> list[tuple[Any, ...]]:
    found = []
    for batch in (4, 61):
        e = _evaluate(world, batch, mistakes=10)
        assert e.mistakes is not None
        worst = e.mistakes
        found.append((e.loss, worst.positions.tolist(), worst.losses, worst.guesses))
    return found


def test_the_same_mistakes_on_any_number_of_ranks() -> None:
    alone = _mistakes_on_ranks(ALONE)
    assert run_ranks(2, _mistakes_on_ranks) == [alone, alone]


def _on_ranks(world: World) -> list[tuple[Any, ...]]:
    """(loss, correct, images, mirrored, confusion) of several shapes; 61 images in one batch leave
    all ranks but one without work."""
    found = []
    for batch, count in ((4, 61), (61, 61), (7, 61), (4, 1)):
        e = _evaluate(world, batch, count)
        found.append((e.loss, e.correct, e.images, e.correct_tta, e.confusion.tolist()))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_figures_on_any_number_of_ranks(ranks: int) -> None:
    alone = _on_ranks(ALONE)
    for result in run_ranks(ranks, _on_ranks):
        for one, other in zip(alone, result, strict=True):
            assert one == other  # the loss too, to its last bit


@pytest.mark.parametrize("kind", ["ffcv", "resident"])
def test_real_loaders_give_what_the_arrays_give(
    kind: str, tiny: Dataset, tiny_images: ImageSet
) -> None:
    model, found = _model(), []
    for loader in (
        open_loader(kind, tiny.test_path, 4, CPU),
        ArrayLoader(tiny_images.test.images, tiny_images.test.labels, 4),
    ):
        evaluator = Evaluator(
            loader, np.arange(29), Normalisation.of(tiny.mean, tiny.std, 12, CPU),
            torch.float32, False, ALONE, CLASSES,
        )  # fmt: skip
        found.append(evaluator(model))
    assert found[0].loss == found[1].loss
    assert torch.equal(found[0].confusion, found[1].confusion)


def test_cudnn_computes_alike_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever training has chosen: the best checkpoint and an early end follow from figures."""
    cudnn, seen = torch.backends.cudnn, list[tuple[bool, bool]]()
    monkeypatch.setattr(cudnn, "benchmark", True)
    model = _model()
    model.register_forward_hook(lambda *_: seen.append((cudnn.benchmark, cudnn.deterministic)))
    images, labels = _data()
    Evaluator(
        ArrayLoader(images, labels, 16), np.arange(COUNT), Normalisation.of(MEAN, STD, SIDE, CPU),
        torch.float32, False, ALONE, CLASSES,
    )(model)  # fmt: skip
    assert set(seen) == {(False, True)}
    assert cudnn.benchmark
