"""Every source of images by its name, and the command line of data.prepare that follows."""

import argparse
import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_resnet.base.cli import Parser
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.plugins import resolve, signature
from dist_resnet.data.decoding import FITS, Reading
from dist_resnet.data.images import ImageSet
from dist_resnet.data.sources import from_arrow, from_shards, from_torchvision
from dist_resnet.data.sources.collect import Feed, collect
from dist_resnet.data.sources.embedded import CIFAR, load_cifar, load_digits, load_synthetic
from dist_resnet.data.sources.folder import load_folder
from dist_resnet.data.tolerance import Tolerance

Load = Callable[[argparse.Namespace, Path], ImageSet]
Option = tuple[str, dict[str, Any]]  # what argparse's `add_argument` takes

KEY = "data.source"
_SKIPPED = 100  # --skip-damaged without a number
_SYNTHETIC = {"num-train": 50_000, "num-test": 10_000, "classes": 10, "size": 32, "seed": 0}


@dataclass(frozen=True)
class Source:
    """One way to get a data set."""

    about: str
    """For --help."""
    load: Load
    """The images, of its options and a workspace: an empty folder, there as long as they are."""
    options: Sequence[Option] = ()
    """Beside --output and --name. One called `what` says which of many data sets is meant."""


def _option(name: str, **settings: Any) -> Option:
    return name, settings


def _cifar(options: argparse.Namespace, workspace: Path) -> ImageSet:
    return load_cifar(options.source, options.input, workspace / "download")


def _folder(options: argparse.Namespace, workspace: Path) -> ImageSet:
    return load_folder(options.train, options.test, workspace, **_choices(options))


def _synthetic(options: argparse.Namespace, workspace: Path) -> ImageSet:
    return load_synthetic(*(getattr(options, key.replace("-", "_")) for key in _SYNTHETIC))


def _collected(feed: Callable[[argparse.Namespace, Path], Feed]) -> Load:
    return lambda options, workspace: collect(
        feed(options, workspace), workspace, **_choices(options)
    )


def _callable_feed(options: argparse.Namespace, workspace: Path) -> Feed:
    """What a callable of the user's, module:callable, gives for "train" and for "test".

    It may have an attribute `classes`, names of its int labels. Raises UserError where it cannot be
    found or called.
    """
    name = options.what
    function = resolve(KEY, name)
    for parameter in [*(signature(function) or {}).values()][1:]:
        optional = parameter.default is not inspect.Parameter.empty
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not (optional or variable):
            raise UserError(
                f"{KEY}={name}: is called with the split alone; give {parameter.name} a default"
            )
    return Feed(KEY, name, function, getattr(function, "classes", None))


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of `_READING` ask for, by the names of `load_folder` and `collect`.

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


_ARROW = "folder of save_to_disk or of parquet files, a parquet file, or a pattern of such"
_INPUT = _option("--input", type=user_path, help="folder with torchvision's files or .tar.gz")
_READING = (
    _option("--resize", type=int, metavar="N", help="make every image NxN"),
    _option(
        "--fit", choices=FITS, help="how: default stretch; crop and pad (black) keep the aspect"
    ),
    _option("--bits", type=int, default=16, help="of greyscale stored with 16; default: 16"),
    _option(
        "--skip-damaged", type=int, nargs="?", const=_SKIPPED, default=0, metavar="N",
        help=f"leave out up to N damaged images of each set ({_SKIPPED} if no N is given)",
    ),
)  # fmt: skip
SOURCES = {
    **dict.fromkeys(CIFAR, Source("downloaded, or --input ROOT", _cifar, [_INPUT])),
    "folder": Source("class folders, .tar* or .zip", _folder, [
        _option("--train", type=user_path, required=True, help="folder or archive"),
        _option("--test", type=user_path, required=True, help="folder or archive"),
        *_READING,
        _option("--allow-missing", action="store_true", help="a class may have no test images"),
    ]),
    "digits": Source("1,797 bundled digits, 32x32", lambda options, workspace: load_digits()),
    "synthetic": Source("a pattern a class, noise", _synthetic, [
        _option(f"--{key}", type=int, default=default, help=f"default: {default}")
        for key, default in _SYNTHETIC.items()
    ]),
    "torchvision": Source(
        "a data set of torchvision by class name", _collected(from_torchvision.feed), [
            _option("what", metavar="CLASS", help="such as SVHN, FashionMNIST or STL10"),
            _INPUT,
            *_READING,
        ],
    ),
    "huggingface": Source(
        "a saved Hugging Face data set, or parquet files", _collected(from_arrow.feed), [
            _option("what", metavar="PATH", help=_ARROW),
            _option("--test", metavar="PATH", help="the test set, where PATH has none"),
            _option("--image-column", metavar="NAME", help="default: the one there is"),
            _option("--label-column", metavar="NAME", help="default: the one there is"),
            *_READING,
        ],
    ),
    "webdataset": Source("WebDataset shards", _collected(from_shards.feed), [
        _option("what", metavar="SHARDS", help="such as 'train-{000..099}.tar'"),
        _option("--test", metavar="SHARDS", required=True, help="those of the test set"),
        *_READING,
    ]),
    "source": Source("your own: module:callable", _collected(_callable_feed), [
        _option("what", metavar="module:callable", help="gives (image, label) of a split"),
        *_READING,
    ]),
}  # fmt: skip


def parser(about: str = "") -> argparse.ArgumentParser:
    """Its options; errors are UserErrors."""
    parser = Parser("python -m dist_resnet.data.prepare", description=about)
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    common = (
        _option("--output", type=user_path, default="data", help="default: data"),
        _option("--name", type=set_name, help="of the data set; default: the source's"),
    )
    for name, source in SOURCES.items():
        own = sources.add_parser(name, help=source.about)
        for option, settings in (*common, *source.options):
            own.add_argument(option, **settings)
    return parser


def set_name(text: str) -> str:
    """A data set's name, or UserError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text):
        raise UserError(f"--name {text!r}: use letters, digits, '.', '_' and '-', no '.' in front")
    return text


def default_name(options: argparse.Namespace) -> str:
    """The name of a data set that is given none: birds of my_data:birds or sets/birds.parquet."""
    what = getattr(options, "what", None)
    if what is None:
        return str(options.source)
    stem = re.split(r"[/:]", what.rstrip("/"))[-1].removesuffix(".parquet").removesuffix(".tar")
    return set_name(re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.").lower() or options.source)


def recorded_source(options: argparse.Namespace) -> str:
    """What a prepared data set tells of where it is from: the words that prepare it again."""
    what = getattr(options, "what", None)
    if what is None:
        return str(options.source)
    words = [options.source, what]
    for key in ("input", "test", "image_column", "label_column", "resize", "fit"):
        if (value := getattr(options, key, None)) is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    for key, usual in (("bits", 16), ("skip_damaged", 0)):
        if (value := getattr(options, key)) != usual:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)
