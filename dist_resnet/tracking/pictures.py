"""Pictures for the eye, drawn with Pillow: grids of images, confusion matrices.

Shapes: N images, H W pixels, K classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]

_SIDE = 64  # a 32x32 image doubled: below that a caption does not fit
_LINE = 12
_CELL = 36
_NUMBERED = 20  # classes; with more, the numbers would cover each other
_MOST = 1000  # cells on a side


def grid(images: Pixels, captions: Sequence[str] = (), columns: int = 8) -> Pixels:
    """Images side by side, each with its caption below: uint8 (height, width, 3).

    Args:
        images: uint8 (N, H, W, 3), N >= 1.
        captions: N texts of at most two lines, or none.
    """
    count, height, width, _ = images.shape
    scale = max(1, -(-_SIDE // width))
    tall, wide = height * scale, width * scale
    below = 2 * _LINE + 2 if captions else 0
    columns = min(columns, count)
    rows = -(-count // columns)
    size = columns * (wide + 4), rows * (tall + below + 4)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for place, pixels in enumerate(images):
        left = place % columns * (wide + 4) + 2
        top = place // columns * (tall + below + 4) + 2
        tile = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.NEAREST)
        canvas.paste(tile, (left, top))
        if captions:
            pen.text((left, top + tall), captions[place], fill="black", spacing=1)
    return np.asarray(canvas)


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Pixels:
    """A confusion matrix: uint8 (height, width, 3). Darker: a larger share of the true class.

    Args:
        counts: int64 (K, K): rows are true classes, columns predictions.
    """
    number = len(classes)
    if number > _NUMBERED:
        return _unnumbered(counts)
    edge = 8 * max(len(name[:12]) for name in classes) + 8
    side = edge + number * _CELL + 4
    canvas = Image.new("RGB", (side, side + _LINE + 4), "white")
    pen = ImageDraw.Draw(canvas)
    colours = _colours(_shares(counts))
    for row, column in np.ndindex(number, number):
        left, top = edge + column * _CELL, edge + row * _CELL
        box = (left, top, left + _CELL - 2, top + _CELL - 2)
        pen.rectangle(box, fill=tuple(colours[row, column].tolist()))
        if counts[row, column]:
            pen.text((left + 3, top + 11), str(counts[row, column]), fill="black")
    for place, name in enumerate(classes):
        pen.text((4, edge + place * _CELL + 11), name[:12], fill="black")
        _upright(canvas, name[:12], edge + place * _CELL + 11, edge)
    pen.text((4, side), "rows: true class; columns: prediction", fill="black")
    return np.asarray(canvas)


def _unnumbered(counts: NDArray[np.int64]) -> Pixels:
    """Cells alone, all at once: a thousand classes have a million of them."""
    shares = _shares(counts)
    every = -(-len(shares) // _MOST)  # classes that share a cell, which shows the largest share
    if every > 1:
        short = -len(shares) % every
        padded = np.pad(shares, ((0, short), (0, short)))
        blocks = padded.reshape(len(padded) // every, every, len(padded) // every, every)
        shares = blocks.max(axis=(1, 3))
    cell = max(1, 720 // len(shares))
    cells = _colours(shares).repeat(cell, axis=0).repeat(cell, axis=1)
    return np.pad(cells, ((4, 4), (4, 4), (0, 0)), constant_values=255)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _colours(shares: NDArray[np.float64]) -> Pixels:
    """uint8 (K, K, 3): the diagonal green, mistakes red, by the square root: 1% is to be seen."""
    faded = np.round(255 * (1 - shares**0.5)).astype(np.uint8)
    cells = np.stack([np.full_like(faded, 255), faded, faded], axis=-1)
    own = np.arange(len(shares))
    value = faded[own, own]
    cells[own, own] = np.stack([value, 255 - (255 - value) // 3, value], axis=-1)
    return cells


def _upright(canvas: Image.Image, text: str, left: int, bottom: int) -> None:
    """Write `text` from below to above, ending at `bottom`."""
    label = Image.new("RGB", (bottom - 4, _LINE), "white")
    ImageDraw.Draw(label).text((0, 0), text, fill="black")
    canvas.paste(label.rotate(90, expand=True), (left, 0))
