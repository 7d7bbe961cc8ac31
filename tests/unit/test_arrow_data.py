"""Hugging Face data sets and parquet files; without pyarrow most of it is skipped."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.prepare import main
from dist_resnet.data.sources import from_arrow


@pytest.fixture
def arrow() -> Any:
    """pyarrow, with its parquet module."""
    pytest.importorskip("pyarrow.parquet")
    return importlib.import_module("pyarrow")


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _images(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, 28, 28), np.uint8)


def _write(arrow: Any, path: Path, columns: dict[str, Any], metadata: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    arrow.parquet.write_table(table, path, row_group_size=7)


def _prepared(folder: Path, *arguments: str) -> Dataset:
    words = ["huggingface", *arguments, "--output", str(folder / "data"), "--name", "x"]
    assert main(words) == 0
    return Dataset.load(folder / "data" / "x")


def test_parquet_as_the_hub_has_it(tmp_path: Path, arrow: Any, rng: np.random.Generator) -> None:
    """Split by file names, images in a struct, names of classes in the schema."""
    first, second, test = _images(rng, 20), _images(rng, 9), _images(rng, 5)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["b", "a"], "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    for name, images in (
        ("train-00000-of-2", first),
        ("train-00001-of-2", second),
        ("test-0", test),
    ):
        columns = {
            "image": [{"bytes": _png(image), "path": "x.png"} for image in images],
            "label": [number % 2 for number in range(len(images))],
            "id": list(range(len(images))),
        }
        path = tmp_path / "set" / "data" / f"{name}.parquet"
        _write(arrow, path, columns, {"info": {"features": features}})
    dataset = _prepared(tmp_path, str(tmp_path / "set"))
    found = read_back(dataset.train_path)
    assert np.array_equal(found.images[:][..., 0], np.concatenate([first, second]))
    assert found.labels.tolist() == [k % 2 for k in range(20)] + [k % 2 for k in range(9)]
    assert dataset.num_test == 5
    assert dataset.classes == ("b", "a")
    assert (dataset.height, dataset.width) == (28, 28)


@pytest.mark.parametrize("fits", [True, False])
def test_numbers_that_mean_other_classes_are_refused(
    tmp_path: Path,
    arrow: Any,
    rng: np.random.Generator,
    fits: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else every label of that file is another one's."""
    for name, names in (("train", ["b", "a"]), ("test", ["b", "a"] if fits else ["a", "b"])):
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        columns = {
            "image": [{"bytes": _png(image)} for image in _images(rng, 6)],
            "label": [0, 1] * 3,
        }
        _write(arrow, tmp_path / f"{name}.parquet", columns, {"info": {"features": features}})
    files = str(tmp_path / "train.parquet"), "--test", str(tmp_path / "test.parquet")
    if fits:
        assert _prepared(tmp_path, *files).num_test == 6
        return
    assert main(["huggingface", *files, "--output", str(tmp_path), "--name", "x"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "test.parquet: its labels 0, 1, ... mean a, b, and those of" in line
    assert not (tmp_path / "x").exists()


def test_plain_parquet_files(tmp_path: Path, arrow: Any, rng: np.random.Generator) -> None:
    """Bare bytes, labels as text, no notes; the columns found by their types or named."""
    for name, count in (("a", 12), ("b", 6)):
        columns = {
            "picture": [_png(image) for image in _images(rng, count)],
            "species": [("owl", "wren")[k % 2] for k in range(count)],
            "weight": [1.5] * count,
        }
        _write(arrow, tmp_path / f"{name}.parquet", columns)
    both = str(tmp_path / "a.parquet"), "--test", str(tmp_path / "b.parquet")
    dataset = _prepared(tmp_path, *both)
    assert (dataset.num_train, dataset.num_test, dataset.classes) == (12, 6, ("owl", "wren"))
    named = _prepared(tmp_path, *both, "--image-column", "picture", "--label-column", "species")
    assert named.fingerprint == dataset.fingerprint
    assert "--label-column species" in named.source or named == dataset


def test_splits_of_partitioned_folders_do_not_meet(
    tmp_path: Path, arrow: Any, rng: np.random.Generator
) -> None:
    for split in ("train", "test"):
        images = [_png(image) for image in _images(rng, 3)]
        columns = {"image": images, "label": [0, 1, 0]}
        _write(arrow, tmp_path / "set" / f"split={split}" / "0.parquet", columns)
        _write(arrow, tmp_path / "other" / f"{split}ed.parquet", columns)
    assert _prepared(tmp_path, str(tmp_path / "set")).num_train == 3
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"--test .*tested\.parquet is among the training images"):
        from_arrow._splits(str(other), str(other / "tested.parquet"))


def test_what_a_file_system_leaves_is_no_parquet_file(tmp_path: Path) -> None:
    names = ("train/0.parquet", "train/._0.parquet", "train/@eaDir/0.parquet", ".cache/1.parquet")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert from_arrow._files(str(tmp_path)) == {"train": [tmp_path / "train/0.parquet"]}


def test_what_datasets_saves(tmp_path: Path, rng: np.random.Generator, arrow: Any) -> None:
    """By its own `save_to_disk`; a split called validation serves as the test set."""
    datasets = pytest.importorskip("datasets")
    images = {"train": _images(rng, 15), "validation": _images(rng, 4)}
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["u", "v", "w"])}
    )
    splits = {
        name: datasets.Dataset.from_dict(
            {"img": [Image.fromarray(i) for i in part], "fine": [k % 3 for k in range(len(part))]},
            features=features,
        )
        for name, part in images.items()
    }
    datasets.DatasetDict(splits).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "validation": 1}
    )
    dataset = _prepared(tmp_path, str(tmp_path / "saved"))
    found = read_back(dataset.train_path)
    assert np.array_equal(found.images[:][..., 0], images["train"])
    assert found.labels.tolist() == [k % 3 for k in range(15)]
    assert (dataset.num_test, dataset.classes) == (4, ("u", "v", "w"))
    single = splits["train"].shuffle(seed=1).select(range(6))
    single.save_to_disk(tmp_path / "single")
    again = _prepared(tmp_path, str(tmp_path / "single"), "--test", str(tmp_path / "saved"))
    wanted = [np.asarray(image) for image in single["img"]]
    assert np.array_equal(read_back(again.train_path).images[:][..., 0], np.stack(wanted))


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"image": [b"?"], "label": [0]}, (), "item 0 of train: is not an image or is damaged"),
        ({"image": [None], "label": [0]}, ("--image-column", "image"), "its image is NoneType"),
        ({"image": [_png(np.ones((3, 3), np.uint8))], "label": [None]},
         ("--label-column", "label"), "item 0 of train: its label is NoneType"),
        ({"image": [_png(np.ones((3, 3), np.uint8))], "label": [-1]}, (), "its label is -1"),
        ({"image": [b"?"], "a": [0], "b": [1]}, (), "a, b of the columns image, a, b may be"),
        ({"text": ["?"], "label": [0]}, (), "none of the columns text, label may be the image"),
        ({"image": [b"?"], "label": [0]}, ("--label-column", "lable"), "no such column; there are"),
        ({"image": [{"bytes": None, "path": "no/such.png"}], "label": [0]}, (),
         "item 0 of train: raised FileNotFoundError"),
    ],
)  # fmt: skip
def test_a_bad_table_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrow: Any,
    columns: dict[str, Any],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    path = str(tmp_path / "a.parquet")
    for name in "ab":
        _write(arrow, tmp_path / f"{name}.parquet", columns)
    other = str(tmp_path / "b.parquet")
    words = ["huggingface", path, "--test", other, "--output", str(tmp_path), *arguments]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err.strip().splitlines()[-1]
    assert "Traceback" not in captured.err


def test_bad_paths_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arrow: Any
) -> None:
    place = "--output", str(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    one = tmp_path / "one" / "train.parquet"
    _write(arrow, one, {"image": [b"?"], "label": [0]})
    for path, message in (
        ("empty", "no parquet file and no saved data set lies there"),
        ("nowhere", "no parquet file and no saved data set lies there"),
        ("bad.parquet", "has no split test; give one: --test PATH"),
        ("one", "has no split test; give one: --test PATH"),
    ):
        assert main(["huggingface", str(tmp_path / path), *place]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    bad = str(tmp_path / "bad.parquet")
    assert main(["huggingface", bad, "--test", str(one), *place]) == 2
    assert "bad.parquet: raised ArrowInvalid" in capsys.readouterr().err.strip().splitlines()[-1]


def test_without_pyarrow_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(from_arrow.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pyarrow: pip install 'dist-resnet\[data\]'"):
        from_arrow._import("pyarrow")
