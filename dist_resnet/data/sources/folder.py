"""Class folders of images, on disk or inside a .tar or .zip archive.

- Layout: `<class>/<image>`, possibly below one enclosing folder (`train/<class>/<image>`),
  possibly with folders inside a class. Classes are numbered by sorted name, images by sorted path.
- What counts as a file is in `members`, how it becomes pixels in `decoding`.
- Files whose extension is no image's are skipped with one warning. Images that cannot be decoded
  are named, all of them, and refused unless so many may be left out. An empty class folder and
  images of unequal size (without a size to give them) are errors.
- Pixels go through a scratch file, in the order in which they come, and never all into memory.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dist_resnet.base.errors import UserError
from dist_resnet.data.decoding import AS_STORED, Decoder, Reading, decodable, target_size
from dist_resnet.data.images import ImageSet, Split, progress, same_size, stored_images, tell
from dist_resnet.data.sources.members import Parts, explained, members
from dist_resnet.data.tolerance import STRICT, Tolerance

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


@dataclass
class _Found:
    """What was read of one folder or archive: image `numbers[parts]` of the scratch file."""

    path: Path
    size: tuple[int, int] | None
    level: int = 0
    """Enclosing folders above the class folders."""
    numbers: dict[Parts, int] = field(default_factory=dict)
    folders: set[Parts] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def load_folder(
    train: Path,
    test: Path,
    scratch: Path,
    resize: int | None = None,
    reading: Reading = AS_STORED,
    tolerance: Tolerance = STRICT,
) -> ImageSet:
    """Read two folders or archives of class folders; see the module for what they may contain.

    `scratch`: an empty folder that takes all pixels, and is needed as long as the result.
    `resize`: every image becomes `resize` x `resize`. Raises UserError naming the file, folder,
    archive or class that has to be changed.
    """
    size = target_size(resize)
    first = _read(train, scratch / "train", Decoder(size, reading), size)
    second = _read(test, scratch / "test", Decoder(size, reading), first.size)
    tolerance.judge({str(found.path): found.damaged for found in (first, second)})
    classes = _classes(first, None, tolerance)
    found = _classes(second, classes, tolerance)
    missing = [
        f"only in {where}: {', '.join(sorted(set(mine) - set(other))[:5])}"
        for where, mine, other in ((train, classes, found), (test, found, classes))
        if set(mine) - set(other)
    ]
    if missing and not (tolerance.missing and set(found) <= set(classes)):
        hint = "" if set(found) - set(classes) else "; add images, or give --allow-missing"
        raise UserError(f"training and test classes differ; {'; '.join(missing)}{hint}")
    splits = (_split(scratch / "train", first, classes), _split(scratch / "test", second, classes))
    return ImageSet(classes, *splits, reading)


def _read(path: Path, scratch: Path, decode: Decoder, size: tuple[int, int] | None) -> _Found:
    """All images of one folder or archive; `size` is the (height, width) they must have."""
    found = _Found(path, size)
    with explained(path), scratch.open("wb") as file:
        for parts, read in progress(members(path), f"reading {path}"):
            found.folders.update(parts[:depth] for depth in range(1, len(parts)))
            where = f"{'/'.join(parts)} in {path}"
            if read is None:
                found.folders.add(parts)
            elif os.path.splitext(parts[-1])[1].lower() not in decodable()[0]:
                found.skipped.append(where)
            elif parts in found.numbers:
                raise UserError(f"{where}: occurs twice; remove one of the two")
            else:
                try:
                    image = decode(read(), where)
                except UserError as error:
                    found.damaged.append(str(error))
                    continue
                found.size = same_size(found.size, image, where)
                file.write(image.data)
                found.numbers[parts] = len(found.numbers)
    if found.skipped:
        tell(f"skipped {len(found.skipped):,} files, not images: {found.skipped[0]}, ...")
    if doubt := decode.doubt():
        tell(f"warning: {path}: {doubt}")
    return found


def _level(found: _Found, known: Sequence[str]) -> int:
    """How many enclosing folders lie above the class folders.

    A test set may have images of a single class: a `known` one is no enclosing folder.
    """
    level = 0
    while min(map(len, found.numbers)) - level > 2:
        names = {folder[level] for folder in found.folders if folder[level:]}
        if len(names) > 1 or names <= set(known):
            break
        level += 1
    return level


def _classes(found: _Found, known: tuple[str, ...] | None, tolerance: Tolerance) -> tuple[str, ...]:
    """The names of the classes that have images, sorted; `known`: those of the training set."""
    path, images = found.path, found.numbers
    if not images:
        raise UserError(f"{path}: has no images; it must hold one folder of images for each class")
    level = found.level = _level(found, known or ())
    loose = next((parts for parts in images if len(parts) - level < 2), None)
    if loose is not None:
        raise UserError(f"{'/'.join(loose)} in {path}: is not in a class folder; move it into one")
    classes = tuple(sorted({parts[level] for parts in images}))
    for folder in sorted(parts for parts in found.folders if len(parts) == level + 1):
        if folder[level] not in classes:
            unknown = known is None or folder[level] not in known
            if unknown or not tolerance.missing:
                remedy = "remove the folder" if unknown else "give --allow-missing"
                where = f"class folder {'/'.join(folder)} in {path}"
                raise UserError(f"{where}: has no images; add some, or {remedy}")
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
        train, test = (shlex.quote(f"{path}/{classes[n]}") for n in (-1, 0))
        raise UserError(
            f"{path}: has the folders {', '.join(classes)}, which are no classes; "
            f"give them one by one: --train {train} --test {test}"
        )
    return classes


def _split(scratch: Path, found: _Found, classes: tuple[str, ...]) -> Split:
    assert found.size is not None
    height, width = found.size
    level = found.level
    order = sorted(found.numbers, key=lambda parts: (parts[level], parts[level + 1 :]))
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[parts[level]] for parts in order], dtype=np.int64)
    places = np.array([found.numbers[parts] for parts in order], dtype=np.int64)
    return Split(stored_images(scratch, places * (height * width * 3), height, width), labels)
