"""What a net holds and computes, in a form that can be compared: to find where it changes."""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from logging import Logger
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_Seen = list[tuple[str, Any, Any]]  # a module's name, what was noted before and after it ran
_DEPTH = 5  # of containers and objects in others that are looked into
_INERT = (type, ModuleType, FunctionType, BuiltinFunctionType, Logger)


def digest(value: Any, known: Collection[int] = (), depth: int = _DEPTH) -> Any:
    """Something that differs where `value` does; the type's name for what cannot be compared.

    Args:
        known: ids of objects that are not looked into.
    """
    if id(value) in known:
        return id(value)
    if isinstance(value, Tensor) and not value.is_meta:
        return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, np.ndarray | np.generic):
        return value.tobytes()
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if value is None or isinstance(value, int | float | str | bytes | complex):
        return repr(value)
    kind = type(value).__name__
    if depth == 0:
        return kind

    def inner(item: Any) -> Any:
        return digest(item, known, depth - 1)

    if isinstance(value, dict):
        return [(inner(key), inner(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(inner(item)) for item in value)
    if hasattr(value, "__dict__") and not isinstance(value, _INERT):
        return [kind, inner(vars(value))]
    return kind


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type and the same bits, NaN equal to itself."""
    return one.dtype == other.dtype and digest(one) == digest(other)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Digests of what modules hold beside parameters, buffers and modules, by name."""
    inner, known = vars(nn.Module()).keys(), {id(module) for module in model.modules()}
    return {
        f"{path}.{key}" if path else key: digest(value, known)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in inner
    }


def first_to_move(model: nn.Module, run: Callable[[], Any], stands: Callable[[], Any]) -> str:
    """The first module, inner ones first, that moves what `stands` tells, in a forward pass."""
    with _noting(model, lambda _: stands()) as seen:
        run()
    return _named(model, (path for path, before, after in seen if before != after))


def first_to_differ(model: nn.Module, run: Callable[[], Any]) -> str:
    """The first module, inner ones first, that makes something else of the same inputs."""
    with _noting(model, digest) as one:
        run()
    with _noting(model, digest) as other:
        run()
    pairs = zip(one, other, strict=False)
    return _named(model, (a[0] for a, b in pairs if a[1] == b[1] and a[2] != b[2]))


def _named(model: nn.Module, paths: Iterator[str]) -> str:
    path = next(paths, "")
    return f"the module {path} ({type(model.get_submodule(path)).__name__})" if path else "forward"


@contextmanager
def _noting(model: nn.Module, note: Callable[[Any], Any]) -> Iterator[_Seen]:
    """While open, notes of the inputs and of the output of each module that has run."""
    seen: _Seen = []
    entered: list[Any] = []

    def enter(_module: nn.Module, inputs: Any) -> None:
        entered.append(note(inputs))

    def leave_of(path: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.append((path, entered.pop(), note(output)))

    handles = [m.register_forward_pre_hook(enter) for m in model.modules()]
    handles += [m.register_forward_hook(leave_of(path)) for path, m in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
