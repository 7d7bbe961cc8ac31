"""Numbers, texts, tensors and collections of these: all that a checkpoint may hold."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dist_resnet.base.errors import UserError

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
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)  # of NumPy's float64, which is a float, no checkpoint can be read
    if isinstance(value, str):
        return str.__str__(value)
    if value is None:
        return None
    raise UserError(
        f"optim.name: it keeps a {type(value).__name__} in its state, which no checkpoint can hold"
    )


def restored(saved: Any, held: Any, device: torch.device, placed: Any = None) -> Any:
    """The inverse of `plain`, through all collections.

    Args:
        held: what stands in its place: written into where it fits, as others may hold it too.
        device: of tensors in whose place there is none.
        placed: the same value on other devices, which are taken where `held` has no tensor.
    """
    if isinstance(saved, Tensor):
        if isinstance(held, Tensor) and (held.shape, held.dtype) == (saved.shape, saved.dtype):
            with torch.no_grad():
                return held.copy_(saved)
        example = held if isinstance(held, Tensor) else placed
        return saved.to(example.device if isinstance(example, Tensor) else device, copy=True)
    if isinstance(saved, dict):
        found = {
            key: restored(value, _at(held, key), device, _at(placed, key))
            for key, value in saved.items()
        }
        if not isinstance(held, dict):
            return found
        held.clear()
        held.update(found)
        return held
    if isinstance(saved, list | tuple):
        items = [
            restored(value, _at(held, number), device, _at(placed, number))
            for number, value in enumerate(saved)
        ]
        if isinstance(held, list):
            held[:] = items
            return held
        if isinstance(held, tuple) and hasattr(held, "_fields"):
            return type(held)(*items)
        return tuple(items) if isinstance(saved, tuple) or isinstance(held, tuple) else items
    return saved


def _at(value: Any, key: Any) -> Any:
    if isinstance(value, dict):
        return value.get(key)
    fits = isinstance(value, list | tuple) and isinstance(key, int) and key < len(value)
    return value[key] if fits else None


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
