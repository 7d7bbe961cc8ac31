"""A Hugging Face data set on disk, or parquet files: images and labels, read by pyarrow alone."""

import argparse
import glob
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.plugins import calling
from dist_resnet.data.sources.collect import Feed
from dist_resnet.data.sources.members import is_litter

Files = dict[str, list[Path]]  # by split
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
_SPLIT = re.compile(rf"(?:^|[-_./=])({'|'.join(_SPLITS)})(?=[-_./])")
_ROWS = 256  # images that are in memory at a time


def feed(options: argparse.Namespace, workspace: Path) -> Feed:
    """Its splits `train` and `test`; without the latter `validation`.

    Raises UserError where pyarrow is missing, or naming the path, split or column to change.
    """
    arrow = _import("pyarrow")
    files = _splits(options.what, options.test)
    with calling("huggingface", options.what):
        schema = _open(arrow, files["train"][0])[0]
        image = _column("image", options.image_column, schema, _images(arrow, schema))
        label = _column("label", options.label_column, schema, _labels(arrow, schema))

    names = _class_names(schema, label)

    def pairs(split: str) -> Iterator[tuple[Any, Any]]:
        for file in files[split]:
            found, batches = _open(arrow, file)
            for name in {image, label} - set(found.names):
                raise UserError(f"{file}: has no column {name}, which the first file has")
            own = _class_names(found, label)
            if own and names and own != names:
                raise UserError(
                    f"{file}: its labels 0, 1, ... mean {_few(own)}, and those of "
                    f"{files['train'][0]} {_few(names)}; save both with the same ClassLabel"
                )
            for batch in batches:
                # A slice at a time: a batch may be a whole file.
                for start in range(0, batch.num_rows, _ROWS):
                    part = batch.slice(start, _ROWS)
                    both = part.column(image).to_pylist(), part.column(label).to_pylist()
                    yield from ((_content(i), k) for i, k in zip(*both, strict=True))

    return Feed("huggingface", options.what, pairs, names)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError("huggingface: needs pyarrow: pip install 'dist-resnet[data]'") from None


def _splits(path: str, test: str | None) -> Files:
    """The files of "train" and of "test"."""
    found = _files(path)
    train = found.get("train") or (found[""] if set(found) == {""} else None)
    if train is None:
        raise UserError(
            f"{path}: has no split train, only {', '.join(sorted(filter(None, found)))}"
        )
    if test is not None:
        other = _files(test)
        name = next((name for name in ("test", "", *_SPLITS) if name in other), "")
        both = {file.resolve() for file in train} & {file.resolve() for file in other[name]}
        if both:
            raise UserError(f"--test {test}: {min(both)} is among the training images, too")
        return {"train": train, "test": other[name]}
    named = [name for name in _SPLITS[1:] if name in found]
    if not named:
        raise UserError(f"{path}: has no split test; give one: --test PATH")
    return {"train": train, "test": found[named[0]]}


def _files(text: str) -> Files:
    """The files by split, "" where none is named."""
    path = user_path(text)
    if (path / "dataset_dict.json").is_file():
        names = _json(path / "dataset_dict.json")["splits"]
        return {name: _saved(path / name) for name in names}
    if (path / "state.json").is_file():
        return {"": _saved(path)}
    if path.is_dir():
        listed = sorted(
            file
            for file in path.rglob("*.parquet")
            if not any(map(is_litter, file.relative_to(path).parts))
        )
    else:
        listed = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
    if not listed:
        raise UserError(f"{text}: no parquet file and no saved data set lies there")
    found: Files = {}
    for file in listed:
        # By the whole path below the folder: train/0.parquet, data/train-00000-of-00001.parquet.
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        named = _SPLIT.search(name)
        found.setdefault(named[1] if named else "", []).append(file)
    return found if path.is_dir() else {"": listed}


def _saved(folder: Path) -> list[Path]:
    return [folder / entry["filename"] for entry in _json(folder / "state.json")["_data_files"]]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save the data set again") from None


def _open(arrow: Any, file: Path) -> tuple[Any, Any]:
    """The schema, and an iterator over record batches."""
    if file.suffix == ".arrow":
        stream = _import("pyarrow.ipc").open_stream(arrow.OSFile(str(file)))
        return stream.schema, stream
    found = _import("pyarrow.parquet").ParquetFile(file)
    return found.schema_arrow, found.iter_batches(_ROWS)


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` noted of the columns; nothing in files that others wrote."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}


def _class_names(schema: Any, label: str) -> list[str] | None:
    """By number; None where the file does not say."""
    feature = _features(schema).get(label)
    return feature.get("names") if isinstance(feature, dict) else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _images(arrow: Any, schema: Any) -> list[str]:
    """Columns that may hold images: those said to, else binary ones, bare or in a struct."""
    noted = [n for n, f in _features(schema).items() if _is(f, "Image")]
    return noted or [
        field.name
        for field in schema
        if _binary(arrow, field.type)
        or (arrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]


def _labels(arrow: Any, schema: Any) -> list[str]:
    """Columns that may hold labels: those said to, else one called label, else ints and texts."""
    noted = [n for n, f in _features(schema).items() if _is(f, "ClassLabel")]
    kinds = (arrow.types.is_integer, arrow.types.is_string, arrow.types.is_large_string)
    plain = [field.name for field in schema if any(kind(field.type) for kind in kinds)]
    return noted or [name for name in plain if name == "label"] or plain


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == kind


def _binary(arrow: Any, kind: Any) -> bool:
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def _column(what: str, given: str | None, schema: Any, found: list[str]) -> str:
    names = ", ".join(schema.names)
    if given is not None:
        if given not in schema.names:
            raise UserError(f"--{what}-column {given}: no such column; there are {names}")
        return given
    if len(found) != 1:
        seen = ", ".join(found) or "none"
        raise UserError(
            f"huggingface: {seen} of the columns {names} may be the {what}; give --{what}-column"
        )
    return found[0]


def _content(value: Any) -> Any:
    """The bytes of an image, which `datasets` keeps in a struct, or in a file that it names."""
    if not isinstance(value, dict):
        return value
    if value.get("bytes") is None and value.get("path"):
        return Path(value["path"]).read_bytes()
    return value.get("bytes")
