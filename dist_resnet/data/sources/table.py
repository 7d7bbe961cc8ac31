"""Every source of images by its name, and the command line of data.prepare that follows."""

import argparse
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dist_resnet.base.cli import Parser
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.data.images import ImageSet
from dist_resnet.data.sources import from_arrow, from_callable, from_shards, from_torchvision
from dist_resnet.data.sources.arguments import (
    SYNTHETIC,
    add_folder,
    add_input,
    add_synthetic,
    reading_of,
    set_name,
    tolerance_of,
)
from dist_resnet.data.sources.embedded import CIFAR, load_cifar, load_digits, load_synthetic
from dist_resnet.data.sources.folder import load_folder


@dataclass(frozen=True)
class Source:
    """One way to get a data set."""

    about: str
    """For --help."""
    load: Callable[[argparse.Namespace, Path], ImageSet]
    """The images, of its options and a workspace: an empty folder, there as long as they are."""
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    """Beside --output and --name. One called `what` says which of many data sets is meant."""


def _cifar(options: argparse.Namespace, workspace: Path) -> ImageSet:
    return load_cifar(options.source, options.input, workspace / "download")


def _folder(options: argparse.Namespace, workspace: Path) -> ImageSet:
    reading, tolerance = reading_of(options), tolerance_of(options)
    return load_folder(options.train, options.test, workspace, options.resize, reading, tolerance)


def _synthetic(options: argparse.Namespace, workspace: Path) -> ImageSet:
    return load_synthetic(*(getattr(options, key.replace("-", "_")) for key in SYNTHETIC))


SOURCES = {
    **dict.fromkeys(CIFAR, Source("downloaded, or --input ROOT", _cifar, add_input)),
    "folder": Source("class folders, .tar* or .zip", _folder, add_folder),
    "digits": Source("1,797 bundled digits, 32x32", lambda options, workspace: load_digits()),
    "synthetic": Source("a pattern a class, noise", _synthetic, add_synthetic),
    "torchvision": Source(
        "a data set of torchvision by class name",
        from_torchvision.load,
        from_torchvision.add_options,
    ),
    "huggingface": Source(
        "a saved Hugging Face data set, or parquet files", from_arrow.load, from_arrow.add_options
    ),
    "webdataset": Source("WebDataset shards", from_shards.load, from_shards.add_options),
    "source": Source("your own: module:callable", from_callable.load, from_callable.add_options),
}


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m dist_resnet.data.prepare --help")


def parser(about: str = "") -> argparse.ArgumentParser:
    """Its options; errors are UserErrors."""
    parser = _Parser(prog="python -m dist_resnet.data.prepare", description=about)
    common = _Parser(add_help=False)
    common.add_argument("--output", type=user_path, default="data", help="default: data")
    common.add_argument("--name", type=set_name, help="of the data set; default: the source's")
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, source in SOURCES.items():
        source.add_options(sources.add_parser(name, parents=[common], help=source.about))
    return parser


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
    return shlex.join(words + (["--bits", str(options.bits)] if options.bits != 16 else []))
