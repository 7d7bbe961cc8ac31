"""Images and labels in memory: as sources yield and writers take them, and how files decode."""

import functools
import io
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from dist_resnet.errors import UserError

T = TypeVar("T")
MAX_SIDE = 65535  # a .beton stores height and width in 16 bits
# Formats that Pillow passes to another program (Ghostscript, Windows) or only identifies.
NOT_DECODED = {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images. `images`: (N, H, W, 3) uint8; `labels`: (N,) int64, in [0, classes)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A training and a test split over the same classes; label k means `classes[k]`."""

    classes: tuple[str, ...]
    train: Split
    test: Split

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


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing a bar on stderr, or two plain lines where it is not a terminal."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
        return
    print(f"{what} ...", file=sys.stderr, flush=True)
    start, count = time.perf_counter(), 0
    for item in items:
        yield item
        count += 1
    seconds = time.perf_counter() - start
    print(f"{what}: {count:,} in {seconds:.1f} s", file=sys.stderr, flush=True)


@functools.cache
def decodable() -> tuple[frozenset[str], tuple[str, ...]]:
    """File extensions of images, and the Pillow formats that may decode them."""
    extensions = Image.registered_extensions()  # loads every plugin
    formats = tuple(name for name in Image.OPEN if name not in NOT_DECODED)
    known = {end for end, name in extensions.items() if name in formats} | {".mpo"}
    return frozenset(known), formats


def decode_image(data: bytes, where: str, resize: int | None = None) -> NDArray[np.uint8]:
    """Decode one image file into (H, W, 3) uint8 RGB; `where` names it in errors.

    The first frame, turned upright by its EXIF tag. Transparency is composited on white, 16-bit
    greyscale keeps its upper byte; `resize` gives `resize` x `resize` (bilinear).
    Raises UserError where Pillow cannot decode it, it is truncated, holds floating-point pixels or
    has more pixels than Pillow's limit against decompression bombs.
    """
    try:
        with Image.open(io.BytesIO(data), formats=decodable()[1]) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
                raise Image.DecompressionBombError(f"{image.width}x{image.height} is too large")
            image.load()
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            rgb = _to_rgb(upright)
            if resize is not None:
                rgb = rgb.resize((resize, resize), Image.Resampling.BILINEAR)
            return np.array(rgb)
    except UnidentifiedImageError:  # its message prints an address in memory
        raise UserError(f"{where}: is not an image or is damaged; replace or remove it") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise UserError(f"{where}: cannot be decoded ({error}); replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode; see `decode_image`."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16-bit PNGs are "I;16", some 16-bit PGMs and TIFFs "I"
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("pixels of more than 16 bits; save it with 8 bits a channel")
        # Pillow's own conversion clips at 255. The upper byte is what it takes of 16-bit RGB.
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # Not `convert("RGB")`, which reveals whatever colour lies below transparent pixels.
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
