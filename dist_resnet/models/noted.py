"""What a net holds and computes, in a form that can be compared: to find where it changes."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_Seen = list[tuple[str, Any]]  # a module's name, and what was noted when it had run
_DEPTH = 3  # of containers in containers that are looked into


def digest(value: Any, depth: int = _DEPTH) -> Any:
    """Something that differs where `value` does; the type's name for what cannot be compared."""
    if isinstance(value, Tensor):
        return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
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
    if isinstance(value, dict) and depth:
        return [(repr(key), digest(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque) and depth:
        return [digest(item, depth - 1) for item in value]
    return type(value).__name__


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type and the same bits, NaN equal to itself."""
    return one.dtype == other.dtype and digest(one) == digest(other)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Digests of what modules hold beside parameters, buffers and modules, by name."""
    inner = vars(nn.Module()).keys()
    return {
        f"{path}.{key}" if path else key: digest(value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in inner
    }


def first_difference(
    model: nn.Module, run: Callable[[], Any], note: Callable[[Any], Any], start: Any = None
) -> str:
    """The first module, inner ones first, after which something is noted that differs.

    Args:
        run: a forward pass.
        note: what to compare, of a module's output.
        start: with what; None: with what another run notes there.
    """
    with _noting(model, note) as seen:
        run()
    reference: _Seen = [(name, start) for name, _ in seen]
    if start is None:
        with _noting(model, note) as reference:
            run()
    for (name, one), (_, other) in zip(seen, reference, strict=False):
        if one != other and name:
            return f"the module {name} ({type(model.get_submodule(name)).__name__})"
    return "the net itself"


@contextmanager
def _noting(model: nn.Module, note: Callable[[Any], Any]) -> Iterator[_Seen]:
    seen: _Seen = []

    def hook_of(path: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.append((path, note(output)))

    handles = [m.register_forward_hook(hook_of(path)) for path, m in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
