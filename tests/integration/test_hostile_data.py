"""What no data set, image, model or folder should be: one line and exit code 2, or it just works.

A row is a command as a user types it: {here} is a fresh folder, {run} a training that has ended, on
classes whose names no locale likes. Rows run in this process, as `run_command` would call them; an
exception that is no user's mistake fails the row.
"""

import io
import json
import os
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_resnet import evaluate, export, predict
from dist_resnet.base import terminal
from dist_resnet.base.errors import DistResnetError, UserError
from dist_resnet.data import prepare
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.sources import members
from dist_resnet.report import __main__ as report
from tests.helpers.jobs import ROOT, run_job
from tests.helpers.wandb_readback import read_run

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare.main,
    "predict": predict.main,
    "export": export.main,
    "report": report.main,
    "evaluate": evaluate.main,
}
LATIN = os.fsdecode(b"caf\xe9")  # no UTF-8
CLASSES = (LATIN, "line\nbreak", "Ä", "d", "e", "f")
SHOWN = ("caf\\xe9", "line\\nbreak", "Ä", "d", "e", "f")
FOLDER = "prepare folder --train {here}/train --test {here}/test --output {here}/data --name x"

Maker = Callable[[Path], object]


@dataclass(frozen=True)
class Row:
    """One hostile situation."""

    name: str
    command: str
    make: Maker | None = None
    words: tuple[str, ...] = ()
    """Of standard error; where code is 0, of everything shown."""
    code: int = 2


def _image(path: Path, shade: int = 100, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 50, 200 - shade)).save(path)
    return path


def _set(here: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> None:
    for split in ("train", "test"):
        for k, name in enumerate(classes):
            for i in range(count):
                _image(here / split / name / f"{i}.png", 20 * k + i)


def _with(*changes: Maker) -> Maker:
    """A small set in {here}, changed."""

    def make(here: Path) -> None:
        _set(here)
        for change in changes:
            change(here)

    return make


def _text(name: str, content: bytes = b"no image") -> Maker:
    def make(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


def _folder(name: str) -> Maker:
    return lambda here: (here / name).mkdir(parents=True)


def _link(name: str, target: str) -> Maker:
    def make(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).symlink_to(target.format(here=here))

    return make


def _fifo(name: str) -> Maker:
    return lambda here: os.mkfifo(here / name)


def _gone(name: str) -> Maker:
    return lambda here: shutil.rmtree(here / name)


def _deep(name: str, largest: int) -> Maker:
    """A greyscale PNG of 16 bits with values up to `largest`."""
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    return lambda here: Image.fromarray(values).save(here / name)


def _deep_colour(name: str) -> Maker:
    """A colour PNG of 16 bits whose values end at 4095, written by hand: Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + np.full(24, 4095, ">u2").tobytes() for _ in range(8))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return _text(name, png)


def _sparse(name: str) -> Maker:
    def make(here: Path) -> None:
        with (here / name).open("wb") as file:
            file.truncate(1 << 40)

    return make


def _tar(*infos: tarfile.TarInfo) -> Maker:
    """train.tar and test.tar of the set, with these members in front."""

    def make(here: Path) -> None:
        _set(here)
        for split in ("train", "test"):
            with tarfile.open(here / f"{split}.tar", "w") as tar:
                for info in infos:
                    tar.addfile(info, io.BytesIO(bytes(info.size)))
                tar.add(here / split, ".")

    return make


def _member(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "nowhere"
    return info


def _run_folder(**files: str) -> Maker:
    """A run folder {here}/r with these files; metrics.jsonl is a good row if it is not given."""
    row = '{"step": 5, "epoch": 1, "seconds": 3, "val/top1": 0.5, "gap/top1": 0.1, "train/lr": 0.1}'

    def make(here: Path) -> None:
        (here / "r").mkdir()
        for name, content in ({"metrics_jsonl": row + "\n"} | files).items():
            (here / "r" / name.replace("_", ".")).write_bytes(content.encode("latin-1"))

    return make


TARS = FOLDER.replace("/train ", "/train.tar ").replace("/test ", "/test.tar ")
SKIP = f"{FOLDER} --skip-damaged"
BROKEN = (_text("train/cat/x.png"), _text("train/dog/y.png"))

PREPARE = [
    Row("all damaged files are named", FOLDER, _with(*BROKEN),
        ("2 damaged images", "cat/x.png", "dog/y.png")),
    Row("more are damaged than allowed", f"{SKIP} 1", _with(*BROKEN),
        ("2 damaged", "--skip-damaged 2, not 1")),
    Row("as many are damaged as allowed", f"{SKIP} 2", _with(*BROKEN), ("left out 2 damaged",), 0),
    Row("damaged ones are left out", SKIP, _with(*BROKEN), ("4 training and 4 test images",), 0),
    Row("damaged files in both sets are named", FOLDER,
        _with(_text("train/cat/x.png"), _text("test/dog/y.png")),
        ("2 damaged images", "cat/x.png", "dog/y.png", "--skip-damaged 1")),
    Row("all test images are damaged", f"{SKIP} 9", lambda here: (
            _set(here), *(_text(f"test/{c}/{i}.png")(here) for c in ("cat", "dog") for i in (0, 1))
        ), ("test", "has no images")),
    Row("a limit below zero", f"{SKIP} -1", _with(), ("--skip-damaged -1",)),
    Row("hidden dangling link", FOLDER, _with(_link("train/cat/.#0.png", "nowhere")), code=0),
    Row("hidden pipe", FOLDER, _with(_fifo("train/cat/.p.png"), _fifo("test/.p")), code=0),
    Row("notebook's folder", FOLDER, _with(_text("train/.ipynb_checkpoints/a.png")), code=0),
    Row("macOS's forks", FOLDER, _with(_text("train/cat/._0.png")), code=0),
    *(
        Row(f"{name} is no class", FOLDER, _with(_text(f"train/{name}/x.png")),
            ("2 classes: cat, dog",), 0)
        for name in ("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "__pycache__")
    ),
    Row("Thumbs.db is no image", FOLDER, _with(_text("test/cat/Thumbs.db")), code=0),
    Row("pipe that calls itself an image", FOLDER, _with(_fifo("test/cat/p.png")),
        ("test/cat/p.png", "not a regular file")),
    Row("dangling link", FOLDER, _with(_link("train/cat/2.png", "nowhere")), ("train/cat/2.png",)),
    Row("loop of links", FOLDER, _with(_link("train/cat/loop", "{here}/train")), ("loop",)),
    Row("image of a terabyte", FOLDER, _with(_sparse("train/cat/2.png")), ("train/cat/2.png",)),
    Row("no test images of a class", FOLDER, _with(_gone("test/cat")),
        ("only in", "cat", "--allow-missing")),
    Row("none, and that is meant", f"{FOLDER} --allow-missing", _with(_gone("test/cat")), code=0),
    Row("empty test class", FOLDER, _with(_gone("test/cat"), _folder("test/cat")),
        ("class folder cat", "--allow-missing")),
    Row("empty, and that is meant", f"{FOLDER} --allow-missing",
        _with(_gone("test/cat"), _folder("test/cat")), code=0),
    Row("class of test images alone", f"{FOLDER} --allow-missing", _with(_gone("train/cat")),
        ("only in", "cat")),
    Row("empty training class", f"{FOLDER} --allow-missing", _with(_folder("train/cow")),
        ("class folder cow", "has no images")),
    Row("class that is no UTF-8", FOLDER, lambda here: _set(here, CLASSES), SHOWN, 0),
    Row("file that is no UTF-8", FOLDER, _with(_text(f"train/cat/{LATIN}.png")), ("caf\\xe9.png",)),
    Row("skipped file with a line break", FOLDER, _with(_text("train/cat/a\nb")), ("a\\nb",), 0),
    Row("12 bits in 16", FOLDER, _with(_deep("train/cat/2.png", 4095)),
        ("warning", "above 4,095", "--bits 12"), 0),
    Row("8 bits in 16", FOLDER, _with(_deep("train/cat/2.png", 255)), ("--bits 8",), 0),
    Row("12 bits in 16 bits of colour", FOLDER, _with(_deep_colour("test/cat/2.png")),
        ("warning", "above 4,095"), 0),
    Row("colour has no --bits", f"{FOLDER} --bits 12", _with(_deep_colour("test/cat/2.png")),
        ("cat/2.png", "16-bit colour")),
    Row("more bits than said", f"{FOLDER} --bits 8", _with(_deep("train/cat/2.png", 4095)),
        ("cat/2.png", "4095", "--bits 8")),
    Row("seven bits", f"{FOLDER} --bits 7", _with(), ("--bits 7", "8 and 16")),
    Row("two sizes", FOLDER, lambda here: (_set(here), _image(here / "train/cat/9.png", 1, (9, 8))),
        ("cat/9.png", "9x8", "--resize")),
    Row("--fit without --resize", f"{FOLDER} --fit crop", _with(), ("--fit crop", "--resize")),
    Row("unknown --fit", f"{FOLDER} --fit squeeze", _with(), ("squeeze",)),
    Row("data set over a file", FOLDER, _with(_text("data")), ("data",)),
    Row("data set in a folder that is none", FOLDER.replace("{here}/data", "/dev/null/data"),
        _with(), ("/dev/null",)),
    Row("data set below /proc", FOLDER.replace("{here}/data", "/proc/data"), _with(), ("/proc",)),
    Row("home of nobody", FOLDER.replace("{here}/train", "~no-such-user/t"), _with(),
        ("~no-such-user/t",)),
    Row("archive with a link", TARS, _tar(_member("cat/l.png", tarfile.SYMTYPE)), ("cat/l.png",)),
    Row("archive with a hidden link", TARS, _tar(_member("cat/.l.png", tarfile.SYMTYPE)), code=0),
    Row("archive with a hidden pipe", TARS, _tar(_member("./.p", tarfile.FIFOTYPE)), code=0),
    Row("archive that leads out", TARS, _tar(_member("../.l.png", tarfile.REGTYPE)),
        ("leads out",)),
    Row("archive with macOS's folder", TARS, _tar(_member("__MACOSX/a.png", tarfile.REGTYPE, 9)),
        ("2 classes: cat, dog",), 0),
    Row("text called .tar", TARS, _with(_text("train.tar"), _text("test.tar")), ("train.tar",)),
]  # fmt: skip

SHARDS = "prepare webdataset {here}/train.tar --test {here}/test.tar --output {here}/data --name x"


def _shards(*damaged: str) -> Maker:
    """train.tar and test.tar, each of four images a class, some of which are none."""

    def make(here: Path) -> None:
        image = _image(here / "image.png").read_bytes()
        for split in ("train", "test"):
            with tarfile.open(here / f"{split}.tar", "w") as tar:
                for key in (f"{split}{i}" for i in range(8)):
                    content = b"no image" if key in damaged else image
                    for end, data in (("png", content), ("cls", b"ab"[int(key[-1]) % 2 :][:1])):
                        info = tarfile.TarInfo(f"{key}.{end}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))

    return make


STREAMS = [
    Row("all damaged items are named", SHARDS, _shards("train1", "train3", "test2"),
        ("3 damaged images", "item 1 of train", "item 3 of train", "item 2 of test",
         "--skip-damaged 2")),
    Row("no item of a class is whole", SHARDS, _shards(*(f"train{i}" for i in (0, 2, 4, 6))),
        ("4 damaged images", "item 6 of train")),
    Row("more items are damaged than allowed", f"{SHARDS} --skip-damaged 1",
        _shards("train1", "train3"), ("2 damaged", "--skip-damaged 2, not 1")),
    Row("damaged items are left out", f"{SHARDS} --skip-damaged", _shards("train1", "test2"),
        ("left out 1 damaged images of webdataset=", "7 training and 7 test images"), 0),
    Row("all items are damaged", f"{SHARDS} --skip-damaged",
        _shards(*(f"train{i}" for i in range(8))), ("gives no images for 'train'",)),
    Row("a limit below zero for items", f"{SHARDS} --skip-damaged -1", _shards(),
        ("--skip-damaged -1",)),
]  # fmt: skip

IMAGES = "predict {run} {here}"
PREDICT = [
    Row("hidden fork", IMAGES, _with(_text("._1.png")), code=0),
    Row("notebook's folder", IMAGES, _with(_text(".ipynb_checkpoints/a.png")), code=0),
    Row("locked lost+found", IMAGES, _with(_folder("lost+found")), code=0),
    Row("linked folder", "predict {run} {here}/links",
        _with(_folder("links"), _link("links/there", "{here}/train")),
        ("links/there/cat/0.png",), 0),
    Row("empty folder", IMAGES, None, ("has no images",)),
    Row("folder of text", IMAGES, _text("a.txt"), ("has no images", "1 other files")),
    Row("pipe in a folder", IMAGES, _with(_fifo("p.png")), ("p.png", "not a regular file")),
    Row("dangling link in a folder", IMAGES, _with(_link("p.png", "nowhere")), ("p.png",)),
    Row("loop of links", IMAGES, _with(_link("loop", "{here}")), ("loop",)),
    Row("damaged file that is no UTF-8", IMAGES, _with(_text(f"{LATIN}.png")), ("caf\\xe9.png",)),
    Row("image that is no UTF-8", IMAGES, lambda here: _image(here / f"{LATIN}.png"),
        ("caf\\xe9.png",), 0),
    Row("image with a line break", "predict {run} {here}/a\nb.png".replace("\n", "%0A"),
        lambda here: _image(here / "a\nb.png"), ("a\\nb.png",), 0),
    Row("device without end", "predict {run} /dev/zero", None, ("/dev/zero", "bytes")),
    Row("null device", "predict {run} /dev/null", None, ("/dev/null",)),
    Row("12 bits in 16", IMAGES, _with(_deep("d.png", 4095)), ("warning", "--bits 12"), 0),
    Row("--bits 99", f"{IMAGES} --bits 99", _with(), ("--bits 99",)),
    Row("floating point", IMAGES, lambda here: Image.new("F", (8, 8)).save(here / "f.tif"),
        ("f.tif", "floating-point")),
    Row("an image twice", "predict {run} {here}/a.png {here}/a.png",
        lambda here: _image(here / "a.png"), ("a.png",), 0),
    Row("one pixel", IMAGES, lambda here: _image(here / "a.png", 1, (1, 1)), code=0),
    Row("a line of pixels", IMAGES, lambda here: _image(here / "a.png", 1, (9000, 1)), code=0),
    Row("no classes shown", f"{IMAGES} --top 0", _with(), ("--top 0",)),
    Row("words for a number", f"{IMAGES} --top many", _with(), ("many",)),
    Row("no image named", "predict {run}", None, ("IMAGE_OR_FOLDER",)),
    Row("no such run", "predict {here}/none {here}", _with(), ("none",)),
    Row("a folder that is no run", "predict {here} {here}", _with(), ("no checkpoint",)),
    Row("a model of nothing", "predict {here}/a.pt {here}",
        lambda here: torch.save({"format": 1}, here / "a.pt"), ("a.pt", "lacks")),
    Row("a model that is text", "predict {here}/a.pt {here}", _with(_text("a.pt")), ("a.pt",)),
]  # fmt: skip

EXPORT = "export {run} --format safetensors --output {here}/out"
EXPORTS = [
    Row("onto a file", EXPORT, _text("out"), ("out", "--output")),
    Row("below a file", EXPORT.replace("/out", "/a/out"), _text("a"), ("a/out", "--output")),
    Row("where nothing can be", EXPORT.replace("{here}", "/proc"), None, ("/proc/out",)),
    Row("a folder in the model's place", EXPORT, _folder("out/model.safetensors"),
        ("model.safetensors",)),
    Row("unknown format", EXPORT.replace("safetensors", "tflite"), None, ("tflite",)),
    Row("best of a file", EXPORT.replace("{run}", "{here}/a.pt") + " --checkpoint best",
        _text("a.pt"), ("a.pt", "best")),
    Row("best of a run that has none", EXPORT.replace("{run}", "{here}/r") + " --checkpoint best",
        _run_folder(), ("no best checkpoint",)),
    Row("unknown checkpoint", f"{EXPORT} --checkpoint last", None, ("last",)),
    Row("images that are no data set", f"{EXPORT} --images {{here}}", None, ("no data set",)),
    Row("no model", EXPORT.replace("{run}", "{here}/none"), None, ("none",)),
]  # fmt: skip

REPORT = "report {here}/r --text"
REPORTS = [
    Row("no such run", REPORT, None, ("no such run folder",)),
    Row("a file", REPORT, _text("r"), ("no such run folder",)),
    Row("an empty folder", REPORT, _folder("r"), ("not a run folder",)),
    Row("metrics that are none", REPORT, _run_folder(metrics_jsonl='[]\n3\n"x"\n{}\n\x00\n'),
        ("no metrics yet",)),
    Row("epochs that are no numbers", REPORT,
        _run_folder(metrics_jsonl='{"step": 1, "epoch": "x"}\n{"step": null, "epoch": []}\n'),
        ("no metrics yet",)),
    Row("an infinite epoch", REPORT,
        _run_folder(metrics_jsonl='{"step": 1, "epoch": Infinity, "val/top1": NaN}\n'), code=0),
    Row("numbers without end", REPORT,
        _run_folder(metrics_jsonl='{"step": 1, "epoch": 1, "val/top1": %s}\n' % ("9" * 400),
                    summary_json='{"step": %s, "val/per_class/a": 1e300}' % ("9" * 400)),
        code=0),
    Row("an evaluation without its epoch", "report {here}/r --output {here}/r.html",
        _run_folder(metrics_jsonl='{"step": 1, "epoch": 1}\n{"val/top1": 1, "gap/top1": 1}\n'),
        code=0),
    Row("files that are no UTF-8", REPORT,
        _run_folder(config_yaml="a: \xe9", plan_json="\xe9", status_json='{"state": "\xe9"}'),
        code=0),
    Row("files of other shapes", REPORT,
        _run_folder(plan_json="[1]", status_json="7", summary_json='"x"', config_yaml="[1]"),
        code=0),
    Row("a summary of other kinds", REPORT,
        _run_folder(summary_json='{"diagnosis": 3, "step": [], "val/per_class/a": {}}'), code=0),
    Row("findings of other kinds", REPORT, _run_folder(summary_json='{"diagnosis": [{}, 3]}'),
        code=0),
    Row("a plan of other kinds", REPORT, _run_folder(plan_json='{"total_steps": {"a": 1}}'),
        code=0),
    Row("a page of other kinds", "report {here}/r --output {here}/r.html",
        _run_folder(summary_json='{"diagnosis": [3], "val/per_class/a": [], "versions": 3}',
                    plan_json='{"a": {"b": [null]}}', status_json='{"state": {}, "reason": []}'),
        code=0),
    Row("a page onto a folder", "report {here}/r --output {here}", _run_folder(), ("is a folder",)),
    Row("a page below a file", "report {here}/r --output {here}/r/metrics.jsonl/p", _run_folder(),
        ("cannot be written",)),
    Row("a run twice", "report {here}/r {here}/r", _run_folder(), ("named twice",)),
]  # fmt: skip

EVALUATIONS = [
    Row(
        "figures onto a folder",
        "evaluate {run} --json {here} data.root={data}",
        None,
        ("is a folder",),
    ),
    Row("no data set", "evaluate {run} data.root={here}", None, ("no data set",)),
    Row(
        "another data set",
        "evaluate {run} data.root={here}/data",
        lambda here: _prepared(here),
        ("classes",),
    ),
]


def _prepared(here: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> None:
    """The set, and {here}/data/x of it."""
    _set(here, classes, count)
    words = FOLDER.split()[1:]
    assert prepare.main([word.replace("{here}", str(here)) for word in words]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on classes of hostile names, with a W&B record on disk."""
    here = tmp_path_factory.mktemp("my data")
    _prepared(here, CLASSES, 8)
    keys = [
        f"run.dir={here}", "run.name=job", f"data.root={here}/data", "data.dataset=x",
        "train.max_steps=3", "data.batch_size_per_replica=4", "model.widths=[4,4,4]",
        "wandb.mode=offline", "wandb.media_every_epochs=1", "parallel.threads=1",
        "parallel.device=cpu", "augment.crop_padding=1",
    ]  # fmt: skip
    outcome = run_job(0, keys, here)
    assert outcome.code == 0, outcome.output
    (record,) = (here / "job" / "wandb").glob("offline-run-*")
    assert read_run(record).exit_code == 0
    return here / "job"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_FILE_BYTES", 1 << 20)


def _call(arguments: list[str]) -> int:
    """As `run_command` does, without leaving the process."""
    terminal.open_standard_streams()
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except DistResnetError as error:
        print(f"dist_resnet: {error}", file=sys.stderr)
        return error.exit_code


def _arguments(row: Row, here: Path, run: Path) -> list[str]:
    places = {"{here}": str(here), "{run}": str(run), "{data}": str(run.parent / "data")}
    words = row.command.split()
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    return [word.replace("%0A", "\n") for word in words]


@pytest.mark.parametrize(
    "row",
    [*PREPARE, *STREAMS, *PREDICT, *EXPORTS, *REPORTS, *EVALUATIONS],
    ids=lambda row: f"{row.command.split()[0]}: {row.name}",
)
def test_one_line_or_it_works(
    row: Row, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if row.make is not None:
        row.make(tmp_path)
    capsys.readouterr()
    code = _call(_arguments(row, tmp_path, run))
    out, err = capsys.readouterr()
    assert code == row.code, out + err
    errors = [line for line in err.splitlines() if line.startswith("dist_resnet: ")]
    errors = [line for line in errors if "warning" not in line]
    if row.code:
        assert len(errors) == 1, err
        assert err.splitlines()[-1] in errors
        shown = " ".join(errors)
    else:
        assert errors == []
        shown = out + err
    for word in row.words:
        assert word in shown


def _process(arguments: list[str], before: str = "", **environment: str) -> tuple[int, str, str]:
    """A command of its own, after the shell's `before`; exit code and what it shows."""
    module, *rest = arguments
    shell = f'{before} exec "$0" "$@"'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, "-m", f"dist_resnet.{module}", *rest],
        cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=240,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def test_an_ascii_terminal_shows_everything_in_ascii(run: Path) -> None:
    code, out, err = _process(["report", str(run), "--text"], PYTHONIOENCODING="ascii")
    assert code == 0, err
    assert "#" in out  # bars
    assert "caf\\xe9" in out
    assert out.isascii()


def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """torch.export.save aborts the process where it cannot write."""
    words = ["export", str(run), "--format", "torch_export", "--output", str(tmp_path)]
    code, out, err = _process(words, "ulimit -f 8;")
    assert (code, out) == (2, ""), err
    assert "cannot be written" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_does_not_undo_a_preparation(tmp_path: Path) -> None:
    _set(tmp_path)
    words = [word.replace("{here}", str(tmp_path)) for word in FOLDER.split()]
    words[0] = "data.prepare"
    shell = 'set -o pipefail; "$0" "$@" 2>&1 | head -c 1 >/dev/null'
    command = ["bash", "-c", shell, sys.executable, "-m", f"dist_resnet.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, b"")
    Dataset.load(tmp_path / "data" / "x")


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_what_is_written_obeys_the_umask(run: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        arguments = [str(run), "--format", "safetensors", "--output", str(tmp_path / "out")]
        assert export.main(arguments) == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes) == {"model.safetensors", "README.md"}
    assert set(modes.values()) == {0o666 & ~mask}


def test_names_that_no_locale_likes_reach_every_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.open_standard_streams()
    data = run.parent / "data" / "x"
    assert set(Dataset.load(data).classes) == set(SHOWN)
    assert predict.main([str(run), str(run.parent / "test"), "--json", "--top", "6"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {top["class"] for top in rows[0]["top"]} == set(SHOWN)
    assert len(rows) == 48
    page = tmp_path / f"{LATIN}.html"
    assert report.main([str(run), "--output", str(page)]) == 0
    text = page.read_bytes().decode("utf-8")
    assert all(name in text for name in SHOWN)
    assert "Worst mistakes" in text
    out = tmp_path / "out"
    assert export.main([str(run), "--format", "onnx", "--output", str(out)]) == 0
    assert all(name in (out / "README.md").read_text("utf-8") for name in SHOWN)
    assert evaluate.main([str(run), "--json", str(out / "f.json"), f"data.root={data.parent}"]) == 0
    figures = json.loads((out / "f.json").read_text("utf-8"))
    assert {f"val/per_class/{name}" for name in SHOWN} <= figures.keys()


def test_the_home_folder_needs_no_shell(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    monkeypatch.chdir(tmp_path)
    words = FOLDER.replace("{here}", "~").replace("~/data", "~/other").split()
    assert prepare.main(words[1:]) == 0
    assert predict.main(["~/job", "~/test"]) == 0
    assert export.main(["~/job", "--format=safetensors", "--output=~/out"]) == 0
    assert report.main(["~/job", "--output=~/page.html"]) == 0
    assert evaluate.main(["~/job", "data.root=~/data", "--json", "~/f.json"]) == 0
    made = {"other/x/train.beton", "out/model.safetensors", "page.html", "f.json"}
    assert all((run.parent / name).exists() for name in made)
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_shown_can_be_copied(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "my data" / "x y"
    shutil.copytree(run.parent / "data" / "x", copy)
    words = shlex.split(Dataset.load(copy).prepare_command)
    assert words[words.index("--output") + 1] == str(copy.parent)
    assert words[words.index("--name") + 1] == "x y"
    with pytest.raises(UserError) as caught:
        prepare.prepare_builtin("mine", tmp_path / "my data")
    shown = str(caught.value).split("prepare it: ")[1]
    assert str(tmp_path / "my data") in shlex.split(shown)


def test_an_image_above_pillow_s_limit_is_read_where_it_is_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _set(tmp_path)
    _image(tmp_path / "train/cat/0.png", 77, (60, 50))
    words = [word.replace("{here}", str(tmp_path)) for word in FOLDER.split()[1:]]
    assert prepare.main(words) == 2
    assert "--resize N" in capsys.readouterr().err.splitlines()[-1]
    assert prepare.main([*words, "--resize", "8"]) == 0
    images = read_back(tmp_path / "data/x/train.beton").images
    assert images[0][0, 0].tolist() == [77, 50, 123]
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert predict.main([str(run), str(tmp_path / "train/cat/0.png")]) == 0
