"""Data sets of one's own in whole trainings: prepared, killed, continued, on more ranks, in use."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dist_resnet
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.weights import find_weights
from tests.helpers.jobs import HELD, differences, kill_tree, launch_held, run_job, wait_for_step
from tests.integration.test_cli import refused

# A bright bar for each class, and noise: learnt in a few steps.
SHAPES = """
    import numpy as np

    def make(split, height, width, *colours):
        random = np.random.default_rng(len(split))
        for number in range(400 if split == "train" else 60):
            # One class is four times as frequent as each of the others.
            label = max(0, int(random.integers(0, 7)) - 3)
            image = random.integers(0, 128, (height, width, *colours), np.uint8)
            image[label * height // 4 : (label + 1) * height // 4] += 100
            yield image, label

    def grey(split):
        return make(split, 28, 28)

    def wide(split):
        return ((image, "ABCD"[label]) for image, label in make(split, 20, 24, 3))

    def broken(split):
        yield from make(split, 8, 8)
        raise RuntimeError("out of film")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which own_shapes.py lies."""
    (tmp_path / "own_shapes.py").write_text(textwrap.dedent(SHAPES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _keys(folder: Path, name: str, source: str, *more: str) -> list[str]:
    return [
        "data.root=data", f"run.dir={folder}", f"run.name={name}", f"data.dataset=my_{source}",
        f"data.source=own_shapes:{source}", "wandb.mode=disabled", "precision.dtype=fp32",
        "parallel.replicas=2", "parallel.reduction=exact", "model.widths=[8,8,16]",
        "data.loader=resident",
        "train.epochs=6", "log.every_steps=5", "data.batch_size_per_replica=16",
        "augment.flip=false", "augment.crop_padding=1", "model.dropout=0", "optim.lr=0.1",
        *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_grey_images_of_28_pixels_train_exactly_everywhere(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "data.normalisation=imagenet", "optim.class_weights=balanced", "checkpoint.every_steps=5"
    whole = run_job(0, _keys(folder, "whole", "grey", *more), folder)
    assert whole.code == 0, whole.output
    dataset = Dataset.load(folder / "data" / "my_grey")
    assert (dataset.height, dataset.width, dataset.source) == (28, 28, "source own_shapes:grey")

    job = launch_held(0, _keys(folder, "killed", "grey", *more), folder / "held.log")
    wait_for_step(folder / "killed", HELD - 2, job, 100)
    kill_tree(job)
    again = run_job(2, _keys(folder, "killed", "grey", *more), folder)
    assert again.code == 0, again.output
    assert "continued at step" in again.output
    assert differences(folder / "whole", folder / "killed") == []

    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["val/top1"] > 0.5
    assert summary["val/f1_macro"] > 0.4
    saved = find_weights(folder / "whole")[1]
    assert saved.mean == pytest.approx([0.485 * 255, 0.456 * 255, 0.406 * 255])
    _is_used(folder, dataset, summary, capsys)
    plain = run_job(0, _keys(folder, "plain", "grey", *more[1:]), folder)
    assert plain.code == 0, plain.output
    assert "model" in " ".join(differences(folder / "whole", folder / "plain"))


def _is_used(
    folder: Path, dataset: Dataset, summary: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """By evaluate, load and predict, under the normalisation that it was trained under."""
    from dist_resnet import evaluate, predict

    run = str(folder / "whole")
    assert evaluate.main([run, "--json", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["val/f1_macro"] == pytest.approx(summary["val/f1_macro"])
    scores = figures["classes"].values()
    assert sum(score["images"] for score in scores) == 60
    assert np.mean([score["f1"] for score in scores]) == pytest.approx(figures["val/f1_macro"])
    with pytest.raises(
        dist_resnet.base.errors.UserError, match="normalisation: is the model's own"
    ):
        evaluate.main([run, "data.normalisation=dataset"])
    test = read_back(dataset.test_path)
    images = torch.from_numpy(test.images[:]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        guesses = dist_resnet.load(run)(images).argmax(1)
    assert int((guesses == torch.from_numpy(test.labels)).sum()) == figures["correct"]
    Image.fromarray(test.images[0][..., 0]).save("one.png")
    capsys.readouterr()
    assert predict.main([run, "one.png", "--json", "--top", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["top"][0]["class"] == str(int(guesses[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "ranks"), [("ffcv", 2), ("resident", 0)])
def test_images_that_are_no_squares_train_too(folder: Path, loader: str, ranks: int) -> None:
    more = f"data.loader={loader}", "augment.cutout=6", "data.val_split=50"
    done = run_job(ranks, _keys(folder, "wide", "wide", *more), folder)
    assert done.code == 0, done.output
    assert find_weights(folder / "wide")[1].image_size == [20, 24]
    summary = json.loads((folder / "wide" / "summary.json").read_text())
    assert summary["val/top1"] > 0.4
    assert {f"val/per_class/{name}" for name in "ABCD"} <= summary.keys()


@pytest.mark.slow
def test_a_source_that_fails_is_one_line_on_every_number_of_ranks(folder: Path) -> None:
    for ranks in (0, 2):
        done = run_job(ranks, _keys(folder, f"broken{ranks}", "broken"), folder)
        assert (
            "own_shapes:broken, item 400 of train: raised RuntimeError: out of film" in done.output
        )
        assert "own_shapes.py:21)" in done.output
        status = json.loads((folder / f"broken{ranks}" / "status.json").read_text())
        assert status["exit_code"] == 2
        if ranks == 0:
            refused((done.code, done.output.rpartition("reading")[2]), "out of film")
    assert not (folder / "data" / "my_broken").exists()


@pytest.mark.slow
def test_another_source_s_data_are_refused(folder: Path, tiny: Dataset) -> None:
    keys = ["data.source=own_shapes:grey", "data.dataset=tiny", f"data.root={tiny.folder.parent}"]
    done = run_job(0, [*keys, f"run.dir={folder}"], folder)
    refused((done.code, done.output), "data.source=own_shapes:grey", "was prepared from synthetic")
