"""Files that are whole or not there."""

import contextlib
import errno
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` so that a crash at any moment leaves the old file or the new one.

    Args:
        durable: that crash may be the machine's (costs an fsync, 1 to 10 ms on a disk).

    Raises:
        OSError: disk full, read-only folder; the old file is untouched and nothing is left behind.
    """
    temporary = path.with_name(f".tmp.{os.getpid()}.{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


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
