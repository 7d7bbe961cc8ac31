"""A trained model in use: load, predict, export."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import dist_resnet
from dist_resnet import evaluate, export, predict
from dist_resnet.base.errors import UserError
from dist_resnet.config.load import stored_config
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.checkpoint import read_checkpoint
from dist_resnet.runs.exported import read_tensors
from dist_resnet.runs.weights import find_weights
from dist_resnet.step.state import weights_sha256
from tests.helpers.jobs import run_job


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """A run of 44 steps with a moving average of the weights."""
    folder = tmp_path_factory.mktemp("use")
    keys = [
        f"run.dir={folder}",
        "run.name=job",
        f"data.root={digits.folder.parent}",
        "data.dataset=digits",
        "train.epochs=1",
        "train.ema_decay=0.9",
        "augment.flip=false",
        "data.loader=resident",
        "wandb.mode=disabled",
        "precision.dtype=fp32",
        "parallel.threads=1",
    ]
    outcome = run_job(0, keys, folder)
    assert outcome.code == 0, outcome.output
    return folder / "job"


def test_load_gives_the_model_that_training_evaluated(run: Path, digits: Dataset) -> None:
    test = read_back(digits.test_path)
    model = dist_resnet.load(run)
    assert model.classes == digits.classes
    assert not model.training
    images = torch.from_numpy(np.array(test.images)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        logits = model(images)
    labels = torch.from_numpy(np.array(test.labels))
    summary = json.loads((run / "summary.json").read_text())
    assert int((logits.argmax(1) == labels).sum()) == round(summary["val/top1"] * 360)
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(summary["val/loss"], abs=1e-4)


def test_predict_agrees_with_load_and_goes_on_after_what_is_no_image(
    run: Path, digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = read_back(digits.test_path).images[:5]
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "text.png").write_text("no image")
    missing = str(tmp_path / "missing.png")
    assert predict.main([str(run), str(tmp_path), missing, "--json", "--top", "2"]) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 2
    assert "text.png" in errors[0]
    assert "missing.png" in errors[1]
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == [f"{index}.png" for index in range(5)]
    model = dist_resnet.load(run)
    batch = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        shares = model(batch).softmax(1)
    for row, share in zip(rows, shares, strict=True):
        best = int(share.argmax())
        assert row["top"][0]["class"] == model.classes[best]
        assert row["top"][0]["probability"] == pytest.approx(float(share[best]), abs=1e-5)
        assert len(row["top"]) == 2


def test_predict_reads_standard_input_and_resizes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.new("L", (70, 50), 128).save(buffer, "PNG")
    buffer.seek(0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(buffer))
    assert predict.main([str(run), "-", "--top", "1"]) == 0
    assert "%" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["safetensors", "onnx", "torch_export"])
def test_exported_files_give_the_checkpoint_s_logits(
    run: Path, digits: Dataset, tmp_path: Path, form: str
) -> None:
    arguments = [str(run), "--format", form, "--output", str(tmp_path)]
    assert export.main([*arguments, "--images", str(digits.folder)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    pixels = read_back(digits.test_path).images
    batch = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        wanted = dist_resnet.load(run)(batch)
    if form == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        feed = {session.get_inputs()[0].name: batch.numpy()}
        got = torch.from_numpy(session.run(None, feed)[0])
    elif form == "torch_export":
        got = torch.export.load(tmp_path / "model.pt2").module()(batch)
    else:
        got = dist_resnet.load(tmp_path / "model.safetensors")(batch)
    assert (wanted - got).abs().max() < 1e-4
    assert torch.equal(wanted.argmax(1), got.argmax(1))
    assert "README.md" in names
    card = (tmp_path / "README.md").read_text()
    assert ("dist_resnet.load" in card) == (form == "safetensors")
    assert not [name for name in names if name.startswith(".tmp")]


def test_an_exported_file_is_as_good_as_its_checkpoint(
    run: Path, digits: Dataset, tmp_path: Path
) -> None:
    assert _export(run, tmp_path / "one", "safetensors") == 0
    file = tmp_path / "one" / "model.safetensors"
    root = f"data.root={digits.folder.parent}"
    theirs, ours = (evaluate.evaluate_checkpoint(path, [root]) for path in (run, file))
    assert {**ours, "checkpoint": ""} == {**theirs, "checkpoint": ""}
    assert _export(file, tmp_path / "two", "safetensors") == 0
    one, two = (read_tensors(path) for path in (file, tmp_path / "two" / "model.safetensors"))
    assert weights_sha256(one[0].tensors) == weights_sha256(two[0].tensors)
    assert one[1] == two[1]
    assert dist_resnet.load(file).reading == dist_resnet.load(run).reading
    assert str(digits.folder.parent).encode() not in file.read_bytes()  # nor any other folder
    with pytest.raises(UserError, match=r"model\.init: is the model's own"):
        evaluate.evaluate_checkpoint(file, [root, "model.init=w.pt"])
    with pytest.raises(UserError, match="holds weights, not a training"):
        read_checkpoint(file)


def _said(**changed: object) -> dict[str, str]:
    facts = {"config": {"model": {"name": "resnet20"}}, "classes": ["a"], "step": 1}
    return {"dist_resnet": json.dumps(facts | changed)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds weights alone, and does not say of which net"),
        ({"dist_resnet": "[1]"}, "damaged: what it says of itself"),
        ({"dist_resnet": '{"step": 1}'}, "damaged: what it says of itself"),
        (_said(config=3), "damaged: what it says of itself"),
        (_said(classes=3), "damaged: its classes"),
        (_said(config={"model": {"name": "os:abort"}}), "names code, os:abort, which a file"),
    ],
)
def test_a_file_that_says_nothing_of_its_net(
    metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    file = tmp_path / "w.safetensors"
    save_file({"network.w": torch.zeros(2)}, file, metadata)
    with pytest.raises(UserError, match=message):
        dist_resnet.load(file)


def test_a_file_of_weights_names_no_code(run: Path, tmp_path: Path) -> None:
    """Whatever else its configuration holds is not read."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    own = dist_resnet.load(run)
    facts = json.loads(own.description["dist_resnet"])
    facts["config"]["data"] |= {"source": "os:abort", "root": "/elsewhere"}
    facts["classes"][0] = "\x1b[31mred"
    facts["config"] |= {"augment": {"extra": ["os:abort"]}, "optim": {"name": "os:abort"}}
    file = tmp_path / "w.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in own.state_dict().items()}
    save_file(tensors, file, {"dist_resnet": json.dumps(facts)})
    saved = find_weights(file)[1]
    assert saved.classes[0].isprintable()  # as of a checkpoint: it goes to a terminal
    config = stored_config(saved.config)
    assert (config.data.source, config.data.root) == (None, "data")
    assert (config.augment.extra, config.optim.name) == ([], "sgd")


def test_export_refuses_a_file_that_differs(run: Path) -> None:
    model = dist_resnet.load(run)
    with pytest.raises(UserError, match="differs"):
        export._compare(model, lambda images: model(images) + 0.01, torch.rand(8, 3, 32, 32))


def _export(run: Path, output: Path, form: str) -> int:
    return export.main([str(run), "--format", form, "--output", str(output)])


def test_formats_in_one_folder_share_a_card(run: Path, tmp_path: Path) -> None:
    for form in ("safetensors", "torch_export", "safetensors"):
        assert _export(run, tmp_path, form) == 0
    text = (tmp_path / "README.md").read_text()
    for name in ("model.safetensors", "model.pt2"):
        assert text.count(f"- `{name}`: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "model.safetensors", "model.pt2",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_export_overwrites_nothing_of_the_user_s(
    run: Path, tmp_path: Path, name: str, when: str
) -> None:
    if when == "between":
        assert _export(run, tmp_path, "safetensors") == 0
        with (tmp_path / name).open("ab") as file:
            file.write(b"mine")
    else:
        (tmp_path / name).write_text("mine")
    before = (tmp_path / name).read_bytes()
    for form in ("safetensors", "torch_export") if name == "README.md" else ("safetensors",):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            _export(run, tmp_path, form)
    assert (tmp_path / name).read_bytes() == before


def test_export_mixes_no_two_models_in_one_folder(run: Path, tmp_path: Path) -> None:
    def save(step: int) -> Path:
        (file,) = (run / "checkpoints").glob("step-*")
        saved = torch.load(file, weights_only=True)
        saved["state"]["ema"]["head.bias"] += step
        torch.save(saved, tmp_path / f"{step}.pt")
        return tmp_path / f"{step}.pt"

    output = tmp_path / "export"
    assert _export(save(1), output, "safetensors") == 0
    assert _export(save(2), output, "safetensors") == 0  # the newer one, in its place
    with pytest.raises(UserError, match="from another checkpoint"):
        _export(save(3), output, "torch_export")
    assert {path.name for path in output.iterdir()} == {"README.md", "model.safetensors"}


def _changed(run: Path, place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint of the run, changed, as place/step-00000001-<checksum>.pt."""
    (file,) = (run / "checkpoints").glob("step-*")
    saved = torch.load(file, weights_only=True)
    change(saved)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    path = place / f"step-00000001-{digest}.pt"
    path.write_bytes(buffer.getvalue())
    return path


def test_predict_reads_an_image_as_the_training_images_were_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (run / "checkpoints").glob("step-*")
    reading = torch.load(file, weights_only=True)["reading"]
    assert reading == {"fit": "stretch", "bits": 16}
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 4096, (32, 48), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")

    def shares(model: Path, *options: str) -> list[float]:
        assert predict.main([str(model), str(tmp_path / "deep.png"), "--json", *options]) == 0
        row = json.loads(capsys.readouterr().out)
        return [entry["probability"] for entry in row["top"]]

    def wanted(grey: np.ndarray) -> list[float]:
        image = Image.fromarray(grey.astype(np.uint8))
        sized = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
        batch = torch.from_numpy(sized.copy()).expand(1, 3, 32, 32) / 255
        with torch.inference_mode():
            return dist_resnet.load(run)(batch).softmax(1).sort(descending=True).values[0].tolist()

    model = _changed(run, tmp_path, lambda saved: saved.update(reading={"fit": "crop", "bits": 12}))
    middle = (deep >> 4)[:, 8:40]
    assert shares(model, "--top", "10") == pytest.approx(wanted(middle), abs=1e-5)
    old = _changed(run, tmp_path, lambda saved: saved.pop("reading"))
    assert shares(old, "--top", "10") == pytest.approx(wanted(deep >> 8), abs=1e-5)
    assert shares(old, "--top", "10", "--bits", "12") == pytest.approx(wanted(deep >> 4), abs=1e-5)
    bad = _changed(run, tmp_path, lambda saved: saved.update(reading={"fit": "squeeze"}))
    with pytest.raises(UserError, match=r"damaged: reading is .*squeeze"):
        dist_resnet.load(bad)


def test_the_best_checkpoint_is_exported_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def raise_bias(saved: dict[str, Any]) -> None:
        weights = saved["state"]["ema"] or saved["state"]["model"]
        weights["head.bias"] += 7

    shutil.copytree(run, tmp_path / "job")
    folder = tmp_path / "job" / "checkpoints"
    for path in folder.glob("best-*"):
        path.unlink()
    best = _changed(run, folder, raise_bias)
    best.rename(best.with_name(best.name.replace("step-", "best-")))
    biases = {}
    for checkpoint in ("newest", "best"):
        out = tmp_path / checkpoint
        arguments = [str(tmp_path / "job"), "--format", "safetensors", "--output", str(out)]
        assert export.main([*arguments, "--checkpoint", checkpoint]) == 0
        biases[checkpoint] = load_file(out / "model.safetensors")["network.head.bias"]
    assert torch.allclose(biases["best"], biases["newest"] + 7)
    loaded = dist_resnet.load(tmp_path / "job", checkpoint="best").state_dict()
    assert torch.equal(loaded["network.head.bias"], biases["best"])


def test_closed_standard_input_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert predict.main([str(run), "-"]) == 2
