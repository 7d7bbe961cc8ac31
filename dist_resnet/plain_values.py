"""Numbers, texts, tensors and collections of these: all that a checkpoint may hold."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dist_resnet.errors import UserError

_PLAIN = (bool, int, float, str, type(None))


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, _PLAIN) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return isinstance(value, (*_PLAIN, Tensor))


def tensors(value: Any) -> Iterator[Tensor]:
    """All that are in it, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def copied(value: Any) -> Any:
    """A copy of plain values; what is no plain value itself."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


def plain(value: Any) -> Any:
    """As a checkpoint holds it."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # its layout is kept
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, _PLAIN):
        return value
    kind = type(value).__name__
    raise UserError(f"optim.name: it keeps a {kind} in its state, which no checkpoint can hold")


def changed(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Entries that are new or other than `before`."""
    return {
        key: value
        for key, value in now.items()
        if key not in before or not _same(value, before[key])
    }


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
