"""A stream of (image, label) pairs as an `ImageSet`: each is checked, none stays in memory."""

import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import printable
from dist_resnet.config.plugins import calling
from dist_resnet.data.decoding import AS_STORED, Decoder, Reading, target_size
from dist_resnet.data.images import ImageSet, Split, progress, same_size, stored_images, tell
from dist_resnet.data.tolerance import STRICT, Tolerance


class _Damaged(UserError):
    """An image that may be left out."""


MAX_CLASSES = 1 << 16
_END = object()


@dataclass(frozen=True)
class Feed:
    """Where pairs come from."""

    key: str
    """With `name`, what errors begin with: key=name."""
    name: str
    pairs: Callable[[str], Iterable[Any]]
    """Of a split, "train" or "test": (image, label) pairs. An image is a PIL image, a uint8 array
    (H, W), (H, W, 1) or (H, W, 3), or the bytes of an image file; a label an int or a str."""
    classes: Sequence[str] | None = None
    """Names of int labels; None: their digits."""


def collect(
    feed: Feed,
    scratch: Path,
    resize: int | None = None,
    reading: Reading = AS_STORED,
    tolerance: Tolerance = STRICT,
) -> ImageSet:
    """Read both splits, the training set first. Labels that are text are numbered by sorted name.

    `scratch`: a folder that takes all pixels, and is needed as long as the result. `resize`: every
    image becomes `resize` x `resize`. Raises UserError naming the item, counted from 0, that has to
    be changed.
    """
    decoder = Decoder(target_size(resize), reading)
    named = feed.classes
    if named is not None and not (
        isinstance(named, list | tuple) and all(isinstance(name, str) for name in named)
        and 0 < len(set(named)) == len(named)
    ):  # fmt: skip
        raise UserError(f"{feed.key}={feed.name}: its classes must be a list of different names")
    limit = tolerance.damaged
    train = _Part(feed, "train", decoder, scratch, None, feed.classes, limit)
    ruined = len(train.damaged) > limit  # the test set's are still to be listed
    classes = None if ruined else feed.classes or train.classes()
    test = _Part(feed, "test", decoder, scratch, train.size, classes, limit)
    tolerance.judge({f"{feed.key}={feed.name}, {p.name}": p.damaged for p in (train, test)})
    assert classes is not None
    if train.texts and test.labels and not test.texts:
        raise UserError(
            f"{feed.key}={feed.name}, test: its labels are numbers and the training images' are "
            "text; give both as one of them"
        )
    names = tuple(map(printable, classes))
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"{feed.key}={feed.name}: two classes read alike, or one has no name")
    seen = set(test.numbers(classes).tolist())
    if absent := [name for number, name in enumerate(names) if number not in seen]:
        tell(f"no test image is of class {', '.join(absent[:5])}{', ...' * (len(absent) > 5)}")
    if doubt := decoder.doubt():
        tell(f"warning: {doubt}")
    return ImageSet(names, train.split(classes), test.split(classes), reading)


class _Part:
    """One split, read."""

    def __init__(
        self,
        feed: Feed,
        split: str,
        decoder: Decoder,
        scratch: Path,
        size: tuple[int, int] | None,
        classes: Sequence[str] | None,
        limit: int,
    ) -> None:
        self.feed, self.name, self.decoder, self.size = feed, split, decoder, size
        self.path = scratch / split
        self.labels = array("q")
        self.damaged: list[str] = []
        self.texts: dict[str, int] = {}  # of labels that are text: their numbers, as they come
        self._allowed = None if classes is None else dict.fromkeys(classes)
        with self.path.open("wb") as file:
            for number, item in enumerate(progress(self._items(), f"reading {split}")):
                where = self._where(number)
                if not isinstance(item, tuple | list) or len(item) != 2:
                    raise UserError(f"{where}: is {_kind(item)}; give an (image, label) pair")
                try:
                    pixels = self._pixels(item[0], where)
                except _Damaged as error:
                    self.damaged.append(str(error))
                    continue
                self.size = same_size(self.size, pixels, where)
                self._add_label(item[1], where)
                file.write(pixels.data)
        if not self.labels and len(self.damaged) <= limit:
            raise UserError(f"{feed.key}={feed.name}: gives no images for {split!r}")

    def _where(self, number: int) -> str:
        return f"{self.feed.key}={self.feed.name}, item {number} of {self.name}"

    def _items(self) -> Iterator[Any]:
        feed = self.feed
        with calling(feed.key, feed.name):
            pairs = feed.pairs(self.name)
            if not isinstance(pairs, Iterable) and not hasattr(pairs, "__getitem__"):
                kind = _kind(pairs)
                raise UserError(
                    f"{feed.key}={feed.name}: gives {kind} for {self.name!r}; give an iterable of "
                    "(image, label) pairs"
                )
            items = iter(pairs)
        number = 0
        while True:
            try:
                with calling(feed.key, f"{feed.name}, item {number} of {self.name}"):
                    item = next(items, _END)
            except UserError as error:
                where = self._where(number)
                text = str(error)
                raise UserError(text if text.startswith(where) else f"{where}: {text}") from error
            if item is _END:
                return
            yield item
            number += 1

    def _pixels(self, given: Any, where: str) -> NDArray[np.uint8]:
        image = given if isinstance(given, bytes | Image.Image) else _checked_array(given, where)
        try:
            if isinstance(image, bytes):
                return self.decoder(image, where)
            opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
            return self.decoder.convert(opened, where)
        except UserError as error:
            raise _Damaged(str(error)) from error

    def _add_label(self, given: Any, where: str) -> None:
        if isinstance(given, str) and self.feed.classes is not None:
            if given not in self.feed.classes:
                named = ", ".join(map(str, self.feed.classes[:5]))
                raise UserError(f"{where}: its label {given!r} is not among its classes: {named}")
            given = list(self.feed.classes).index(given)
        elif isinstance(given, str):
            if self._allowed is not None and given not in self._allowed:
                raise UserError(f"{where}: no training image has its label {given!r}")
            if len(self.texts) < len(self.labels) and not self.texts:
                raise UserError(f"{where}: its label is text and those before it are numbers")
            self.labels.append(self.texts.setdefault(given, len(self.texts)))
            return
        try:
            if isinstance(given, bool):
                raise TypeError
            label = operator.index(given)
        except TypeError:
            raise UserError(f"{where}: its label is {_kind(given)}; give an int or a str") from None
        if self.texts:
            raise UserError(f"{where}: its label is a number and those before it are text")
        most = MAX_CLASSES if self._allowed is None else len(self._allowed)
        if not 0 <= label < most:
            raise UserError(f"{where}: its label is {label}; it must be from 0 to {most - 1}")
        self.labels.append(label)

    def classes(self) -> list[str]:
        """Of the training set's labels."""
        if self.texts:
            return sorted(self.texts)
        found = set(self.labels)
        if missing := set(range(max(found))) - found:
            raise UserError(
                f"{self.feed.key}={self.feed.name}: no training image has the label "
                f"{min(missing)}, but one has {max(found)}; number all classes, from 0"
            )
        return [str(label) for label in range(len(found))]

    def numbers(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """int64 (N,): the label of each image among `classes`."""
        labels = np.array(self.labels, np.int64)
        if not self.texts:
            return labels
        place = {name: index for index, name in enumerate(classes)}
        return np.array([place[name] for name in self.texts], np.int64)[labels]

    def split(self, classes: Sequence[str]) -> Split:
        """The images, which stay in the scratch file, and their labels."""
        assert self.size is not None
        height, width = self.size
        offsets = np.arange(len(self.labels), dtype=np.int64) * (height * width * 3)
        return Split(stored_images(self.path, offsets, height, width), self.numbers(classes))


def _checked_array(given: Any, where: str) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3)."""
    good = isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.size > 0
    if good and given.ndim == 3 and given.shape[2] == 1:
        given = given[..., 0]
    if not good or not (given.ndim == 2 or (given.ndim == 3 and given.shape[2] == 3)):
        raise UserError(
            f"{where}: its image is {_kind(given)}; give a PIL image, or a uint8 array of shape "
            "(H, W) or (H, W, 3)"
        )
    return given


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(value).__name__} of {dtype} and shape {tuple(shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
