"""A net in a file beside the configuration: trained, killed and continued, evaluated, exported."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dist_resnet
from dist_resnet.base.errors import UserError
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import (
    HELD,
    differences,
    final_state,
    kill_tree,
    launch_held,
    run_job,
    wait_for_step,
)

STEPS = 20
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3),
        )
        self.last = nn.Linear(4 * width, num_classes)
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        if self.training:
            self.images = self.images + len(images)
        return self.last(self.layers(images))


def pair(num_classes):
    class Pair(Net):
        def forward(self, images):
            return super().forward(images), images

    return Pair(num_classes)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder, with the net's file."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "net_of_mine.py").write_text(NET)
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path, str(place)])


def settings(digits: Dataset, name: str, *extra: str) -> list[str]:
    return [
        "run.dir=runs",
        f"run.name={name}",
        f"data.root={digits.folder.parent}",
        "data.dataset=digits",
        "model.name=net_of_mine:Net",
        "model.args={width: 10}",
        "parallel.replicas=2",
        "parallel.reduction=exact",
        "data.batch_size_per_replica=16",
        f"train.max_steps={STEPS}",
        "train.ema_decay=0.9",
        "checkpoint.every_steps=5",
        "log.every_steps=5",
        "wandb.mode=disabled",
        "precision.dtype=fp32",
        "data.loader=resident",
        *extra,
    ]


@pytest.fixture(scope="module")
def whole(place: Path, digits: Dataset) -> Path:
    """Undisturbed, by one process."""
    before = Path.cwd()
    os.chdir(place)
    try:
        outcome = run_job(0, settings(digits, "whole"), place)
    finally:
        os.chdir(before)
    assert outcome.code == 0, outcome.output
    said = "a process's 2 replicas one after the other: it draws random numbers"
    assert said in outcome.output
    return place / "runs" / "whole"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_at_a_step_and_continued_it_ends_bit_for_bit_as_one_process(
    place: Path, whole: Path, digits: Dataset, ranks: int
) -> None:
    keys = settings(digits, f"killed-{ranks}")
    run = place / "runs" / f"killed-{ranks}"
    job = launch_held(ranks, keys, place / f"held-{ranks}.log")
    wait_for_step(run, HELD - HELD % 5, job, 120)
    kill_tree(job)
    assert not (run / "summary.json").exists()
    outcome = run_job(ranks, keys, place)
    assert outcome.code == 0, outcome.output
    assert "continued at step" in outcome.output
    assert differences(whole, run) == []
    assert int(final_state(run)["model.images."]) == STEPS * 16


def test_it_is_evaluated_loaded_exported_and_predicts(
    place: Path, whole: Path, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_resnet import evaluate, export, predict

    summary = json.loads((whole / "summary.json").read_text())
    assert evaluate.main([str(whole), "--json", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["val/top1"] == summary["val/top1"]

    test = read_back(digits.test_path)
    images = torch.from_numpy(np.array(test.images)).permute(0, 3, 1, 2) / 255
    model = dist_resnet.load(whole)
    with torch.inference_mode():
        guesses = model(images).argmax(1)
    assert int((guesses == torch.from_numpy(np.array(test.labels))).sum()) == figures["correct"]

    for kind in ("safetensors", "onnx", "torch_export"):
        assert export.main([str(whole), "--format", kind, "--output", "exported"]) == 0
    Image.fromarray(test.images[0]).save("image.png")
    capsys.readouterr()
    assert predict.main([str(whole), "image.png", "--json", "--top", "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["top"][0]["class"] == digits.classes[int(guesses[0])]


def test_a_net_that_cannot_be_exported_is_one_line(whole: Path) -> None:
    import net_of_mine

    from dist_resnet import export

    original = net_of_mine.Net.forward

    def fixed(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return original(self, images.reshape(len(images), 3, 32, 32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net_of_mine.Net, "forward", fixed)
        for kind in ("onnx", "torch_export"):
            with pytest.raises(UserError, match=f"^--format {kind}: this net cannot be") as caught:
                export.main([str(whole), "--format", kind, "--output", "not"])
            assert "\n" not in str(caught.value)
            assert not Path("not", "model.onnx").exists()


def test_where_its_file_is_not_there_is_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_job(0, [str(whole)], tmp_path, module="dist_resnet.evaluate")
    assert outcome.code == 2
    assert outcome.output.startswith("dist_resnet: model.name=net_of_mine:Net: there is no module")
    assert len(outcome.output.splitlines()) == 1


def test_its_weights_start_another_run_with_other_classes(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    from dist_resnet.config.load import load_config
    from dist_resnet.step.state import build_state
    from dist_resnet.training.starting import read_start

    pairs = [
        "model.name=net_of_mine:Net",
        "model.args={width: 10}",
        f"model.init={whole}",
        "optim.freeze=[layers.*]",
    ]
    config = load_config(pairs)
    start = read_start(config, "")
    device = torch.device("cpu")
    state = build_state(config, 3, torch.float32, device, (8, 8), start)
    assert state.told.endswith("; last is new, for 3 classes")
    ema = {k.removeprefix("ema."): v for k, v in final_state(whole).items() if k[:4] == "ema."}
    own = state.flat.model.state_dict()
    assert torch.equal(own["layers.0.weight"], ema["layers.0.weight."])
    assert own["last.weight"].shape == (3, 40)
    assert [n for n, _ in state.flat.named_parameters()] == ["last.weight", "last.bias"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2])
def test_a_run_that_started_from_a_file_goes_on_without_it(
    place: Path, whole: Path, digits: Dataset, tmp_path: Path, ranks: int
) -> None:
    from dist_resnet import export

    assert export.main([str(whole), "--format", "safetensors", "--output", str(tmp_path)]) == 0
    weights = tmp_path / "model.safetensors"
    keys = settings(digits, f"tuned-{ranks}", f"model.init={weights}")
    run = place / "runs" / f"tuned-{ranks}"
    begun = run_job(ranks, [*keys, "train.max_steps=5"], place)
    assert begun.code == 0, begun.output
    assert f"starting weights: {weights} (SHA-256 " in begun.output
    known = json.loads((run / "plan.json").read_text())["init"]
    weights.unlink()
    outcome = run_job(ranks, keys, place)
    assert outcome.code == 0, outcome.output
    assert json.loads((run / "plan.json").read_text())["init"] == known
    other = run_job(0, [*keys, f"model.init={whole}"], place)
    assert other.code == 2
    assert "model.init" in other.output.splitlines()[-1]


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_net_that_gives_a_tuple_is_one_line_on_all_ranks(
    place: Path, digits: Dataset, ranks: int
) -> None:
    keys = settings(digits, f"pair-{ranks}", "model.name=net_of_mine:pair", "model.args={}")
    outcome = run_job(ranks, keys, place)
    lines = [line for line in outcome.output.splitlines() if line.startswith("dist_resnet: ")]
    assert outcome.code == (1 if ranks else 2)  # torchrun's own is 1
    assert len(lines) == 1
    assert "forward gives a tuple" in lines[0]
    assert "dist_resnet/" not in outcome.output.replace(str(place), "")
