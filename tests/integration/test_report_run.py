"""Diagnosis and report of a real run: what is computed from its checkpoint and its dataset."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.base.randomness import below, epoch_order, sample_lanes, step_keys
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.evaluate import evaluate_checkpoint
from dist_resnet.report.__main__ import main
from dist_resnet.report.examples import Examples, find_examples
from dist_resnet.runs.diagnosis import diagnose
from dist_resnet.tracking.jsonl import read_rows
from tests.helpers.jobs import Outcome, run_job
from tests.helpers.report_page import Page

PADDING, BATCH = 2, 32


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> tuple[Path, Outcome]:
    """A run of 20 steps of the recipe's mixup and crop, and what it printed."""
    folder = tmp_path_factory.mktemp("report")
    keys = [
        f"run.dir={folder}", "run.name=job", f"data.root={digits.folder.parent}",
        "data.dataset=digits", "data.loader=resident", "model.widths=[8,10,12]", "train.epochs=1",
        "train.max_steps=20",
        f"augment.crop_padding={PADDING}", "augment.flip=false", "augment.mixup_alpha=1.0",
        "wandb.mode=disabled", "precision.dtype=fp32", "parallel.threads=1", "parallel.replicas=2",
    ]  # fmt: skip
    outcome = run_job(0, keys, folder)
    assert outcome.code == 0, outcome.output
    return folder / "job", outcome


@pytest.fixture(scope="module")
def found(job: tuple[Path, Outcome]) -> Iterator[Examples]:
    threads = torch.get_num_threads()
    yield find_examples(job[0])
    torch.set_num_threads(threads)


def test_the_diagnosis_is_in_the_summary_and_on_the_console(job: tuple[Path, Outcome]) -> None:
    run, outcome = job
    summary = json.loads((run / "summary.json").read_text())
    assert summary["diagnosis"] == diagnose(read_rows(run / "metrics.jsonl"))
    assert summary["diagnosis"][0]["name"] == "generalisation gap"
    for finding in summary["diagnosis"]:
        assert f"{finding['name']}: {finding['text']}\n" in outcome.output


def test_the_confusion_matrix_is_that_of_an_evaluation(
    job: tuple[Path, Outcome], found: Examples, digits: Dataset
) -> None:
    figures = evaluate_checkpoint(job[0], [])
    assert found.confusion.tolist() == figures["confusion"]
    summary = json.loads((job[0] / "summary.json").read_text())
    assert found.confusion.diagonal().sum() / found.confusion.sum() == summary["val/top1"]
    assert (found.step, found.classes) == (20, digits.classes)


def test_the_worst_mistakes_are_wrong_and_sorted(found: Examples, digits: Dataset) -> None:
    test = read_back(digits.test_path)
    losses = [mistake.loss for mistake in found.mistakes]
    wrong = found.confusion.sum() - found.confusion.diagonal().sum()
    assert len(losses) == min(24, wrong)
    assert losses == sorted(losses, reverse=True)
    for mistake in found.mistakes:
        assert mistake.truth != mistake.predicted
        same = (test.images[:] == mistake.pixels).all(axis=(1, 2, 3))
        assert digits.classes.index(mistake.truth) in test.labels[same]


def test_augmented_samples_are_what_the_last_step_was_given(
    found: Examples, digits: Dataset
) -> None:
    """Image by image: crop by slicing, mixup by the formula, from the epoch's order."""
    train, step = read_back(digits.train_path), 19
    order = epoch_order(0, 0, len(train)).numpy()
    first = order[step * 2 * BATCH : step * 2 * BATCH + BATCH]  # replica 0 of two
    draws = sample_lanes(step_keys(0, 20)[step], torch.from_numpy(first), 7)
    top, left = (below(draws[:, lane], 2 * PADDING + 1).tolist() for lane in (0, 1))
    partner = torch.argsort(draws[:, 5], stable=True).tolist()
    margin = ((PADDING, PADDING), (PADDING, PADDING), (0, 0))
    cropped = [
        np.pad(train.images[i], margin)[t : t + 32, x : x + 32].astype(float)
        for i, t, x in zip(first, top, left, strict=True)
    ]
    lam = found.augmented.lam
    assert lam is not None
    assert found.augmented.step == step
    assert len(found.augmented.pixels) == len(found.augmented.labels) == 24
    for i, pixels in enumerate(found.augmented.pixels):
        expected = lam * cropped[i] + (1 - lam) * cropped[partner[i]]
        assert np.abs(expected - pixels).max() <= 0.51  # rounded
        names = [digits.classes[train.labels[first[k]]] for k in (i, partner[i])]
        assert found.augmented.labels[i] == f"{lam:.2f} {names[0]} + {1 - lam:.2f} {names[1]}"


def test_the_page_shows_them(job: tuple[Path, Outcome], found: Examples, tmp_path: Path) -> None:
    assert main([str(job[0]), "--output", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(found.mistakes) + 24
    assert all(str(attrs["src"]).startswith("data:image/png;base64,") for attrs in images)
    matrix = page.table("Images by true class")
    shown = [[int(str(cell.value)) for cell in row[1:]] for row in matrix.rows[1:]]
    assert shown == found.confusion.tolist()
    assert (tmp_path / "r.html").stat().st_size < 500_000


def test_without_the_dataset_or_with_another_the_section_says_so(
    job: tuple[Path, Outcome], tiny: Dataset, tmp_path: Path
) -> None:
    run = tmp_path / "job"
    shutil.copytree(job[0], run)
    (checkpoint,) = (run / "checkpoints").glob("step-*.pt")
    (best,) = (run / "checkpoints").glob("best-*.pt")
    best.unlink()
    saved = torch.load(checkpoint, weights_only=True)
    for name, root, reason in (
        ("digits", tmp_path, "there is no dataset"),
        ("tiny", tiny.folder.parent, "is not the dataset of this run"),
    ):
        saved["config"]["data"] |= {"dataset": name, "root": str(root)}
        torch.save(saved, run / "checkpoints" / "other.pt")
        with pytest.raises(UserError, match=reason):
            find_examples(run / "checkpoints" / "other.pt")
    checkpoint.unlink()
    assert main([str(run), "--output", str(tmp_path / "r.html")]) == 0
    notes = Page((tmp_path / "r.html").read_text()).texts["p"]
    assert any(note.startswith("Not shown: ") and "no checkpoint" in note for note in notes)
