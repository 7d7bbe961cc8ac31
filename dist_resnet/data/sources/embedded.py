"""Named data sets: CIFAR through torchvision, scikit-learn's digits, synthetic images."""

import contextlib
import io
import socket
import sys
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.base.terminal import shows_live_line
from dist_resnet.data.images import MAX_SIDE, ImageSet, LazyImages, Split

CIFAR = ("cifar10", "cifar100")
# No answer within this time: no network. Also the longest pause within a download.
NETWORK_SECONDS = 8.0
_PHILOX_BYTES = 32  # of one position of its counter


def load_cifar(name: str, input_root: Path | None, download_root: Path) -> ImageSet:
    """CIFAR-10 or CIFAR-100 (fine labels) in torchvision's order, 32x32; MD5 sums are checked.

    `input_root`: a folder that holds the extracted data set or its .tar.gz, or the extracted
    folder itself; None downloads. `download_root` receives what the .tar.gz contains. Raises
    UserError where there is no network, or what was found or downloaded is not the data set.
    """
    from torchvision import datasets

    kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = download_root
    if input_root is None:
        _download(kind, name, root)
    else:
        root = _find(kind, input_root, download_root)
    try:
        with quiet():  # NumPy warns about how the files were pickled in 2009
            splits = [kind(root, train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{root}: {kind.base_folder} is incomplete or damaged; download it again"
        ) from error
    train, test = (
        Split(np.ascontiguousarray(s.data, np.uint8), np.array(s.targets, np.int64)) for s in splits
    )
    return ImageSet(tuple(splits[0].classes), train, test)


def _find(kind: Any, input_root: Path, extract_root: Path) -> Path:
    """The folder that holds the extracted data set; extracts the archive if there is only that."""
    if input_root.name == kind.base_folder and input_root.is_dir():
        return input_root.parent
    archive = input_root if input_root.is_file() else input_root / kind.filename
    if (input_root / kind.base_folder).is_dir():
        return input_root
    if not archive.is_file():
        raise UserError(
            f"{input_root}: holds neither {kind.base_folder} nor {kind.filename}; "
            "check --input, or leave it out to download"
        )
    from torchvision.datasets.utils import check_integrity, extract_archive

    if not check_integrity(str(archive), kind.tgz_md5):
        raise UserError(f"{archive}: its MD5 sum is wrong; download it again")
    with quiet():
        extract_archive(str(archive), str(extract_root))
    return extract_root


def _download(kind: Any, name: str, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    with patience():
        try:
            _check_reachable(kind.url)
            if not shows_live_line(sys.stderr):
                print(f"downloading {kind.url} ...", file=sys.stderr, flush=True)
            with quiet():
                download_and_extract_archive(
                    kind.url, str(root), None, kind.filename, kind.tgz_md5, remove_finished=True
                )
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"cannot download {kind.url} ({error}); check the network, or give the data: "
                f"python -m dist_resnet.data.prepare {name} --input FOLDER_WITH_{kind.filename}"
            ) from error


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Bound every wait for the network; torchvision sets no time-out and would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide torchvision's prints and warnings, and its progress bar where there is no terminal."""
    errors = sys.stderr if shows_live_line(sys.stderr) else io.StringIO()
    shown = contextlib.redirect_stderr(errors)
    with contextlib.redirect_stdout(io.StringIO()), shown, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_reachable(url: str) -> None:
    """Raise OSError unless `url` answers soon.

    In a thread, because looking up a name obeys no socket time-out and can take half a minute.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=NETWORK_SECONDS):
                outcome.append(None)
        except Exception as error:  # handed to the waiting thread
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    if not outcome:
        raise OSError(f"no answer within {NETWORK_SECONDS:.0f} s")
    if isinstance(outcome[0], Exception):
        raise OSError(str(outcome[0])) from outcome[0]


def load_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8, as 32x32 RGB: 1,437 to train, 360 to test.

    The split is fixed: of the images sorted by digit every fifth is for testing.
    """
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    labels = np.asarray(bunch.target, np.int64)
    small = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)
    images = np.stack([_enlarge(image) for image in small])
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    train, test = (Split(images[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return ImageSet(tuple(str(digit) for digit in range(10)), train, test)


def _enlarge(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(8, 8) grey -> (32, 32, 3)."""
    large = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
    return np.array(large.convert("RGB"))


def load_synthetic(
    train: int, test: int, classes: int = 10, size: int = 32, seed: int = 0
) -> ImageSet:
    """`train` and `test` images of `size` x `size`: a coarse pattern for each class, plus noise.

    Half of a pixel is noise, half the pattern of its class: at most 127 + 127.
    Labels run 0, 1, ..., classes - 1, 0, ...: balanced. The same arguments give the same bytes
    everywhere: integers only, drawn from the raw bits of Philox, which NumPy never changes.
    Raises UserError for numbers out of range.
    """
    for what, value, most in (
        ("num-train", train, 1 << 30),
        ("num-test", test, 1 << 30),
        ("classes", classes, 1 << 16),
        ("size", size, MAX_SIDE),
    ):
        if not 1 <= value <= most:
            raise UserError(f"--{what} {value}: give a number between 1 and {most}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed {seed}: give a number between 0 and 2^63 - 1")
    coarse = _random_bytes(seed, 0, classes * 48).reshape(classes, 4, 4, 3) >> np.uint8(1)
    cell = np.arange(size) * 4 // size
    patterns: NDArray[np.uint8] = coarse[:, cell][:, :, cell]

    def make(stream: int, number: int) -> Split:
        labels = np.arange(number, dtype=np.int64) % classes

        def read(start: int, stop: int) -> NDArray[np.uint8]:
            pixels = size * size * 3
            noise = _random_bytes(seed, stream, pixels * (stop - start), pixels * start)
            images = noise.reshape(stop - start, size, size, 3)
            images >>= 1
            images += patterns[labels[start:stop]]
            return images

        return Split(LazyImages(number, size, size, read), labels)

    names = tuple(f"class{index:0{len(str(classes - 1))}d}" for index in range(classes))
    return ImageSet(names, make(1, train), make(2, test))


def _random_bytes(seed: int, stream: int, count: int, start: int = 0) -> NDArray[np.uint8]:
    """Bytes `start` to `start + count` of Philox's raw bits; it can be entered anywhere."""
    first, skipped = divmod(start, _PHILOX_BYTES)
    generator = np.random.Philox(key=[seed, stream])
    generator.advance(first)
    words = generator.random_raw((skipped + count + 7) // 8)
    return np.asarray(words, "<u8").view(np.uint8)[skipped : skipped + count]
