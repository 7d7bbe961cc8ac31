"""Each augmentation in a short real training: in one go, and ended in mid-epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.base.randomness import alternate, turn_keys
from dist_resnet.config.load import load_config
from dist_resnet.data.dataset import Dataset
from dist_resnet.train import main
from dist_resnet.training.gallery import choices_at
from tests.helpers.jobs import differences, metric_rows

EACH = {
    "recipe": [],
    "reflect": ["augment.padding_mode=reflect"],
    "alternating": ["augment.flip=alternating"],
    "trivial": ["augment.trivial=true"],
    "jitter": ["augment.jitter=0.5"],
    "erasing": ["augment.erasing=0.9"],
    "cutmix": ["augment.mix=cutmix"],
    "both": ["augment.mix=both"],
    "built-in extra": ["augment.extra=[{name: jitter, args: {contrast: 0.9}}]"],
    "own": ["augment.extra=[{name: 'own_shades:shade', args: {depth: 0.5}}]"],
    "all, two replicas": [
        "augment.padding_mode=reflect", "augment.flip=alternating", "augment.trivial=true",
        "augment.jitter=0.5", "augment.erasing=0.9", "augment.mix=both", "augment.cutout=3",
        "parallel.replicas=2", "data.batch_size_per_replica=4",
    ],
}  # fmt: skip
# Those that follow the epoch, draw for the batch, or are all there is.
CONTINUED = ("alternating", "both", "own", "all, two replicas")
OWN = """
def shade(images, draws, depth):
    return images * (1 - depth * draws[:, :1, None, None])
shade.lanes = 1
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The loop's signal handlers stay with the process.
    monkeypatch.setattr("dist_resnet.base.signals.install", lambda: None)
    monkeypatch.setattr("dist_resnet.base.signals.defer", lambda: None)
    (tmp_path / "own_shades.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def _train(folder: Path, tiny: Dataset, *settings: str) -> Path:
    """Three epochs of six steps."""
    common = [
        f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}", f"run.dir={folder}",
        "run.name=job", "model.widths=[4,4,4]", "log.every_steps=1", "parallel.device=cpu",
        "data.batch_size_per_replica=8", "wandb.mode=disabled", "parallel.threads=1",
        "train.epochs=3", "data.loader=resident",
    ]  # fmt: skip
    assert main([*common, *settings]) == 0
    return folder / "job"


@pytest.fixture(scope="module")
def seen() -> dict[str, list[float]]:
    """Losses by name."""
    return {}


@pytest.mark.parametrize("name", list(EACH))
def test_a_training_goes_on_in_mid_epoch_with_the_same_bits(
    name: str, tmp_path: Path, tiny: Dataset, seen: dict[str, list[float]]
) -> None:
    keys = EACH[name]
    whole = _train(tmp_path / "whole", tiny, *keys)
    losses = [row["train/loss"] for row in metric_rows(whole) if "train/loss" in row]
    assert len(losses) == 18
    assert losses not in seen.values()  # it does something
    seen[name] = losses
    if name not in CONTINUED:
        return
    for steps in (9, 18):
        parts = _train(tmp_path / "parts", tiny, *keys, f"train.max_steps={steps}")
    # The first part was evaluated where it ended, too, which may have been its best.
    different = {entry for entry in differences(whole, parts) if not entry.startswith("best")}
    assert different <= {"metrics.jsonl"}
    assert losses == [row["train/loss"] for row in metric_rows(parts) if "train/loss" in row]


def test_flips_alternate_by_the_epochs_of_the_run(
    tmp_path: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step, and in what shows its images."""
    made = []

    def recorded(*arguments: Any) -> torch.Tensor:
        made.append(turn_keys(*arguments))
        return made[-1]

    monkeypatch.setattr("dist_resnet.step.train_step.turn_keys", recorded)
    keys = ["augment.flip=alternating", "data.val_split=5", "seed=3"]
    run = _train(tmp_path, tiny, *keys, "train.max_steps=2")
    (turns,) = made
    assert torch.equal(turns, turn_keys(3, 18, 6))
    config = load_config([str(run / "config.yaml")])
    samples = torch.arange(8)
    for step in (5, 6):
        shown = choices_at(config, tiny, step, samples).flip
        assert shown is not None
        assert torch.equal(shown, alternate(turns[step], samples))


def test_the_trial_comes_before_the_first_step(tmp_path: Path, tiny: Dataset) -> None:
    (tmp_path / "own_halves.py").write_text("def half(images, draws):\n    return images[::2]\n")
    with pytest.raises(UserError, match=r"augment.extra=own_halves:half: .*shape"):
        _train(tmp_path / "run", tiny, "augment.extra=['own_halves:half']")
    assert not list((tmp_path / "run").rglob("*.pt"))
