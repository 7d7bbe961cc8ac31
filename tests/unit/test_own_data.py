"""Data sets of one's own: a callable, shards, torchvision's classes, and every bad item in them."""

import hashlib
import io
import struct
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.decoding import Reading
from dist_resnet.data.images import ImageSet
from dist_resnet.data.prepare import check_source, main, prepare_builtin
from dist_resnet.data.sources import table
from dist_resnet.data.sources.collect import Feed, collect
from dist_resnet.data.sources.embedded import load_synthetic
from dist_resnet.data.sources.from_shards import expand

Pair = tuple[Any, Any]
BIRDS = """
    import numpy as np

    def birds(split):
        random = np.random.default_rng(len(split))
        for number in range(30 if split == "train" else 12):
            image = random.integers(0, 256, (20, 24, 3), np.uint8)
            yield image, ("wren", "owl", "kite")[number % 3]
"""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where modules of one's own are found; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("own_birds", "bad_birds"):
        sys.modules.pop(name, None)


def _write(folder: Path, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(code))


def _grey(*values: int, shape: tuple[int, ...] = (4, 6)) -> list[np.ndarray]:
    return [np.full(shape, value, np.uint8) for value in values]


def _collect(tmp_path: Path, train: Iterable[Any], test: Iterable[Any], **more: Any) -> ImageSet:
    splits = {"train": train, "test": test}
    feed = Feed("data.source", "a:b", splits.__getitem__, more.pop("classes", None))
    found = collect(feed, tmp_path, **more)
    found.validate()
    return found


def test_images_of_every_kind_become_rgb_as_pillow_makes_them(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    colour = rng.integers(0, 256, (4, 6, 3), np.uint8)
    grey = rng.integers(0, 256, (4, 6), np.uint8)
    clear = Image.fromarray(np.dstack([colour, np.zeros((4, 6), np.uint8)]), "RGBA")
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    given = [
        colour, grey, grey[..., None], Image.fromarray(colour), Image.fromarray(grey), clear,
        Image.fromarray(grey > 99), file.getvalue(), np.asfortranarray(colour),
    ]  # fmt: skip
    found = _collect(tmp_path, [(image, 0) for image in given], [(grey, 0)])
    three = np.stack([grey] * 3, axis=-1)
    black_or_white = np.stack([255 * (grey > 99)] * 3, axis=-1)
    white = np.full((4, 6, 3), 255)
    wanted = [colour, three, three, colour, three, white, black_or_white, three, colour]
    assert np.array_equal(found.train.images[:], np.stack(wanted))
    assert found.classes == ("0",)


@pytest.mark.parametrize(("fit", "height"), [("stretch", 8), ("pad", 8)])
def test_sizes_are_made_alike_where_that_is_asked_for(
    tmp_path: Path, rng: np.random.Generator, fit: str, height: int
) -> None:
    first, second = (
        rng.integers(0, 256, (4, 6, 3), np.uint8),
        rng.integers(0, 256, (9, 5), np.uint8),
    )
    found = _collect(
        tmp_path, [(first, 0), (second, 1)], [(first, 0)], resize=8, reading=Reading(fit)
    )
    assert found.train.images.shape == (2, 8, 8, 3)
    if fit == "stretch":
        wanted = Image.fromarray(first).resize((8, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(found.train.images[0], np.asarray(wanted))
    else:
        assert (found.train.images[0][0] == 0).all()


def test_labels_that_are_text_are_numbered_by_name(tmp_path: Path) -> None:
    a, b, c = _grey(1, 2, 3)
    found = _collect(tmp_path, [(a, "owl"), (b, "wren"), (c, "kite")], [(c, "kite"), (a, "owl")])
    assert found.classes == ("kite", "owl", "wren")
    assert found.train.labels.tolist() == [1, 2, 0]
    assert found.test.labels.tolist() == [0, 1]
    assert found.train.images[2].flat[0] == 3


def test_labels_of_two_kinds_are_refused(tmp_path: Path) -> None:
    """A number among text would be a place in the sorted names: "10" comes before "2"."""
    images = list(_grey(*range(12)))
    texts = [(image, str(number)) for number, image in enumerate(images)]
    with pytest.raises(UserError, match=r"test: its labels are numbers and .* are text"):
        _collect(tmp_path, texts, [(images[0], 2)])
    numbers = [(image, number) for number, image in enumerate(images)]
    found = _collect(tmp_path, numbers, [(images[0], "2"), (images[0], "10")])
    assert [found.classes[label] for label in found.test.labels] == ["2", "10"]


def test_numbers_may_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a,) = _grey(1)
    found = _collect(tmp_path, [(a, np.int64(1)), (a, 0)], [(a, 1)], classes=["owl", "wren"])
    assert found.classes == ("owl", "wren")
    assert found.train.labels.tolist() == [1, 0]
    assert "no test image is of class owl" in capsys.readouterr().err
    found = _collect(tmp_path, [(a, "wren"), (a, 0)], [(a, "owl")], classes=["owl", "wren"])
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == ([1, 0], [0])
    with pytest.raises(UserError, match=r"label 'kite' is not among its classes: owl, wren"):
        _collect(tmp_path, [(a, "kite")], [(a, 1)], classes=["owl", "wren"])


A = np.zeros((4, 6), np.uint8)


def _raising() -> Iterable[Pair]:
    yield A, 0
    raise OSError("no such birds")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([(A, 0), A], [(A, 0)], "item 1 of train: is ndarray of uint8 and shape (4, 6); give an"),
        ([(A, 0, 1)], [(A, 0)], "item 0 of train: is a tuple of 3"),
        ([(A, 0), (A, -1)], [(A, 0)], "item 1 of train: its label is -1"),
        ([(A, 0), (A, 1.0)], [(A, 0)], "item 1 of train: its label is float"),
        ([(A, True)], [(A, 0)], "item 0 of train: its label is bool"),
        ([(A, None)], [(A, 0)], "item 0 of train: its label is NoneType"),
        ([(A, 0), (A, "owl")], [(A, 0)], "item 1 of train: its label is text and those before"),
        ([(A, "owl"), (A, 0)], [(A, "owl")], "item 1 of train: its label is a number and those"),
        ([(A, 0), (A, 1)], [(A, 0), (A, 2)], "item 1 of test: its label is 2; it must be from 0"),
        ([(A, "owl")], [(A, "own")], "item 0 of test: no training image has its label 'own'"),
        ([(A, 1), (A, 2)], [(A, 1)], "no training image has the label 0, but one has 2"),
        ([(A, 0)], [], "gives no images for 'test'"),
        ([], [(A, 0)], "gives no images for 'train'"),
        (None, [(A, 0)], "gives NoneType for 'train'; give an iterable"),
        (_raising(), [(A, 0)], "item 1 of train: raised OSError: no such birds"),
        ([(A, 0), (A[:3], 0)], [(A, 0)], "item 1 of train: is 6x3 and those before it 6x4"),
        ([(A, 0)], [(A[:3], 0)], "item 0 of test: is 6x3 and those before it 6x4"),
        ([(A.astype(float), 0)], [(A, 0)], "its image is ndarray of float64 and shape (4, 6)"),
        ([(np.zeros((3, 4, 6), np.uint8), 0)], [(A, 0)], "shape (3, 4, 6)"),
        ([(A[:0], 0)], [(A, 0)], "shape (0, 6)"),
        ([(b"no image", 0)], [(A, 0)], "item 0 of train: is not an image or is damaged"),
        ([("photo.png", 0)], [(A, 0)], "item 0 of train: its image is str"),
        ([(Image.fromarray(A.astype(np.float32)), 0)], [(A, 0)], "floating-point pixels"),
    ],
)  # fmt: skip
def test_a_bad_item_is_one_line_with_its_number(
    tmp_path: Path, train: Any, test: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        _collect(tmp_path, train, test)
    assert message in str(caught.value)
    assert str(caught.value).startswith("data.source=a:b")
    assert str(caught.value).count("data.source") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("a\n", "a\\n"), ("", "b")])
def test_classes_that_would_read_alike_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="two classes read alike, or one has no name"):
        _collect(tmp_path, [(A, name) for name in names], [(A, names[0])])


@pytest.mark.parametrize("classes", [["owl", "owl"], "owl", [1, 2], []])
def test_names_that_are_no_names_are_refused(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(UserError, match="its classes must be a list of different names"):
        _collect(tmp_path, [(A, 0)], [(A, 0)], classes=classes)


def test_a_generator_is_never_in_memory(tmp_path: Path) -> None:
    """100 images of 300 kB: a thirtieth of them at most."""

    def pairs() -> Iterable[Pair]:
        for number in range(100):
            yield np.full((316, 316, 3), number, np.uint8), number % 2

    tracemalloc.start()
    try:
        found = _collect(tmp_path, pairs(), [(np.zeros((316, 316, 3), np.uint8), 0)])
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()
    assert [int(found.train.images[k].max()) for k in (0, 57, 99)] == [0, 57, 99]


def test_the_command_prepares_what_a_callable_gives(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(working_folder, "own_birds", BIRDS)
    assert main(["source", "own_birds:birds", "--resize", "16"]) == 0
    dataset = Dataset.load(working_folder / "data" / "birds")
    assert dataset.source == "source own_birds:birds --resize 16"
    assert (dataset.num_train, dataset.num_test, dataset.height, dataset.width) == (30, 12, 16, 16)
    assert dataset.classes == ("kite", "owl", "wren")
    assert dataset.prepare_command.startswith(
        "python -m dist_resnet.data.prepare source own_birds:birds --resize 16 --output"
    )
    assert "3 classes: kite, owl, wren" in capsys.readouterr().out


def test_a_dataset_is_prepared_from_its_source_and_then_used(working_folder: Path) -> None:
    _write(working_folder, "own_birds", BIRDS)
    root = working_folder / "data"
    made = prepare_builtin("mine", root, "own_birds:birds")
    import own_birds  # type: ignore[import-not-found]

    labels = read_back(made.train_path).labels
    images = [image for image, _ in own_birds.birds("train")]
    assert np.array_equal(read_back(made.train_path).images[:], np.stack(images))
    assert labels.tolist() == [2, 1, 0] * 10
    own_birds.birds = lambda split: pytest.fail("called again")
    assert prepare_builtin("mine", root, "own_birds:birds") == made
    check_source(made, "own_birds:birds")
    check_source(made, None)
    with pytest.raises(
        UserError, match=r"data\.source=own_birds:owls: .* was prepared from source"
    ):
        check_source(made, "own_birds:owls")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def birds(split): raise OSError('gone')", "raised OSError: gone (*bad_birds.py:1)"),
        ("def birds(split, root): pass", "is called with the split alone; give root a default"),
        ("def birds(): pass", "raised TypeError: birds() takes 0 positional"),
        ("def bird(split): pass", "bad_birds has no birds; did you mean bird?"),
        ("import no_such_module", "importing it raised ModuleNotFoundError"),
        ("def birds(split): yield [[0]], 0", "item 0 of train: its image is list"),
        ("def birds(split): yield 1 / 0, 0", "item 0 of train: raised ZeroDivisionError"),
        ("def birds(split): return 7", "gives int for 'train'"),
        ("import sys; sys.exit()", "importing it raised SystemExit"),
        ("import sys\ndef birds(split): sys.exit(0)", "raised SystemExit: 0 (*bad_birds.py:2)"),
        ("def birds(split): yield b'', 0", "item 0 of train: is not an image or is damaged"),
    ],
)  # fmt: skip
def test_a_bad_callable_is_one_line(
    working_folder: Path, capsys: pytest.CaptureFixture[str], code: str, message: str
) -> None:
    _write(working_folder, "bad_birds", code)
    assert main(["source", "bad_birds:birds", "--name", "x"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("dist_resnet: ")
    assert "data.source=bad_birds:birds" in line
    assert all(part in line for part in message.split("*"))
    assert not (working_folder / "data" / "x").exists()
    assert [path.name for path in (working_folder / "data").iterdir()] == [".x.lock"]


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _png(value: int, shape: tuple[int, ...] = (5, 7)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_shards_are_read_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(3):
        files: dict[str, bytes] = {}
        for number in range(4):
            key = f"part/{shard}{number}.v1"
            files[f"{key}.png"] = _png(16 * shard + number)
            files[f"{key}.cls"] = b"%d\n" % (number % 2)
            files[f"{key}.txt"] = b"whatever"
        # The key ends at the first point of the name.
        names = {name.replace(".v1.", "."): content for name, content in files.items()}
        _tar(tmp_path / f"train-{shard:02d}.tar", names)
    labels = [b'{"label": 1}', b'{"cls": 0}', b"1"]
    _tar(
        tmp_path / "test.tar",
        {f"{k}.{e}": c for k, j in enumerate(labels) for e, c in (("json", j), ("PNG", _png(k)))},
    )
    shards, test = str(tmp_path / "train-{00..02}.tar"), str(tmp_path / "test.tar")
    arguments = ["--output", str(tmp_path), "--name", "shards"]
    assert main(["webdataset", shards, "--test", test, *arguments]) == 0
    dataset = Dataset.load(tmp_path / "shards")
    train, tests = read_back(dataset.train_path), read_back(dataset.test_path)
    wanted = [16 * s + n for s in range(3) for n in range(4)]
    assert train.images[:].max(axis=(1, 2, 3)).tolist() == wanted
    assert train.labels.tolist() == [0, 1] * 6
    assert tests.labels.tolist() == [1, 0, 1]
    assert f"--test {test}" in dataset.source


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": _png(1), "a.cls": b"0", "b.png": _png(1)}, "item 1 of train: b in"),
        ({"a.cls": b"0"}, "item 0 of train: a in * has 0 images (cls)"),
        ({"a.png": _png(1), "a.jpg": _png(1), "a.cls": b"0"}, "has 2 images (cls, jpg, png)"),
        ({"a.png": _png(1), "a.json": b"{"}, "its label cannot be read"),
        ({"a.png": _png(1), "a.json": b'{"name": 1}'}, "has none of label, cls, class"),
        ({"a.png": _png(1), "a.json": b"[1]"}, "item 0 of train: its label is list"),
        ({"a.png": b"?", "a.cls": b"0"}, "item 0 of train: is not an image or is damaged"),
    ],
)  # fmt: skip
def test_a_bad_sample_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], message: str
) -> None:
    _tar(tmp_path / "a.tar", files)
    shard = str(tmp_path / "a.tar")
    arguments = ["webdataset", shard, "--test", shard, "--output", str(tmp_path), "--name", "x"]
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in line for part in message.split("*"))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_bad_shard_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shard = tmp_path / "b.tar"
    if damage == "cut":
        _tar(shard, {"a.png": _png(1), "a.cls": b"0"})
        shard.write_bytes(shard.read_bytes()[:700])
    arguments = ["webdataset", str(shard), "--test", str(shard), "--output", str(tmp_path)]
    assert main([*arguments, "--name", "x"]) == 2
    assert str(shard) in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
        ("a.tar", ["a.tar"]),
    ],
)
def test_braces_are_those_of_a_shell(pattern: str, wanted: list[str]) -> None:
    assert expand(pattern) == wanted
    found = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
    assert found.stdout.split() == wanted


def test_a_falling_range_is_refused() -> None:
    with pytest.raises(UserError, match="no rising range"):
        expand("a-{5..3}.tar")


def _idx(path: Path, content: np.ndarray) -> None:
    """As MNIST's files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape)
    path.write_bytes(header + content.tobytes())


def _fashion(root: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    images = {}
    for split, name, count in (("train", "train", 30), ("test", "t10k", 20)):
        images[split] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        raw = root / "FashionMNIST" / "raw"
        _idx(raw / f"{name}-images-idx3-ubyte", images[split])
        _idx(raw / f"{name}-labels-idx1-ubyte", np.arange(count).astype(np.uint8) % 10)
    return images


def test_torchvisions_sets_with_train(tmp_path: Path, rng: np.random.Generator) -> None:
    images = _fashion(tmp_path, rng)
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "data")]
    assert main(["torchvision", "FashionMNIST", *arguments]) == 0
    dataset = Dataset.load(tmp_path / "data" / "fashionmnist")
    found = read_back(dataset.train_path)
    assert np.array_equal(found.images[:], np.stack([images["train"]] * 3, axis=-1))
    assert found.labels.tolist() == [k % 10 for k in range(30)]
    assert dataset.num_test == 20
    assert dataset.classes[:2] == ("T-shirt/top", "Trouser")
    assert dataset.source == f"torchvision FashionMNIST --input {tmp_path}"


def test_torchvisions_sets_with_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """SVHN, whose files torchvision knows by their MD5 sums, and which has no names of classes."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    known, images = {}, {}
    for split, count in (("train", 20), ("test", 11)):
        images[split] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.array([[k % 10 or 10] for k in range(count)])  # 10 stands for zero
        savemat(path, {"X": images[split].transpose(1, 2, 3, 0), "y": labels})
        known[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", known)
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path), "--name", "house"]
    assert main(["torchvision", "SVHN", *arguments]) == 0
    dataset = Dataset.load(tmp_path / "house")
    found = read_back(dataset.test_path)
    assert np.array_equal(found.images[:], images["test"])
    assert found.labels.tolist() == [k % 10 for k in range(11)]
    assert dataset.classes == tuple("0123456789")


def test_torchvisions_sets_of_unequal_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for number, name in enumerate(("negative", "positive")):
            folder = tmp_path / "rendered-sst2" / split / name
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(_png(number, (8 + number, 9)))
    arguments = ["torchvision", "RenderedSST2", "--input", str(tmp_path), "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "item 1 of train: is 9x9 and those before it 9x8" in capsys.readouterr().err
    assert main([*arguments, "--resize", "12"]) == 0
    assert Dataset.load(tmp_path / "renderedsst2").classes == ("negative", "positive")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SVNH", "no such data set; did you mean SVHN?"),
        ("svhn", "did you mean SVHN?"),
        ("Caltech101", "has no training and test set of its own"),
        ("VisionDataset", "has no training and test set of its own"),
        ("SVHN", "RuntimeError: Dataset not found or corrupted"),
        ("EMNIST", "has no train set: ValueError: Unknown value"),
        ("CelebA", "torchvision CelebA: "),
    ],
)
def test_torchvisions_classes_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main(["torchvision", name, "--input", str(tmp_path), "--output", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"dist_resnet: torchvision {name}: ")
    assert message in line


def test_every_source_goes_by_the_table(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of the table makes a new one: on the command line, prepared, recorded."""

    def load(options: Any, workspace: Path) -> ImageSet:
        assert list(workspace.iterdir()) == []
        return load_synthetic(6, 3, classes=options.most, size=8)

    new = table.Source("mine", load, [("--most", {"type": int})])
    monkeypatch.setitem(table.SOURCES, "new", new)
    assert main(["new", "--most", "3"]) == 0
    assert Dataset.load(working_folder / "data" / "new").source == "new"


def test_configured_sources_are_names_of_one_s_own() -> None:
    assert load_config(["data.source=my_data:birds"]).data.source == "my_data:birds"
