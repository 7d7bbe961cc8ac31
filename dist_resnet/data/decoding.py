"""How one image file becomes pixels.

- Every format that Pillow decodes by itself (first frame), turned upright by its EXIF tag or its
  XMP. Transparency is composited on white, 16-bit greyscale keeps its upper byte, floating point is
  refused (no agreed range).
"""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dist_resnet.base.errors import UserError

# Formats that Pillow passes to another program (Ghostscript, Windows) or only identifies.
NOT_DECODED = {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
FITS = ("stretch", "crop", "pad")
MAX_RESIZED_PIXELS = 1 << 30  # 3 GiB as RGB
_DEEP_COLOUR = re.compile(";16[BLN]")  # in Pillow's name of how the file stores a pixel
_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")
_BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Reading:
    """What a data set's pixels depend on, beside its files: a trained model reads others alike.

    `fit`: how an image of another shape becomes one of the set's: its sides are stretched, or the
    middle is cut out, or black is added; the last two keep its aspect. `bits`: of greyscale images
    that are stored with 16.
    """

    fit: str = "stretch"
    bits: int = 16


AS_STORED = Reading()


def target_size(resize: int | None) -> tuple[int, int] | None:
    """(height, width) that --resize asks for; UserError for what cannot be."""
    if resize is not None and not 1 <= resize <= 4096:
        raise UserError(f"--resize {resize}: give a side between 1 and 4096")
    return None if resize is None else (resize, resize)


def stored_reading(raw: Any) -> Reading:
    """A `Reading` as JSON or a checkpoint holds it; older ones do not. ValueError if damaged."""
    reading = Reading(**raw) if isinstance(raw, dict) else AS_STORED
    if reading.fit not in FITS or reading.bits not in range(8, 17):
        raise ValueError(f"reading is {raw!r}")
    return reading


@functools.cache
def decodable() -> tuple[frozenset[str], tuple[str, ...]]:
    """File extensions of images, and the Pillow formats that may decode them."""
    extensions = Image.registered_extensions()  # loads every plugin
    formats = tuple(name for name in Image.OPEN if name not in NOT_DECODED)
    known = {end for end, name in extensions.items() if name in formats} | {".mpo"}
    return frozenset(known), formats


class Decoder:
    """Decodes image files alike, and watches how deep they are.

    `size`: (height, width) that every image becomes (bilinear, by `reading.fit`); None: its own.
    """

    def __init__(self, size: tuple[int, int] | None = None, reading: Reading = AS_STORED) -> None:
        self.size = size
        self.reading = reading
        self._deep = 0
        self._largest = 0

    def __call__(self, data: bytes, where: str) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of one file; `where` names it in errors.

        Raises UserError where Pillow cannot decode it, it is truncated, holds floating-point pixels
        or values of more bits than `reading` says, or has more pixels than Pillow's limit against
        decompression bombs; if it is resized, than `MAX_RESIZED_PIXELS`.
        """
        file, formats = io.BytesIO(data), decodable()[1]
        with self._guarded(where), Image.open(file, formats=formats) as image:
            return self._pixels(image)

    def convert(self, image: Image.Image, where: str) -> NDArray[np.uint8]:
        """As `__call__`, of an image that is open already, and stays as it is."""
        with self._guarded(where):
            return self._pixels(image.copy())

    def _pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or MAX_RESIZED_PIXELS):
            raise Image.DecompressionBombError
        deep_colour = _DEEP_COLOUR.search(str(getattr(image, "tile", ())[:1]))
        image.load()
        _turn_upright(image)
        rgb = self._shallow(image) if image.mode.startswith("I") else _to_rgb(image)
        if deep_colour and not image.mode.startswith("I"):
            self._note_colour(rgb)
        return np.array(self._resized(rgb))

    @contextlib.contextmanager
    def _guarded(self, where: str) -> Iterator[None]:
        """Turn what a decoder raises into a UserError.

        Pillow's limit is higher where the pixels are not kept; and it gives no warnings.
        """
        before = Image.MAX_IMAGE_PIXELS
        if self.size is not None:
            Image.MAX_IMAGE_PIXELS = MAX_RESIZED_PIXELS
        try:
            with warnings.catch_warnings():
                # About single files: size, palettes. What matters here is an error.
                warnings.filterwarnings("ignore", module="PIL")
                yield
            return
        except UnidentifiedImageError:  # its message prints an address in memory
            reason = "is not an image or is damaged; replace or remove it"
        except Image.DecompressionBombError:
            hint = "give --resize N or " if self.size is None else ""
            reason = f"has too many pixels; {hint}make it smaller"
        except MemoryError:
            raise
        except Exception as error:  # decoders of damaged files raise whatever they stumble over
            reason = f"cannot be decoded ({error}); replace or remove it"
        finally:
            Image.MAX_IMAGE_PIXELS = before
        raise UserError(f"{where}: {reason}")

    def doubt(self) -> str | None:
        """What is suspicious about the 16-bit images so far; None: nothing."""
        bits = max(8, self._largest.bit_length())
        if self.reading.bits < 16 or self._deep == 0 or bits > 14:
            return None
        return (
            f"no value in {self._deep:,} 16-bit images is above {self._largest:,}, so they become "
            f"dark: if their data have {bits} bits, give --bits {bits}"
        )

    def _shallow(self, image: Image.Image) -> Image.Image:
        """8-bit RGB of 16-bit greyscale: 16-bit PNGs are "I;16", some 16-bit PGMs and TIFFs "I"."""
        deep = np.asarray(image)
        largest, bits = int(deep.max()), self.reading.bits
        if deep.min() < 0 or largest > 65535:
            raise ValueError("pixels of more than 16 bits; save it with 8 bits a channel")
        if largest >= 1 << bits:
            raise ValueError(f"a pixel of {largest}, which has more than --bits {bits}")
        self._deep += 1
        self._largest = max(self._largest, largest)
        # Pillow's own conversion clips at 255. The upper byte is what it takes of 16-bit RGB.
        return Image.fromarray((deep >> (bits - 8)).astype(np.uint8)).convert("RGB")

    def _note_colour(self, rgb: Image.Image) -> None:
        """Of 16-bit colour Pillow gives the upper bytes alone."""
        if self.reading.bits < 16:
            raise ValueError("16-bit colour, and --bits is for greyscale; save it with 8 bits")
        highest = int(np.asarray(rgb).max())
        self._deep += 1
        self._largest = max(self._largest, highest << 8 | 255)

    def _resized(self, rgb: Image.Image) -> Image.Image:
        if self.size is None or rgb.size == self.size[::-1]:
            return rgb
        if self.reading.fit == "crop":
            return ImageOps.fit(rgb, self.size[::-1], _BILINEAR)
        if self.reading.fit == "pad":
            return ImageOps.pad(rgb, self.size[::-1], _BILINEAR)
        return rgb.resize(self.size[::-1], _BILINEAR)


def _turn_upright(image: Image.Image) -> None:
    """By the EXIF tag, or else by the XMP, which Pillow reads in one spelling alone."""
    exif, tag = image.getexif(), ExifTags.Base.Orientation
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    found = _XMP.search(xmp.encode() if isinstance(xmp, str) else xmp)
    if tag not in exif and found:
        exif[tag] = int(found[1])
    ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode of up to 8 bits a channel."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    if image.has_transparency_data:
        # Not `convert("RGB")`, which reveals whatever colour lies below transparent pixels.
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
