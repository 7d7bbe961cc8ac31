"""Files that are whole or not there."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_NOT_REPLACED = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EROFS)
# This process's own descriptors; opened by name, an appended log would be cut off.
_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr|fd/(\d+))|/proc/self/fd/(\d+)")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON of texts, numbers, lists and mappings; a number that is not finite is null.

    JSON has no NaN, and a reader that meets one refuses the whole file.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, int | str):
        return value
    number = float(value)  # NumPy's and torch's, too
    return number if math.isfinite(number) else None


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` so that a crash at any moment leaves the old file or the new one.

    A link stays, its target is written. What is no regular file (a device, a pipe) is written into.

    Args:
        durable: that crash may be the machine's (costs an fsync, 1 to 10 ms on a disk).

    Raises:
        OSError: disk full, read-only folder; the old file is untouched and nothing is left behind.
    """
    before = _status(path)
    if _number(path) is not None or (before and not stat.S_ISREG(before.st_mode)):
        _write_into(path, content)
        return
    place = Path(os.path.realpath(path))
    # The end of the name: the whole one may be as long as a name can be.
    temporary = place.with_name(f".tmp.{os.getpid()}.{place.name[-40:]}")
    try:
        with open(temporary, "wb") as file:
            if before:
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(place.parent)


def write_for_user(path: Path, text: str) -> None:
    """Write what a command was asked to write, as `write_atomically`.

    Raises:
        UserError: it cannot be written.
    """
    with _told(path):
        content = text.encode("utf-8", "backslashreplace")
        try:
            write_atomically(path, content, durable=False)
        except OSError as error:
            # A file that is mounted alone, or in a folder that takes no new ones.
            if error.errno not in _NOT_REPLACED or not path.is_file():
                raise
            _write_into(path, content)


def check_writable(path: Path) -> None:
    """Ask whether `write_for_user` could write `path`, before what is to be written is made.

    Raises:
        UserError: it could not.
    """
    with _told(path):
        before = _status(path)
        if before and stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError
        if _number(path) is not None:
            return
        if before and stat.S_ISREG(before.st_mode):
            os.close(os.open(path, os.O_WRONLY))
            return
        if before:  # a pipe would wait for its reader
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        probe = Path(os.path.realpath(path)).with_name(f".tmp.{os.getpid()}.probe")
        write_atomically(probe, b"", durable=False)
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def lock(descriptor: int) -> bool:
    """Lock an open file, without waiting, until it is closed or the process dies.

    Returns:
        False: the file system has no locks, be it of the whole file (flock) or of a part (fcntl).

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: it cannot be had for another reason.
    """
    for take in (fcntl.flock, fcntl.lockf):
        try:
            take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # fcntl's may say either
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
            if error.errno not in _NO_LOCKS:
                raise
    return False


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where its file system can (some network ones cannot)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _status(path: Path) -> os.stat_result | None:
    """Of what a link points to; None: nothing there yet."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _number(path: Path) -> int | None:
    """The descriptor of this process that `path` names, if it names one."""
    found = _DESCRIPTOR.fullmatch(str(path))
    if not found:
        return None
    return {"stdout": 1, "stderr": 2}.get(found[1]) or int(found[2] or found[3])


def _write_into(path: Path, content: bytes) -> None:
    number = _number(path)
    if number is None:
        with open(path, "wb", buffering=0) as file:
            _write_all(file.fileno(), content)
        return
    for stream in (sys.stdout, sys.stderr):  # what was printed before comes before
        if stream is not None:
            stream.flush()
    _write_all(number, content)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
