"""A data set of your own: a callable that yields the images and labels of a split.

python -m dist_resnet.train data.dataset=shapes data.source=examples.own_data:shapes train.epochs=3
"""

import random
from collections.abc import Iterator

from PIL import Image, ImageDraw

IMAGES = {"train": 1500, "test": 300}


def shapes(split: str) -> Iterator[tuple[Image.Image, str]]:
    """Circles and squares of any colour at any place; `split`: "train" or "test"."""
    draw_from = random.Random(split)
    for _ in range(IMAGES[split]):
        kind = draw_from.choice(["circle", "square"])
        image = Image.new("RGB", (32, 32), tuple(draw_from.randrange(128) for _ in range(3)))
        side, left, top = (draw_from.randint(8, 16) for _ in range(3))
        colour = tuple(draw_from.randrange(128, 256) for _ in range(3))
        pen, box = ImageDraw.Draw(image), (left, top, left + side, top + side)
        (pen.ellipse if kind == "circle" else pen.rectangle)(box, fill=colour)
        yield image, kind
