"""Classify images: python -m dist_resnet.predict CHECKPOINT_OR_RUN IMAGE_OR_FOLDER ...

    --top K    classes shown for each image (default 3)
    --json     one JSON object a line instead of a table

IMAGE is a file that Pillow reads, a folder (all images below it) or - (one image on standard
input). Images of another size are resized. What is no image is told on standard error and the rest
goes on; the exit code is then 2.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dist_resnet.cli import run_command
from dist_resnet.data.images import decodable, decode_image
from dist_resnet.errors import EXIT_DONE, EXIT_USER, UserError

_BATCH = 256


def main(arguments: Sequence[str]) -> int:
    """Classify and print; 2 where an image could not be read."""
    options = _parse(arguments)
    import torch

    from dist_resnet.trained import load

    model = load(options.model)
    line = _json_line if options.json else _table_line
    refused = 0
    inputs = _inputs(options.images)
    while names := list(itertools.islice(inputs, _BATCH)):
        images: dict[str, np.ndarray] = {}
        for name in names:
            try:
                images[name] = _read(name, model.image_size)
            except UserError as error:
                refused += 1
                print(f"dist_resnet: {error}", file=sys.stderr)
        if not images:
            continue
        batch = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            shares, order = model(batch).softmax(dim=1).topk(min(options.top, len(model.classes)))
        for name, row, chosen in zip(images, shares.tolist(), order.tolist(), strict=True):
            print(line(name, [(model.classes[k], p) for k, p in zip(chosen, row, strict=True)]))
    return EXIT_USER if refused else EXIT_DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dist_resnet.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CHECKPOINT_OR_RUN IMAGE_OR_FOLDER ... [--top K] [--json]",
    )
    parser.add_argument("model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("images", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--top", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")
    return options


def _inputs(arguments: Sequence[str]) -> Iterator[str]:
    """Files, in order; a folder gives the images below it, sorted."""
    for argument in arguments:
        path = Path(argument)
        if argument != "-" and path.is_dir():
            known = decodable()[0]
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
            yield from map(str, found)
        else:
            yield argument


def _read(where: str, size: tuple[int, int]) -> np.ndarray:
    try:
        data = sys.stdin.buffer.read() if where == "-" else Path(where).read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    pixels = decode_image(data, where)
    if pixels.shape[:2] == size:
        return pixels
    resized = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _table_line(name: str, found: list[tuple[str, float]]) -> str:
    return f"{name}  " + "  ".join(f"{label} {share:.1%}" for label, share in found)


def _json_line(name: str, found: list[tuple[str, float]]) -> str:
    top = [{"class": label, "probability": share} for label, share in found]
    return json.dumps({"image": name, "top": top})


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
