"""Options that several sources of data.prepare share, and those of the built-in ones."""

import argparse
import re
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.data.decoding import FITS, Reading
from dist_resnet.data.tolerance import Tolerance

SYNTHETIC = {"num-train": 50_000, "num-test": 10_000, "classes": 10, "size": 32, "seed": 0}
_SKIPPED = 100  # --skip-damaged without a number


def add_input(parser: argparse.ArgumentParser) -> None:
    """Of what is downloaded."""
    parser.add_argument(
        "--input", type=user_path, help="folder with torchvision's files or .tar.gz"
    )


def add_synthetic(parser: argparse.ArgumentParser) -> None:
    """How many, and what they are like."""
    for key, default in SYNTHETIC.items():
        parser.add_argument(f"--{key}", type=int, default=default, help=f"default: {default}")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How image files become pixels, and which may not; see `choices`."""
    parser.add_argument("--resize", type=int, metavar="N", help="make every image NxN")
    parser.add_argument(
        "--fit", choices=FITS, help="how: default stretch; crop and pad (black) keep the aspect"
    )
    parser.add_argument(
        "--bits", type=int, default=16, help="of greyscale stored with 16; default: 16"
    )
    parser.add_argument(
        "--skip-damaged", type=int, nargs="?", const=_SKIPPED, default=0, metavar="N",
        help=f"leave out up to N damaged images of each set ({_SKIPPED} if no N is given)",
    )  # fmt: skip


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Where they lie, and what else may be wrong with them."""
    for split in ("--train", "--test"):
        parser.add_argument(split, type=user_path, required=True, help="folder or archive")
    add_reading(parser)
    parser.add_argument(
        "--allow-missing", action="store_true", help="a class may have no test images"
    )


def set_name(text: str) -> str:
    """A data set's name, or UserError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text):
        raise UserError(f"--name {text!r}: use letters, digits, '.', '_' and '-', no '.' in front")
    return text


def choices(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_reading` asks for, by the names that `load_folder` and `collect` have for it.

    Raises UserError for what cannot be, or would do nothing.
    """
    if not 8 <= options.bits <= 16:
        raise UserError(f"--bits {options.bits}: give a number between 8 and 16")
    if options.fit and options.resize is None:
        raise UserError(f"--fit {options.fit}: says how to resize; give --resize N too")
    if options.skip_damaged < 0:
        raise UserError(f"--skip-damaged {options.skip_damaged}: must be at least 0")
    tolerance = Tolerance(options.skip_damaged, getattr(options, "allow_missing", True))
    reading = Reading(options.fit or FITS[0], options.bits)
    return {"resize": options.resize, "reading": reading, "tolerance": tolerance}
