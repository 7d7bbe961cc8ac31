"""Turn a source of images into verified .beton files: python -m dist_resnet.data.prepare --help.

A data set is built in a hidden folder next to its place and put there by one rename, so that
whoever looks finds either all of it or nothing. A lock makes a second preparation wait; the
kernel releases it when its holder dies.
"""

import argparse
import contextlib
import ctypes
import errno
import glob
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from dist_resnet.base.cli import run_command
from dist_resnet.base.errors import UserError
from dist_resnet.base.files import lock, sync_folder
from dist_resnet.base.terminal import forgive
from dist_resnet.config.builtins import DATASETS
from dist_resnet.data.beton import read_back, write_beton
from dist_resnet.data.content import fingerprint
from dist_resnet.data.dataset import DESCRIPTION, TEST, TRAIN, Dataset, describe
from dist_resnet.data.images import ImageSet, tell
from dist_resnet.data.sources.embedded import CIFAR
from dist_resnet.data.sources.table import SOURCES, default_name, parser, recorded_source

LOCK_SECONDS = 1800.0  # how long to wait for another preparation of the same data set


def prepare(image_set: ImageSet, folder: Path, source_name: str, name: str) -> Dataset:
    """Write `image_set` to `folder` as the data set `name`; keep what is there if it is the same.

    Raises UserError where the images are unusable (see `ImageSet.validate`), `folder` holds
    something else, or the disk does not take it; `folder` is then as it was.
    """
    with _workspace(folder) as workspace:
        return _place(image_set, folder, workspace, source_name, name)


def prepare_builtin(name: str, data_root: Path, source: str | None = None) -> Dataset:
    """The data set `name` below `data_root`; prepared first if it is missing or damaged.

    `name`: cifar10 and cifar100 (downloaded), digits, synthetic, or of one's own with
    `source`, module:callable. Raises UserError for others, and as `prepare` does.
    """
    folder = data_root / name
    if source is None and name not in DATASETS:
        raise UserError(
            f"there is no data set {name!r} in {data_root}; prepare it: python -m "
            "dist_resnet.data.prepare folder --train PATH --test PATH "
            f"--output {shlex.quote(str(data_root))} --name {shlex.quote(name)}"
        )
    options = parser().parse_args([name] if source is None else ["source", source])
    with _workspace(folder) as workspace:
        if present := _intact(folder):  # perhaps made by another process while this one waited
            return present
        return _load_and_place(options, folder, workspace, name)


def check_source(dataset: Dataset, source: str | None) -> None:
    """Raise UserError unless `dataset` was prepared from `source`, module:callable; None: any."""
    if source is not None and shlex.split(dataset.source)[:2] != ["source", source]:
        raise UserError(
            f"data.source={source}: {dataset.folder} was prepared from {dataset.source}; "
            "choose another data.dataset, or data.source=null for any"
        )


def _load_and_place(
    options: argparse.Namespace, folder: Path, workspace: Path, name: str
) -> Dataset:
    scratch = workspace / "scratch"
    scratch.mkdir()
    image_set = SOURCES[options.source].load(options, scratch)
    return _place(image_set, folder, workspace, recorded_source(options), name)


def _intact(folder: Path) -> Dataset | None:
    with contextlib.suppress(UserError):
        return Dataset.load(folder)
    return None


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A fresh hidden folder next to `folder`, removed at the end, while no one else prepares it."""
    place = Path(os.path.realpath(folder))  # a symbolic link stays; what it points to is replaced
    prefix = f".{place.name}.tmp-"
    try:
        if place.exists() and set(os.listdir(place)) - {TRAIN, TEST, DESCRIPTION}:
            raise UserError(f"{folder} holds other files than a data set; choose another --name")
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(place.with_name(f".{place.name}.lock")) as locked:
            if locked:  # so nobody else is at work here, and what lies here was left by the dead
                for stale in place.parent.glob(f"{glob.escape(prefix)}*"):
                    shutil.rmtree(stale, ignore_errors=True)
            workspace = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place.parent))
            try:
                yield workspace
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
    except MemoryError as error:
        raise UserError("not enough memory for these images; give fewer or smaller") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left in {place.parent}; free some or choose another with --output"
            ) from error
        raise UserError(f"cannot prepare {folder}: {error}; choose another --output") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, after waiting for it. False where the file system has no locks."""
    with path.open("a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        waiting = False
        while True:
            try:
                locked = lock(file.fileno())
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{path} has been locked for {LOCK_SECONDS:.0f} s") from None
                if not waiting:
                    tell("waiting for another process that prepares it ...")
                waiting = True
                time.sleep(0.1)
            else:
                if not locked:
                    tell(f"warning: {path.parent}: has no locks: prepare one set at a time")
                yield locked  # closing the file releases it, which stays: removing it would race
                return


def _place(
    image_set: ImageSet, folder: Path, workspace: Path, source_name: str, name: str
) -> Dataset:
    image_set.validate()
    present = _intact(folder)
    alike = present is not None and present.reading == image_set.reading
    if present and alike and present.fingerprint == fingerprint(image_set):
        tell(f"{folder} is already prepared with the same content", sys.stdout)
        return present
    built = workspace / "built"
    built.mkdir()
    write_beton(built / TRAIN, image_set.train)
    write_beton(built / TEST, image_set.test)
    found = ImageSet(image_set.classes, read_back(built / TRAIN), read_back(built / TEST))
    if describe(built, image_set, name, source_name).fingerprint != fingerprint(found):
        raise UserError(f"{folder} reads back differently from what was written; check the disk")
    sync_folder(built)
    _swap(built, Path(os.path.realpath(folder)))
    return Dataset.load(folder, verify=False)


def _swap(built: Path, place: Path) -> None:
    """Put `built` at `place`, atomically; what was there goes into the workspace, to be removed."""
    libc = ctypes.CDLL(None)
    paths = (-100, os.fsencode(built), -100, os.fsencode(place))  # -100: AT_FDCWD
    exchanged = (  # 2: RENAME_EXCHANGE
        place.is_dir() and hasattr(libc, "renameat2") and libc.renameat2(*paths, 2) == 0
    )
    if not exchanged:
        if place.is_dir():  # a file system without exchange, such as NFS: away for a moment
            os.rename(place, built.with_name("replaced"))
        os.rename(built, place)
    sync_folder(place.parent)


def _run(options: argparse.Namespace) -> None:
    start, source = time.perf_counter(), options.source
    name = options.name or default_name(options)
    folder = options.output / name
    with _workspace(folder) as workspace:
        dataset = _intact(folder)
        # A download always has the same content: no need to repeat it to compare.
        if dataset and dataset.source == source in CIFAR and not options.input:
            tell(f"{folder} is already prepared", sys.stdout)
        else:
            dataset = _load_and_place(options, folder, workspace, name)
    tell(
        f"{folder}: {dataset.num_train:,} training and {dataset.num_test:,} test images, "
        f"{dataset.width}x{dataset.height}\n"
        f"{len(dataset.classes)} classes: {', '.join(dataset.classes)}\n"
        f"mean {', '.join(f'{value:.3f}' for value in dataset.mean)}\n"
        f"std  {', '.join(f'{value:.3f}' for value in dataset.std)}\n"
        f"fingerprint {dataset.fingerprint}\n"
        f"{time.perf_counter() - start:.1f} s",
        sys.stdout,
    )


class _Terminated(BaseException):
    """By SIGTERM: no SystemExit, which somebody's source may raise too."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 (user's mistake), 130 (Ctrl-C) or 143."""
    try:
        _run(parser(__doc__.split(":")[0]).parse_args(arguments))
    except UserError as error:
        tell(f"dist_resnet: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted; nothing was changed")
        return 130
    except _Terminated:
        return 143
    return 0


if __name__ == "__main__":
    forgive()
    signal.signal(signal.SIGTERM, _terminate)  # so that the workspace is removed
    run_command(main)
