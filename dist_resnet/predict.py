"""Classify images: python -m dist_resnet.predict CHECKPOINT_OR_RUN IMAGE_OR_FOLDER ...

CHECKPOINT may be an exported FILE.safetensors.

IMAGE is a file that Pillow reads, a folder (all images below it, hidden files and litter left out,
as data.prepare does) or - (one image on standard input). Images of another size are resized as
the training images were. What is no image is told on standard error and the rest goes on; the exit
code is then 2.
"""

import argparse
import errno
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, EXIT_USER, UserError
from dist_resnet.base.paths import printable, user_path
from dist_resnet.config.plugins import calling
from dist_resnet.data.decoding import Decoder, decodable
from dist_resnet.data.sources.members import explained, members, read_limited

Input = tuple[str, Callable[[], bytes]]  # its name, and its content
_BATCH = 256


def main(arguments: Sequence[str]) -> int:
    """Classify and print; 2 where an image could not be read."""
    options = _parse(arguments)
    import torch

    from dist_resnet.runs.trained import load

    model = load(options.model)
    bits = model.reading.bits if options.bits is None else options.bits
    decode = Decoder(model.image_size, replace(model.reading, bits=bits))
    line = _json_line if options.json else _table_line
    refused = 0
    inputs = _inputs(options.images)
    while part := list(itertools.islice(inputs, _BATCH)):
        images: list[tuple[str, np.ndarray]] = []
        for name, read in part:
            try:
                images.append((name, decode(read(), name)))
            except UserError as error:
                refused += 1
                print(f"dist_resnet: {printable(str(error))}", file=sys.stderr)
        if not images:
            continue
        pixels = np.stack([image for _, image in images])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        with calling("model", str(options.model)), torch.inference_mode():
            shares, order = model(batch).softmax(dim=1).topk(min(options.top, len(model.classes)))
        for (name, _), row, chosen in zip(images, shares.tolist(), order.tolist(), strict=True):
            print(line(name, [(model.classes[k], p) for k, p in zip(chosen, row, strict=True)]))
    if doubt := decode.doubt():
        print(f"dist_resnet: warning: {doubt}", file=sys.stderr)
    return EXIT_USER if refused else EXIT_DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m dist_resnet.predict", __doc__)
    parser.add_argument("model", type=user_path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes shown; default 3")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no table")
    parser.add_argument(
        "--bits", type=int, metavar="N",
        help="of greyscale images stored with 16; default: as the model's training images",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")
    if options.bits is not None and not 8 <= options.bits <= 16:
        raise UserError(f"--bits {options.bits}: give a number between 8 and 16")
    return options


def _inputs(arguments: Sequence[str]) -> Iterator[Input]:
    """Files, in order; a folder gives the images below it, by the rules of data.prepare."""
    for argument in arguments:
        path = user_path(argument)
        if argument == "-":
            yield argument, _read_standard_input
        elif path.is_dir():
            yield from _folder(path)
        else:
            yield argument, functools.partial(_read, path)


def _folder(path: Path) -> Iterator[Input]:
    found = skipped = 0
    try:
        with explained(path):
            for parts, read in members(path):
                if read is not None and os.path.splitext(parts[-1])[1].lower() in decodable()[0]:
                    found += 1
                    yield str(path.joinpath(*parts)), read
                elif read is not None:
                    skipped += 1
        if not found:
            others = f", but {skipped:,} other files" if skipped else ""
            raise UserError(f"{path}: has no images{others}; name a folder that has some")
        if skipped:
            print(f"dist_resnet: skipped {skipped:,} files in {path}, not images", file=sys.stderr)
    except UserError as error:
        yield str(path), functools.partial(_refuse, error)  # told in its turn, and the rest goes on


def _refuse(error: UserError) -> bytes:
    raise error


def _read_standard_input() -> bytes:
    try:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "it is closed")
        return read_limited(sys.stdin.buffer, "-")
    except OSError as error:
        raise UserError(f"standard input: cannot be read: {error.strerror}") from None


def _read(path: Path) -> bytes:
    """Also of a pipe, which the shell's <(...) gives."""
    try:
        with path.open("rb") as file:
            return read_limited(file, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{path!r}: cannot be read: {error}") from None


def _table_line(name: str, found: list[tuple[str, float]]) -> str:
    return f"{printable(name)}  " + "  ".join(f"{label} {share:.1%}" for label, share in found)


def _json_line(name: str, found: list[tuple[str, float]]) -> str:
    top = [{"class": label, "probability": share} for label, share in found]
    return json.dumps({"image": name, "top": top})


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
