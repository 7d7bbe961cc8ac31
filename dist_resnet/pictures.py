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
    numbered = number <= _NUMBERED
    cell = _CELL if numbered else max(2, 720 // number)
    names = [name[:12] for name in classes] if numbered else []
    edge = 8 * max(map(len, names)) + 8 if names else 4
    side = edge + number * cell + 4
    canvas = Image.new("RGB", (side, side + _LINE + 4), "white")
    pen = ImageDraw.Draw(canvas)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (row, column), share in np.ndenumerate(shares):
        left, top = edge + column * cell, edge + row * cell
        # The diagonal green, mistakes red, by the square root: 1% is to be seen too.
        faded = round(255 * (1 - float(share) ** 0.5))
        colour = (faded, 255 - (255 - faded) // 3, faded) if row == column else (255, faded, faded)
        pen.rectangle((left, top, left + cell - 2, top + cell - 2), fill=colour)
        if numbered and counts[row, column]:
            pen.text((left + 3, top + 11), str(counts[row, column]), fill="black")
    for place, name in enumerate(names):
        pen.text((4, edge + place * cell + 11), name, fill="black")
        _upright(canvas, name, edge + place * cell + 11, edge)
    pen.text((4, side), "rows: true class; columns: prediction", fill="black")
    return np.asarray(canvas)


def _upright(canvas: Image.Image, text: str, left: int, bottom: int) -> None:
    """Write `text` from below to above, ending at `bottom`."""
    label = Image.new("RGB", (bottom - 4, _LINE), "white")
    ImageDraw.Draw(label).text((0, 0), text, fill="black")
    canvas.paste(label.rotate(90, expand=True), (left, 0))
