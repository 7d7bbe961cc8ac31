"""The files of a folder, .tar or .zip, one after the other.

- Hidden entries and what operating systems and servers scatter are left out before anything about
  them is asked: a dangling `.#notes.png` or a locked `lost+found` is nobody's data.
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
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import printable

Parts = tuple[str, ...]  # a path inside the folder or archive, as printable text
Member = tuple[Parts, Callable[[], bytes] | None]  # None: a folder. Call before the next member

MAX_FILE_BYTES = 1 << 28  # a sparse or highly compressed member may claim terabytes
MAX_DEPTH = 16  # ends loops of symbolic links
# Of Windows, macOS, ext4, Synology, QNAP, NetApp and Python; lower case. Hidden ones need no row.
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
LITTER |= {"__macosx", "icon\\r", "network trash folder", "temporary items", "lost+found"}
LITTER |= {"@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "#recycle"}
LITTER |= {"#snapshot", "~snapshot", "__pycache__", "found.000"}
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError)
OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
}


def members(path: Path) -> Iterator[Member]:
    """What lies below the folder, or in the archive, `path`; folders sorted by name.

    Raises UserError where an archive holds what no data set should, OSError and what `DAMAGE` names
    where it cannot be read; see `explained`. Reading a single file raises UserError where the
    others are not concerned.
    """
    if path.is_dir():
        yield from _directory(path, (), 0)
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


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
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
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # of what was being written meanwhile
        raise UserError(f"{path}: cannot be read ({error}); check or replace it") from error


def read_limited(file: IO[bytes], where: str) -> bytes:
    """All of a file, or UserError where that is more than any image: a device may have no end."""
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{where}: has more than {MAX_FILE_BYTES:,} bytes; remove it")
    return data


def is_litter(name: str) -> bool:
    """Whether a file or folder is no part of a data set, wherever it lies."""
    return name.startswith(".") or name.lower() in LITTER


def _directory(folder: Path, above: Parts, depth: int) -> Iterator[Member]:
    if depth > MAX_DEPTH:
        raise UserError(f"{folder}: lies too deep; is there a loop of symbolic links?")
    # As UTF-8 in every locale: the names of classes must not depend on whoever prepares them.
    names = os.listdir(folder)
    texts = (os.fsencode(name).decode("utf-8", "surrogateescape") for name in names)
    before = None
    for text, name in sorted(zip(map(printable, texts), names, strict=True)):
        if is_litter(text):
            continue
        if text == before:
            raise UserError(f"{folder}: two names read {text!r}; rename one of them")
        before, entry, parts = text, folder / name, (*above, text)
        if entry.is_dir():  # follows symbolic links: the user's own are welcome
            yield parts, None
            yield from _directory(entry, parts, depth + 1)
        else:
            yield parts, functools.partial(_read_file, entry)


def _read_file(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise UserError(f"{path}: is not a regular file; remove it")
        with path.open("rb") as file:
            return read_limited(file, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); remove it") from None


def _safe_parts(name: str) -> Parts | None:
    """The parts of an archive member's name; None: litter. UserError where it leads elsewhere."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"archive member {name!r}: leads out of the archive; pack it again")
    texts = tuple(map(printable, parts))
    return None if any(map(is_litter, texts)) else texts


def _check_size(name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise UserError(f"archive member {name!r}: claims {size:,} bytes; remove it")


def _tar(stream: IO[bytes]) -> Iterator[Member]:
    # "r|": strictly forward, as seeking back in a compressed stream decompresses from its start.
    # tarfile copies the rest of its buffer at every read: 1 MiB of it costs a third more time.
    with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 16, encoding="utf-8") as tar:
        for member in tar:
            parts = _safe_parts(member.name)
            if parts is None:
                continue
            _check_size(member.name, member.size)
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
            parts = _safe_parts(member.filename.replace("\\", "/"))
            if parts is None:
                continue
            _check_size(member.filename, member.file_size)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                yield parts, None
            elif kind in (0, stat.S_IFREG):
                yield parts, functools.partial(_read_zip, archive, member)
            else:
                raise UserError(
                    f"archive member {member.filename!r}: is a link or device; remove it"
                )


def _read_zip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except (*DAMAGE, RuntimeError) as error:  # its neighbours may be intact
        where = f"{printable(member.filename)} in {archive.filename}"
        raise UserError(f"{where}: cannot be read ({error}); pack it again") from None
