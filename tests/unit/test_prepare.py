"""Preparing data sets: content and statistics, damage, kills, races, full disks, the commands."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.data import prepare as prepare_module
from dist_resnet.data.beton import read_back
from dist_resnet.data.content import channel_statistics, fingerprint
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.images import ImageSet, LazyImages, Split
from dist_resnet.data.prepare import main, prepare, prepare_builtin
from dist_resnet.data.sources import embedded, table
from dist_resnet.data.sources.embedded import load_synthetic

COMMAND = [sys.executable, "-m", "dist_resnet.data.prepare"]
LEFT_OVER = {".x.lock"}


def _images(seed: int = 0, train: int = 40) -> ImageSet:
    images = load_synthetic(train=train, test=10, classes=3, size=8, seed=seed)
    train_set, test_set = (Split(s.images[:], s.labels) for s in (images.train, images.test))
    return ImageSet(images.classes, train_set, test_set)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small prepared data set, alone in its directory."""
    prepare(_images(), tmp_path / "x", "synthetic", "x")
    return tmp_path / "x"


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_what_is_prepared_is_what_was_given(folder: Path) -> None:
    dataset, image_set = Dataset.load(folder), _images()
    assert _names(folder) == {"train.beton", "test.beton", "dataset.json"}
    assert _names(folder.parent) - LEFT_OVER == {"x"}
    assert (dataset.num_train, dataset.num_test) == (40, 10)
    assert (dataset.height, dataset.width) == (8, 8)
    assert (dataset.name, dataset.source) == ("x", "synthetic")
    assert dataset.classes == ("class0", "class1", "class2")
    for path, split in (
        (dataset.train_path, image_set.train),
        (dataset.test_path, image_set.test),
    ):
        found = read_back(path)
        np.testing.assert_array_equal(found.images, split.images)
        np.testing.assert_array_equal(found.labels, split.labels)
        facts = dataset.files[path.name]
        assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert facts["bytes"] == path.stat().st_size
    flat = image_set.train.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, flat.std(0), rtol=1e-12)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_statistics_by_hand() -> None:
    images = np.zeros((1, 1, 4, 3), np.uint8)
    images[0, 0, :, 0] = (0, 0, 255, 255)
    images[0, 0, :, 1] = (1, 2, 3, 4)
    images[0, 0, :, 2] = 7
    mean, std = channel_statistics(np.repeat(images, 2500, axis=0))
    assert mean == (127.5, 2.5, 7.0)
    assert std == (127.5, pytest.approx(1.25**0.5, rel=1e-15), 0.0)


def test_fingerprint_depends_on_content_alone() -> None:
    base = _images()
    assert fingerprint(base) == fingerprint(_images())
    assert len(fingerprint(base)) == 64
    pixels, labels = base.test.images.copy(), base.test.labels.copy()
    pixels[3, 2, 1, 0] ^= 1
    labels[3] = (labels[3] + 1) % 3
    variants = [
        ImageSet(base.classes, base.train, Split(pixels, base.test.labels)),
        ImageSet(base.classes, base.train, Split(base.test.images, labels)),
        ImageSet(("a", "b", "c"), base.train, base.test),
        ImageSet(base.classes, base.test, base.train),
        ImageSet(
            base.classes,
            Split(base.train.images.reshape(-1, 4, 16, 3), base.train.labels),
            Split(base.test.images.reshape(-1, 4, 16, 3), base.test.labels),
        ),
    ]
    assert len({fingerprint(variant) for variant in [base, *variants]}) == 6


def test_unusable_image_sets_are_refused(tmp_path: Path) -> None:
    good = _images()
    outside = Split(good.test.images, good.test.labels + 2)
    empty = Split(good.test.images[:0], good.test.labels[:0])
    other = Split(np.zeros((1, 9, 9, 3), np.uint8), np.zeros(1, np.int64))
    for test, word in ((outside, "label"), (empty, "no images"), (other, "size")):
        with pytest.raises(UserError, match=word):
            prepare(ImageSet(good.classes, good.train, test), tmp_path / "x", "s", "x")
    assert _names(tmp_path) == LEFT_OVER


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Dataset.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", ["train.beton", "test.beton"])
def test_damaged_files_are_found_and_mended(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    flipped = bytearray(content)
    flipped[1 << 21] ^= 1  # a pixel: nothing but the SHA-256 can tell
    for damaged in (content[: len(content) // 2], b"text", b"", bytes(flipped), content + b"x"):
        (folder / file).write_bytes(damaged)
        message = _refusal(folder)
        assert file in message
        assert f"prepare synthetic ... --output {folder.parent} --name x" in message
        Dataset.load(folder, verify=False)
    (folder / file).unlink()
    assert file in _refusal(folder)
    prepare(_images(), folder, "synthetic", "x")
    assert Dataset.load(folder).files[file]["sha256"] == hashlib.sha256(content).hexdigest()


def test_damaged_descriptions(folder: Path, tmp_path: Path) -> None:
    assert "no data set 'nothing'" in _refusal(tmp_path / "nothing")
    assert not Dataset.exists(tmp_path / "nothing")
    assert Dataset.exists(folder)
    path = folder / "dataset.json"
    good = json.loads(path.read_text())
    for text in ("", "{", "[]", "null", '"x"', "\0", path.read_text()[:-30]):
        path.write_text(text)
        assert "dataset.json" in _refusal(folder)
    path.write_bytes(b"\xff\xfe")
    assert "dataset.json" in _refusal(folder)
    for key, values in {
        "classes": [None, [], [1], "abc"],
        "num_train": [None, 0, -1, "5", True, 1.5, 1 << 50, 41],
        "height": [None, 9],
        "mean": [None, [1, 2], [1, 2, "x"], [1, 2, float("nan")], [1, 2, 256]],
        "files": [None, {}, {"train.beton": 3, "test.beton": 4}],
        "fingerprint": [None, 3],
    }.items():
        for value in values:
            path.write_text(json.dumps({**good, key: value}))
            assert "damaged" in _refusal(folder), (key, value)
        path.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        assert key in _refusal(folder)
    path.write_text(json.dumps({**good, "later": 1}))
    Dataset.load(folder)


def test_the_same_content_is_kept_and_other_content_replaces(folder: Path, capsys: Any) -> None:
    stamp = (folder / "train.beton").stat().st_ino
    prepare(_images(), folder, "synthetic", "x")
    assert "already prepared" in capsys.readouterr().out
    assert (folder / "train.beton").stat().st_ino == stamp
    old = Dataset.load(folder)
    old.check_not_replaced()
    with old.train_path.open("rb") as opened:
        new = prepare(_images(1), folder, "synthetic", "x")
        assert (
            hashlib.file_digest(opened, "sha256").hexdigest() == old.files["train.beton"]["sha256"]
        )
    assert new.fingerprint == fingerprint(_images(1)) == Dataset.load(folder).fingerprint
    with pytest.raises(UserError, match="replaced"):
        old.check_not_replaced()
    assert _names(folder.parent) - LEFT_OVER == {"x"}


@pytest.mark.parametrize("missing", [["flock"], ["flock", "lockf"]])
def test_without_atomic_exchange_and_without_locks(
    missing: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(prepare_module.ctypes, "CDLL", lambda _: object())
    for name in missing:
        monkeypatch.setattr(fcntl, name, no_locks)
    left = folder.parent / ".x.tmp-1"  # by one that was killed, or is at work: only a lock tells
    left.mkdir()
    prepare(_images(1), folder, "synthetic", "x")
    assert ("has no locks" in capsys.readouterr().err) == ("lockf" in missing)
    assert left.exists() == ("lockf" in missing)
    shutil.rmtree(left, ignore_errors=True)
    assert Dataset.load(folder).fingerprint == fingerprint(_images(1))
    assert _names(folder.parent) - LEFT_OVER == {"x"}


def test_a_symbolic_link_is_followed(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    prepare(_images(1), link, "synthetic", "link")
    assert link.is_symlink()
    assert Dataset.load(folder).fingerprint == fingerprint(_images(1))


def test_foreign_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("!")
    (tmp_path / "y").write_text("!")
    with pytest.raises(UserError, match="other files"):
        prepare(_images(), tmp_path / "x", "synthetic", "x")
    with pytest.raises(UserError, match="cannot prepare"):
        prepare(_images(), tmp_path / "y", "synthetic", "y")
    assert (tmp_path / "x" / "thesis.tex").read_text() == (tmp_path / "y").read_text() == "!"


def test_readers_never_see_a_mixture(folder: Path) -> None:
    expected = {fingerprint(_images(seed)) for seed in (0, 1)}
    seen: list[str | BaseException] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                seen.append(Dataset.load(folder).fingerprint)
            except BaseException as error:
                seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for round_ in range(8):
        prepare(_images((round_ + 1) % 2), folder, "synthetic", "x")
    over.set()
    reader.join()
    assert set(seen) == expected


def _start(output: Path, *options: str, program: Sequence[str] = COMMAND) -> subprocess.Popen[str]:
    command = [*program, "synthetic", "--output", str(output), "--name", "x", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Sends itself a signal in the midst of writing a file.
STRUCK = """
import os, runpy, sys
from dist_resnet.data import beton
file, number = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
inner = beton.progress
def progress(numbers, what, total):
    for sample in inner(numbers, what, total):
        if (what, sample) == (f"writing {file}", 2000):
            os.kill(os.getpid(), number)
        yield sample
beton.progress = progress
runpy.run_module("dist_resnet.data.prepare", run_name="__main__", alter_sys=True)
"""


def _struck(output: Path, file: str, number: signal.Signals, *options: str) -> tuple[int, str]:
    """How the command ends, and what it said."""
    program = [sys.executable, "-c", STRUCK, file, str(int(number))]
    sizes = ("--num-train", "3000", "--num-test", "3000")
    with _start(output, *sizes, *options, program=program) as process:
        _, err = process.communicate(timeout=240)
    return process.returncode, err


@pytest.mark.parametrize("stage", ["train.beton", "test.beton"])
def test_kill_nine_leaves_what_was_there(folder: Path, stage: str) -> None:
    code, err = _struck(folder.parent, stage, signal.SIGKILL, "--seed", "7")
    assert code == -signal.SIGKILL, err
    assert Dataset.load(folder).fingerprint == fingerprint(_images())
    stale = _names(folder.parent) - LEFT_OVER - {"x"}
    assert len(stale) == 1
    assert list(folder.parent.glob(f".x.tmp-*/built/{stage}"))
    prepare(_images(1), folder, "synthetic", "x")
    assert _names(folder.parent) - LEFT_OVER == {"x"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    code, err = _struck(tmp_path, "train.beton", number)
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert _names(tmp_path) == LEFT_OVER


def test_an_image_that_cannot_be_read_leaves_what_was_there(folder: Path) -> None:
    images = load_synthetic(train=3000, test=10, size=8)

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        if stop > 2000:
            raise OSError(errno.EIO, "Input/output error")
        return images.train.images[start:stop]

    broken = Split(LazyImages(3000, 8, 8, read), images.train.labels)
    with pytest.raises(UserError, match="nput/output error"):
        prepare(ImageSet(images.classes, broken, images.test), folder, "synthetic", "x")
    assert Dataset.load(folder).fingerprint == fingerprint(_images())
    assert _names(folder.parent) - LEFT_OVER == {"x"}


def test_two_at_once_with_different_content(tmp_path: Path) -> None:
    size = ("--num-train", "5000", "--num-test", "10")
    processes = [_start(tmp_path, *size, "--seed", str(seed)) for seed in (1, 2)]
    results = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    assert [code for *_, code in results] == [0, 0], results
    assert sum("waiting for another process" in err for _, err, _ in results) == 1
    dataset = Dataset.load(tmp_path / "x")
    possible = [load_synthetic(train=5000, test=10, seed=seed) for seed in (1, 2)]
    assert dataset.fingerprint in {fingerprint(image_set) for image_set in possible}
    assert _names(tmp_path) - LEFT_OVER == {"x"}


@pytest.fixture
def three_megabytes(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("number", [40, 100, 700, 3000])
def test_a_full_disk_is_one_line_and_leaves_nothing(three_megabytes: Path, number: int) -> None:
    filler = three_megabytes / "filler"
    filler.write_bytes(bytes((1 << 20) - 8192 if number == 40 else 0))
    with pytest.raises(UserError, match="no space left") as caught:
        prepare(load_synthetic(train=number, test=10), three_megabytes / "x", "s", "x")
    assert "\n" not in str(caught.value)
    assert _names(three_megabytes) == LEFT_OVER | {"filler"}


def test_a_full_disk_while_images_are_read(three_megabytes: Path, capsys: Any) -> None:
    (three_megabytes.parent / "set" / "class").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise[:1]).resize((1500, 1000)).save(three_megabytes.parent / "set/class/0.png")
    arguments = ["--train", "set", "--test", "set", "--output", str(three_megabytes)]
    with contextlib.chdir(three_megabytes.parent):
        assert main(["folder", *arguments]) == 2
    assert "no space left" in capsys.readouterr().err.splitlines()[-1]
    assert _names(three_megabytes) == {".folder.lock"}


def test_names_of_classes_become_text_also_of_older_sets(folder: Path) -> None:
    """They were kept as Python reads them from the disk: what no file can hold."""
    description = json.loads((folder / "dataset.json").read_text())
    description["classes"] = ["caf\udce9", "a\nb", "c"]
    del description["reading"]
    (folder / "dataset.json").write_text(json.dumps(description))
    dataset = Dataset.load(folder)
    assert dataset.classes == ("caf\\xe9", "a\\nb", "c")
    assert (dataset.reading.fit, dataset.reading.bits) == ("stretch", 16)


def test_builtin_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = prepare_builtin("digits", tmp_path)
    assert (digits.num_train, digits.num_test, digits.source) == (1437, 360, "digits")
    # A second time it is not even loaded; a damaged one is prepared anew.
    with monkeypatch.context() as patch:
        patch.setattr(table, "load_digits", lambda: pytest.fail("loaded again"))
        assert prepare_builtin("digits", tmp_path) == digits
    digits.test_path.write_bytes(b"")
    assert prepare_builtin("digits", tmp_path).fingerprint == digits.fingerprint
    Dataset.load(tmp_path / "digits")
    with pytest.raises(UserError, match=r"folder --train PATH .* --name mine"):
        prepare_builtin("mine", tmp_path)


def test_builtin_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://name.invalid/cifar.tar.gz")
    monkeypatch.setattr(embedded, "NETWORK_SECONDS", 2.0)
    with pytest.raises(UserError, match="cannot download"):
        prepare_builtin("cifar10", tmp_path)
    assert _names(tmp_path) == {".cifar10.lock"}


def test_the_command_on_folders(tmp_path: Path, capsys: Any) -> None:
    for split, number in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(number):
                shade = (10 * i, 100, 200 if name == "cat" else 0)
                Image.new("RGB", (5, 4), shade).save(tmp_path / split / name / f"{i}.png")
    arguments = ["folder", "--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    arguments += ["--output", str(tmp_path / "data"), "--name", "pets"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "8 training and 4 test images, 5x4" in out
    assert "2 classes: cat, dog" in out
    assert "mean 15.000, 100.000, 100.000" in out
    assert "std  11.180, 0.000, 100.000" in out
    assert Dataset.load(tmp_path / "data" / "pets").fingerprint in out
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "SOURCE"),
        (["imagenet"], "imagenet"),
        (["digits", "--nme", "x"], "--nme"),
        (["folder", "--train", "x"], "--test"),
        (["folder", "--train", "nowhere", "--test", "nowhere"], "nowhere"),
        (["synthetic", "--size", "big"], "big"),
        (["synthetic", "--size", "0"], "--size 0"),
        (["digits", "--name", "../x"], "--name '../x'"),
        (["digits", "--output", "/dev/null"], "/dev/null"),
        (["cifar10", "--input", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert word in lines[0]


def test_help_works(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["folder", "--help"])
    assert caught.value.code == 0
    assert "--resize" in capsys.readouterr().out


_PEAK = """
import resource, sys
from dist_resnet.data.prepare import main

def peak(name, *source):
    assert main([*source, "--output", sys.argv[1], "--name", name]) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

small = ["synthetic", "--num-train", "10", "--num-test", "10", "--size", "64"]
before = peak("small", *small)  # what is imported counts for nothing
tar = [f"{sys.argv[1]}/{name}.tar" for name in ("train", "test")]
print(before, peak("folder", "folder", "--train", tar[0], "--test", tar[1]),
      peak("synthetic", *small, "--num-train", "8000"), file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """98 MB of pixels: once they were held five times at the same moment."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    for split, number in (("train", 8000), ("test", 1)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for index in range(number):
                info = tarfile.TarInfo(f"class/{index}.bmp")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before, *after = map(int, done.stderr.splitlines()[-1].split())
    assert max(after) - before < 8000 * pixels.nbytes / 2
