"""Any classification data set of torchvision that has a training and a test set, by class name."""

import argparse
import inspect
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError, one_line
from dist_resnet.config.keys import nearest
from dist_resnet.data.sources.collect import Feed
from dist_resnet.data.sources.embedded import patience, quiet

# Names of a split, the first that a data set has.
_SPLITS = {"train": ("trainval", "train"), "test": ("test", "val")}


def feed(options: argparse.Namespace, workspace: Path) -> Feed:
    """The data set, downloaded unless it lies in `options.input`.

    Raises UserError where there is no such class, it has no such splits, it cannot be had, or it is
    no set of images of one class each.
    """
    kind = _find(options.what)
    opened = {split: _open(kind, split, options.input, workspace / "download") for split in _SPLITS}
    classes = getattr(opened["train"], "classes", None)

    def pairs(split: str) -> Any:
        data = opened[split]
        return (data[number] for number in range(len(data)))

    return Feed("torchvision", options.what, pairs, classes and list(map(str, classes)))


def _find(name: str) -> Any:
    from torchvision import datasets

    known = [key for key in datasets.__all__ if _parameters(getattr(datasets, key)) is not None]
    if name in known:
        return getattr(datasets, name)
    hint = nearest(name, known) or next((k for k in known if k.lower() == name.lower()), "")
    if name in datasets.__all__:
        raise UserError(
            f"torchvision {name}: has no training and test set of its own; write a few lines of "
            "Python that give them, and prepare these: source module:callable"
        )
    raise UserError(f"torchvision {name}: no such data set{hint and f'; did you mean {hint}?'}")


def _parameters(kind: Any) -> set[str] | None:
    """Arguments of a data set's class; None: it has no root, or nothing that names a split."""
    if not isinstance(kind, type):
        return None
    names = set(inspect.signature(kind).parameters)
    return names if "root" in names and names & {"train", "split"} else None


def _open(kind: Any, split: str, root: Path | None, download: Path) -> Any:
    names = _parameters(kind) or set()
    given: dict[str, Any] = {"root": str(root or download)}
    if "download" in names:
        given["download"] = root is None
    elif root is None:
        raise UserError(f"torchvision {kind.__name__}: cannot be downloaded; give --input ROOT")
    if root is None:
        download.mkdir(parents=True, exist_ok=True)
    choices: list[dict[str, Any]] = [{"split": name} for name in _SPLITS[split]]
    if "train" in names:
        choices = [{"train": split == "train"}]
    refusal = ""
    for choice in choices:
        try:
            with patience(), quiet():
                return kind(**given, **choice)
        except Exception as error:  # whatever an incomplete or unreachable data set makes it raise
            if isinstance(error, ValueError) and "argument split" in str(error):
                refusal = one_line(error)
                continue
            remedy = "check the network, or give the data" if root is None else "check"
            raise UserError(
                f"torchvision {kind.__name__}: {one_line(error)}; {remedy}: --input ROOT, the "
                "folder that torchvision would download to"
            ) from error
    raise UserError(f"torchvision {kind.__name__}: has no {split} set: {refusal}")
