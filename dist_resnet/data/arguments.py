"""The command line of dist_resnet.data.prepare."""

import argparse
import re
from typing import NoReturn

from dist_resnet.data.decoding import FITS, Reading
from dist_resnet.data.folder import Tolerance
from dist_resnet.data.sources import CIFAR
from dist_resnet.errors import UserError
from dist_resnet.paths import user_path

SYNTHETIC = {"num-train": 50_000, "num-test": 10_000, "classes": 10, "size": 32, "seed": 0}
_SKIPPED = 100  # --skip-damaged without a number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m dist_resnet.data.prepare --help")


def parser(about: str) -> argparse.ArgumentParser:
    """Its options; errors are UserErrors."""
    parser = _Parser(prog="python -m dist_resnet.data.prepare", description=about)
    common = _Parser(add_help=False)
    common.add_argument("--output", type=user_path, default="data", help="default: data")
    common.add_argument("--name", type=_name, help="of the data set; default: the source's")
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name in CIFAR:
        cifar = sources.add_parser(name, parents=[common], help="downloaded, or --input ROOT")
        cifar.add_argument(
            "--input", type=user_path, help="folder with torchvision's files or .tar.gz"
        )
    _add_folder(sources.add_parser("folder", parents=[common], help="class folders, .tar* or .zip"))
    sources.add_parser("digits", parents=[common], help="1,797 bundled digits, 32x32")
    synthetic = sources.add_parser("synthetic", parents=[common], help="a pattern a class, noise")
    for key, default in SYNTHETIC.items():
        synthetic.add_argument(f"--{key}", type=int, default=default, help=f"default: {default}")
    return parser


def _add_folder(folder: argparse.ArgumentParser) -> None:
    for split in ("--train", "--test"):
        folder.add_argument(split, type=user_path, required=True, help="folder or archive")
    folder.add_argument("--resize", type=int, metavar="N", help="make every image NxN")
    folder.add_argument(
        "--fit", choices=FITS, help="how: default stretch; crop and pad (black) keep the aspect"
    )
    folder.add_argument(
        "--bits", type=int, default=16, help="of greyscale stored with 16; default: 16"
    )
    folder.add_argument(
        "--skip-damaged", type=int, nargs="?", const=_SKIPPED, default=0, metavar="N",
        help=f"leave out up to N damaged images of each set ({_SKIPPED} if no N is given)",
    )  # fmt: skip
    folder.add_argument(
        "--allow-missing", action="store_true", help="a class may have no test images"
    )


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text):
        raise UserError(f"--name {text!r}: use letters, digits, '.', '_' and '-', no '.' in front")
    return text


def reading_of(options: argparse.Namespace) -> Reading:
    """How images are read. UserError for what cannot be, or would do nothing."""
    if not 8 <= options.bits <= 16:
        raise UserError(f"--bits {options.bits}: give a number between 8 and 16")
    if options.fit and options.resize is None:
        raise UserError(f"--fit {options.fit}: says how to resize; give --resize N too")
    return Reading(options.fit or FITS[0], options.bits)


def tolerance_of(options: argparse.Namespace) -> Tolerance:
    """What may be wrong with the images."""
    if options.skip_damaged < 0:
        raise UserError(f"--skip-damaged {options.skip_damaged}: must be at least 0")
    return Tolerance(options.skip_damaged, options.allow_missing)
