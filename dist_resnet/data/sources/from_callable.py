"""Images and labels of a callable of the user's: module:callable."""

import argparse
import inspect
from pathlib import Path

from dist_resnet.base.errors import UserError
from dist_resnet.config.plugins import resolve, signature
from dist_resnet.data.images import ImageSet
from dist_resnet.data.sources.arguments import add_reading, choices
from dist_resnet.data.sources.collect import Feed, collect

KEY = "data.source"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("what", metavar="module:callable", help="gives (image, label) of a split")
    add_reading(parser)


def load(options: argparse.Namespace, workspace: Path) -> ImageSet:
    """What the callable gives for "train" and for "test".

    It may have an attribute `classes`, names of its int labels. Raises UserError where it cannot be
    found or called, and as `collect` does.
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
    feed = Feed(KEY, name, function, getattr(function, "classes", None))
    return collect(feed, workspace, **choices(options))
