"""Images and labels: as sources yield and writers take them, in memory or wherever they lie."""

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dist_resnet.base.errors import UserError
from dist_resnet.base.terminal import say, shows_live_line
from dist_resnet.data.decoding import AS_STORED, Reading

T = TypeVar("T")
MAX_SIDE = 65535  # a .beton stores height and width in 16 bits
BLOCK_BYTES = 1 << 22


class LazyImages:
    """(N, H, W, 3) uint8 that are made or read when they are asked for: memory holds only those.

    Indexed by a number or a slice, as the array would be; `numpy.asarray` gives all of it.

    Args:
        read: the images from one number to another, exclusive.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, number: int, height: int, width: int, read: Callable[[int, int], NDArray[np.uint8]]
    ) -> None:
        self.shape = (number, height, width, 3)
        self._read = read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> NDArray[np.uint8]:
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return self._read(chosen, chosen + 1)[0]
        if len(chosen) > 1 and chosen.step != 1:
            return np.stack([self[number] for number in chosen])
        return self._read(chosen.start, chosen.start + len(chosen))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self[:], dtype)


def stored_images(path: Path, offsets: NDArray[np.int64], height: int, width: int) -> LazyImages:
    """Images that lie raw in a file, each at an offset of its own.

    Read, not mapped: a file that shrinks under a map kills the process. UserError where it has.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        chosen = offsets[start:stop]
        images = np.empty((len(chosen), height, width, 3), np.uint8)
        # Neighbours in the file are read at once: 74 reads instead of 50,000 for CIFAR.
        borders = np.flatnonzero(np.diff(chosen) != height * width * 3) + 1
        for part, places in zip(np.split(images, borders), np.split(chosen, borders), strict=True):
            rest, offset = part.reshape(-1).data, int(places[0]) if len(places) else 0
            while rest:
                count = os.preadv(file, [rest], offset)
                if count == 0:
                    raise UserError(f"{path} has become shorter; start again")
                rest, offset = rest[count:], offset + count
        return images

    images = LazyImages(len(offsets), height, width, read)
    weakref.finalize(images, os.close, file)
    return images


Images = NDArray[np.uint8] | LazyImages


def blocks(images: Images) -> Iterator[NDArray[np.uint8]]:
    """The images in order, some 4 MiB at a time."""
    size = max(1, BLOCK_BYTES // int(np.prod(images.shape[1:])))
    for start in range(0, len(images), size):
        yield np.ascontiguousarray(images[start : start + size])


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images. `images`: (N, H, W, 3) uint8; `labels`: (N,) int64, in [0, classes)."""

    images: Images
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A training and a test split over the same classes; label k means `classes[k]`."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    reading: Reading = AS_STORED

    def validate(self) -> None:
        """Raise UserError unless both splits are non-empty, of one image size, with valid labels.

        Raises TypeError where shapes or dtypes are not those of `Split`: a programming error.
        """
        for what, split in (("training", self.train), ("test", self.test)):
            images, labels = split.images, split.labels
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                raise TypeError(f"images must be (N, H, W, 3) uint8, not {images.shape}")
            if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
                raise TypeError(f"labels must be ({len(images)},) int64, not {labels.shape}")
            if len(split) == 0:
                raise UserError(f"the {what} set has no images; give at least one")
            if not 0 < min(images.shape[1:3]) <= max(images.shape[1:3]) <= MAX_SIDE:
                raise UserError(
                    f"{what} images are {images.shape[2]}x{images.shape[1]}; "
                    f"each side must be between 1 and {MAX_SIDE}"
                )
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise UserError(f"a {what} label is outside of the {len(self.classes)} classes")
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise UserError("training and test images differ in size; resize them alike")


def same_size(
    size: tuple[int, int] | None, image: NDArray[np.uint8], where: str
) -> tuple[int, int]:
    """The (height, width) of an image, which is that of those before it: UserError if not."""
    height, width = image.shape[:2]
    if size is not None and size != (height, width):
        raise UserError(
            f"{where}: is {width}x{height} and those before it {size[1]}x{size[0]}; "
            "resize them alike, or prepare them with --resize N"
        )
    return height, width


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing a bar on stderr, or two plain lines where it is not a terminal."""
    if shows_live_line(sys.stderr):
        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
        return
    tell(f"{what} ...")
    start, count = time.perf_counter(), 0
    for item in items:
        yield item
        count += 1
    seconds = time.perf_counter() - start
    tell(f"{what}: {count:,} in {seconds:.1f} s")


def tell(text: str, stream: TextIO | None = None) -> None:
    """A line for people, on stderr by default; if nobody reads it any more, the work goes on."""
    say(text, stream or sys.stderr)
