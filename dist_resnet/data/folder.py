"""Class folders of images, on disk or inside a .tar or .zip archive, as arrays in memory.

- Layout: `<class>/<image>`, possibly below one enclosing folder (`train/<class>/<image>`),
  possibly with folders inside a class. Classes are numbered by sorted name, images by sorted path.
- Every format that Pillow decodes by itself (first frame), turned upright by its EXIF tag.
  Transparency is composited on white, 16-bit greyscale keeps its upper byte, floating point is
  refused (no agreed range).
- Hidden files and what operating systems scatter are ignored; files whose extension is no image's
  are skipped with one warning. An image that cannot be decoded, an empty class folder and images
  of unequal size (without `resize`) are errors.
- Archives are read member by member in memory: nothing is ever extracted to disk.
"""

import bz2
import contextlib
import errno
import functools
import gzip
import lzma
import os
import stat
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dist_resnet.data.images import ImageSet, Split, decodable, decode_image, progress
from dist_resnet.errors import UserError

Parts = tuple[str, ...]  # a path inside the folder or archive
Member = tuple[Parts, Callable[[], bytes] | None]  # None: a folder. Call before the next member

MAX_FILE_BYTES = 1 << 28  # a sparse or highly compressed member may claim terabytes
MAX_DEPTH = 16  # ends loops of symbolic links
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError)
OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
}


def load_folder(train: Path, test: Path, resize: int | None = None) -> ImageSet:
    """Read two folders or archives of class folders; see the module for what they may contain.

    `resize`: every image becomes `resize` x `resize` (bilinear, aspect ratio not kept). Raises
    UserError naming the file, folder, archive or class that has to be changed.
    """
    if resize is not None and not 1 <= resize <= 4096:
        raise UserError(f"--resize {resize}: give a side between 1 and 4096")
    with warnings.catch_warnings():
        # Pillow warns about single files (size, palettes); what matters here is an error below.
        warnings.filterwarnings("ignore", module="PIL")
        train_classes, train_split = _read(train, resize, None)
        test_classes, test_split = _read(test, resize, train_split.images.shape[1:3])
    if train_classes != test_classes:
        missing = [
            f"only in {where}: {', '.join(sorted(mine - other)[:5])}"
            for where, mine, other in (
                (train, set(train_classes), set(test_classes)),
                (test, set(test_classes), set(train_classes)),
            )
            if mine - other
        ]
        raise UserError(f"training and test classes differ; {'; '.join(missing)}")
    return ImageSet(train_classes, train_split, test_split)


def _read(
    path: Path, resize: int | None, size: tuple[int, ...] | None
) -> tuple[tuple[str, ...], Split]:
    """All images of one folder or archive; `size` is the (height, width) they must have."""
    images: dict[Parts, NDArray[np.uint8]] = {}
    folders: set[Parts] = set()
    skipped: list[str] = []
    with _explained(path):
        for parts, read in progress(_members(path), f"reading {path}"):
            if any(part.startswith(".") or part.lower() in LITTER for part in parts):
                continue
            folders.update(parts[:depth] for depth in range(1, len(parts)))
            where = f"{'/'.join(parts)} in {path}"
            if read is None:
                folders.add(parts)
            elif os.path.splitext(parts[-1])[1].lower() not in decodable()[0]:
                skipped.append(where)
            elif parts in images:
                raise UserError(f"{where}: occurs twice; remove one of the two")
            else:
                image = decode_image(read(), where, resize)
                size = size or image.shape[:2]
                if image.shape[:2] != size:
                    raise UserError(
                        f"{where}: is {image.shape[1]}x{image.shape[0]} and those before it "
                        f"{size[1]}x{size[0]}; give --resize N to make all of them NxN"
                    )
                images[parts] = image
    if skipped:
        print(f"skipped {len(skipped):,} files, not images: {skipped[0]}, ...", file=sys.stderr)
    return _group(path, images, folders)


def _group(
    path: Path, images: dict[Parts, NDArray[np.uint8]], folders: set[Parts]
) -> tuple[tuple[str, ...], Split]:
    """Find the class level below enclosing folders, number the classes, stack the images."""
    if not images:
        raise UserError(f"{path}: has no images; it must hold one folder of images for each class")
    level = 0
    while min(map(len, images)) - level > 2 and len({f[level] for f in folders if f[level:]}) == 1:
        level += 1
    loose = next((parts for parts in images if len(parts) - level < 2), None)
    if loose is not None:
        raise UserError(f"{'/'.join(loose)} in {path}: is not in a class folder; move it into one")
    classes = tuple(sorted({parts[level] for parts in images}))
    for folder in sorted(parts for parts in folders if len(parts) == level + 1):
        if folder[level] not in classes:
            raise UserError(f"class folder {'/'.join(folder)} in {path}: has no images; remove it")
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
        raise UserError(
            f"{path}: has the folders {', '.join(classes)}, which are no classes; "
            f"give them one by one: --train {path}/{classes[-1]} --test {path}/{classes[0]}"
        )
    order = sorted(images, key=lambda parts: (parts[level], parts[level + 1 :]))
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[parts[level]] for parts in order], dtype=np.int64)
    return classes, Split(np.stack([images[parts] for parts in order]), labels)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what reading a damaged or inaccessible source raises into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: does not exist; check the path") from None
    except DAMAGE as error:
        raise UserError(
            f"{path}: is not a folder, nor an intact .tar, .tar.gz, .tar.bz2, .tar.xz or .zip "
            f"({error}); fetch or pack it again"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); check or replace it") from error


def _members(path: Path) -> Iterator[Member]:
    if path.is_dir():
        yield from _directory(path, path, 0)
    elif not path.exists():
        raise FileNotFoundError(errno.ENOENT, "", str(path))
    elif not path.is_file():  # opening a named pipe would wait for ever
        raise OSError("neither a folder nor a file")
    elif zipfile.is_zipfile(path):
        yield from _zip(path)
    else:
        with path.open("rb") as file:
            magic = file.read(6)
        opener = next((o for key, o in OPENERS.items() if magic.startswith(key)), None)
        with opener(path) if opener else path.open("rb") as stream:
            yield from _tar(stream)


def _directory(root: Path, folder: Path, depth: int) -> Iterator[Member]:
    if depth > MAX_DEPTH:
        raise UserError(f"{folder}: lies too deep; is there a loop of symbolic links?")
    for entry in sorted(folder.iterdir()):
        mode = entry.stat().st_mode  # follows symbolic links: the user's own are welcome
        parts = entry.relative_to(root).parts
        if stat.S_ISDIR(mode):
            yield parts, None
            if not entry.name.startswith("."):
                yield from _directory(root, entry, depth + 1)
        elif stat.S_ISREG(mode):
            yield parts, entry.read_bytes
        else:  # opening a named pipe would wait for ever
            raise UserError(f"{entry}: is not a regular file; remove it")


def _safe_parts(name: str, size: int) -> Parts:
    """The parts of an archive member's name. UserError for what no data set should contain."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"archive member {name!r}: leads out of the archive; pack it again")
    if size > MAX_FILE_BYTES:
        raise UserError(f"archive member {name!r}: claims {size:,} bytes; remove it")
    return parts


def _tar(stream: IO[bytes]) -> Iterator[Member]:
    # "r|": strictly forward, as seeking back in a compressed stream decompresses from its start.
    # tarfile copies the rest of its buffer at every read: 1 MiB of it costs a third more time.
    with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 16) as tar:
        for member in tar:
            parts = _safe_parts(member.name, member.size)
            if member.isdir():
                if parts:
                    yield parts, None
            elif member.isreg():
                yield parts, functools.partial(_read_tar, tar, member)
            else:
                raise UserError(
                    f"archive member {member.name!r}: is a link or device; pack it as a file"
                )
        # tarfile takes a damaged header or a cut file for the end of the archive.
        rest = 0
        while block := tar.fileobj.read(1 << 20):
            rest += len(block)
            if block.strip(b"\0"):
                raise tarfile.ReadError("a header is damaged")
        if rest < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def _read_tar(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError("its end is missing")
    return data


def _zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            parts = _safe_parts(member.filename.replace("\\", "/"), member.file_size)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                yield parts, None
            elif kind in (0, stat.S_IFREG):
                yield parts, functools.partial(archive.read, member)
            else:
                raise UserError(
                    f"archive member {member.filename!r}: is a link or device; remove it"
                )
