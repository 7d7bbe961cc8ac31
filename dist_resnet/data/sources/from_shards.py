"""WebDataset shards: .tar files in which an image and its label are neighbours of one name."""

import argparse
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.data.decoding import decodable
from dist_resnet.data.sources.collect import Feed
from dist_resnet.data.sources.members import explained, members

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LABELS = ("label", "cls", "class")  # in a .json, the first that it has
_MOST_SHARDS = 1 << 20


def feed(options: argparse.Namespace, workspace: Path) -> Feed:
    """Samples in the order in which they stand: <key>.jpg (.png, ...) and <key>.cls or .json.

    A .cls holds a number or a name; a .json one of these, or an object that has it as its `label`,
    `cls` or `class`. Raises UserError naming the shard or the sample that has to be changed.
    """
    shards = {"train": expand(options.what), "test": expand(options.test)}
    return Feed(
        "webdataset",
        options.what,
        lambda split: itertools.chain.from_iterable(map(_samples, shards[split])),
    )


def expand(pattern: str) -> list[str]:
    """Paths that {000..099} and {a,b} stand for, in order, as in a shell."""
    match = None if os.path.exists(user_path(pattern)) else _BRACES.search(pattern)
    if match is None:
        return [pattern]
    options = match[1].split(",")
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = numbers.groups()
        if not 0 <= int(last) - int(first) < _MOST_SHARDS:
            raise UserError(f"{pattern}: {{{match[1]}}} is no rising range; write {{000..099}}")
        padded = any(len(text) > 1 and text[0] == "0" for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    front, rest = pattern[: match.start()], pattern[match.end() :]
    return [path for option in options for path in expand(f"{front}{option}{rest}")]


def _samples(shard: str) -> Iterator[tuple[bytes, Any]]:
    path = user_path(shard)
    with explained(path):
        for key, files in itertools.groupby(_files(path), lambda file: file[0]):
            yield _sample(f"{key} in {path}", {ending: data for _, ending, data in files})


def _files(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, ending, content) of each file; empty content where nobody will look at it."""
    for parts, read in members(path):
        if read is None:
            continue
        name, _, ending = parts[-1].partition(".")
        ending = ending.lower()
        used = ending in ("cls", "json") or f".{ending}" in decodable()[0]
        yield "/".join((*parts[:-1], name)), ending, read() if used else b""


def _sample(where: str, files: dict[str, bytes]) -> tuple[bytes, Any]:
    images = [ending for ending in files if f".{ending}" in decodable()[0]]
    if len(images) != 1:
        found = ", ".join(sorted(files))
        raise UserError(f"{where}: has {len(images)} images ({found}); it must have one")
    image = files[images[0]]
    try:
        if "cls" in files:
            text = files["cls"].decode().strip()
            return image, int(text) if re.fullmatch(r"-?\d+", text) else text
        if "json" not in files:
            raise UserError(f"{where}: has neither a .cls nor a .json; add its label")
        found_label = json.loads(files["json"])
    except ValueError as error:
        raise UserError(f"{where}: its label cannot be read ({error}); mend it") from None
    if isinstance(found_label, dict):
        name = next((name for name in _LABELS if name in found_label), None)
        if name is None:
            raise UserError(f"{where}: its .json has none of {', '.join(_LABELS)}; add its label")
        found_label = found_label[name]
    return image, found_label
