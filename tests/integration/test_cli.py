"""The commands as users type them: exit codes, one line for an error, the run folder's contents."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import ROOT, metric_rows, run_job

CLOSED_NETWORK = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}


def call(
    module: str, *arguments: str, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output of one command."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    return result.returncode, result.stdout + result.stderr


def forked(folder: Path, *arguments: str, module: str = "dist_resnet.train") -> tuple[int, str]:
    """As `call`, in a process that need not import torch."""
    outcome = run_job(0, list(arguments), folder, module=module)
    return outcome.code, outcome.output


def refused(output: tuple[int, str], *texts: str) -> None:
    code, text = output
    lines = text.strip().splitlines()
    assert code == 2, text
    assert "Traceback" not in text
    assert lines[-1].startswith("dist_resnet: "), text
    assert len([line for line in lines if line.startswith("dist_resnet: ")]) == 1
    for part in texts:
        assert part in lines[-1]


def test_help_and_print_config_train_nothing(tmp_path: Path) -> None:
    code, text = call("dist_resnet.train", "--help")
    assert code == 0
    assert "optim.lr_scaling" in text
    code, text = call(
        "dist_resnet.train", "configs/resnet20.yaml", "--print-config", f"data.root={tmp_path}"
    )
    assert code == 0
    assert "total_steps: 234300" in text  # 150 epochs of 50,000 // 32 steps
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr=1", "did you mean optim.lr?"]),
        ("optim.lr=fast", ["optim.lr=fast", "float"]),
        ("data.batch_size_per_replica=0", ["data.batch_size_per_replica=0", "at least 1"]),
        ("model.name=resnet21", ["model.name=resnet21", "resnet20"]),
        ("nothing.yaml", ["nothing.yaml", "no such"]),
        ("--lr=1", ["--lr=1", "key=value"]),
    ],
)
def test_wrong_configuration(argument: str, parts: list[str]) -> None:
    refused(call("dist_resnet.train", argument), *parts)


def test_missing_dataset_without_network(tmp_path: Path) -> None:
    began = time.monotonic()
    arguments = [f"data.root={tmp_path / 'data'}", f"run.dir={tmp_path}"]
    output = call("dist_resnet.train", *arguments, environment=CLOSED_NETWORK)
    assert time.monotonic() - began < 100
    refused(output, "cifar10")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".cifar10.lock"}
    refused(call("dist_resnet.train", *arguments, "data.dataset=mine"), "'mine'", "prepare folder")


@pytest.mark.parametrize("damage", ["half", "text", "empty", "flipped bit"])
def test_damaged_beton(tmp_path: Path, digits: Dataset, damage: str) -> None:
    folder = tmp_path / "data" / "digits"
    shutil.copytree(digits.folder, folder)
    beton = folder / "train.beton"
    content = bytearray(beton.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "text":
        content = bytearray(b"these are not images\n" * 1000)
    elif damage == "empty":
        content = bytearray()
    else:
        content[len(content) // 3] ^= 4
    beton.write_bytes(content)
    arguments = ["data.dataset=digits", f"data.root={folder.parent}", f"run.dir={tmp_path}"]
    refused(forked(tmp_path, *arguments), "train.beton", "data.prepare digits")


def test_smaller_than_one_batch(tmp_path: Path, tiny: Dataset) -> None:
    arguments = ["data.dataset=tiny", f"data.root={tiny.folder.parent}", f"run.dir={tmp_path}"]
    size = "data.batch_size_per_replica=54"
    refused(forked(tmp_path, *arguments, size), size, "53")


def test_val_split_larger_than_the_set(tmp_path: Path, tiny: Dataset) -> None:
    arguments = ["data.dataset=tiny", f"data.root={tiny.folder.parent}", f"run.dir={tmp_path}"]
    refused(forked(tmp_path, *arguments, "data.val_split=53"), "data.val_split=53")


def test_class_weights_of_other_classes_begin_no_run(tmp_path: Path, tiny: Dataset) -> None:
    arguments = ["data.dataset=tiny", f"data.root={tiny.folder.parent}", f"run.dir={tmp_path}"]
    weights = "optim.class_weights=[1,2]", "run.name=job", "wandb.mode=offline"
    refused(forked(tmp_path, *arguments, *weights), "2 numbers", "5 classes: class0")
    assert {path.name for path in (tmp_path / "job").iterdir()} <= {"status.json", ".lock", "lock"}


def test_a_training_leaves_the_run_folder_of_the_contract(tmp_path: Path, digits: Dataset) -> None:
    keys = [
        str(ROOT / "configs" / "digits.yaml"),
        f"data.root={digits.folder.parent}",
        f"run.dir={tmp_path}",
        "run.name=job",
        "train.epochs=2",
        "parallel.threads=1",
    ]
    first = run_job(2, keys, tmp_path)
    assert first.code == 0, first.output
    run = tmp_path / "job"
    names = {path.name for path in run.iterdir()}
    wanted = {"config.yaml", "plan.json", "metrics.jsonl", "status.json", "summary.json", "wandb"}
    assert wanted | {"checkpoints"} <= names
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(list((run / "checkpoints").glob("best-*.pt"))) == 1
    assert json.loads((run / "status.json").read_text())["state"] == "done"

    summary, rows = json.loads((run / "summary.json").read_text()), metric_rows(run)
    last = rows[-1]
    assert summary["val/top1"] == last["val/top1"]
    assert summary["val/images"] == 360
    assert summary["train/top1"] - summary["val/top1"] == pytest.approx(last["gap/top1"])
    assert (summary["world_size"], summary["parameters"]) == (2, 272_474)
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == sorted(set(steps))

    again = run_job(2, keys, tmp_path)
    assert again.code == 0
    assert "complete already" in again.output
    changed = run_job(0, [*keys, "optim.lr=0.1"], tmp_path)
    assert changed.code == 2
    assert "optim.lr: 0.05 -> 0.1" in changed.output

    figures = []
    for ranks in (0, 3):
        file = tmp_path / f"{ranks}.json"
        job = run_job(ranks, [str(run), "--json", str(file)], tmp_path, 100, "dist_resnet.evaluate")
        assert job.code == 0, job.output
        figures.append(json.loads(file.read_text()))
    for figure in figures:
        assert figure["correct"] == figures[0]["correct"] == round(summary["val/top1"] * 360)
        assert figure["images"] == 360
        assert figure["val/loss"] == pytest.approx(summary["val/loss"], abs=1e-5)


def test_evaluate_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    def evaluated(path: Path) -> tuple[int, str]:
        return forked(tmp_path, str(path), module="dist_resnet.evaluate")

    (tmp_path / "text.pt").write_text("not a checkpoint")
    refused(evaluated(tmp_path / "text.pt"), "text.pt")
    refused(evaluated(tmp_path / "none.pt"), "none.pt")
    refused(evaluated(tmp_path), "no checkpoint")
