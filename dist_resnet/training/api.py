"""What the commands that Python can call too have in common.

import dist_resnet
summary = dist_resnet.train("configs/digits.yaml", train={"epochs": 3}, seed=1)
figures = dist_resnet.evaluate("runs/NAME", eval={"flip_tta": True})
model = dist_resnet.load("runs/NAME")
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import ModuleType
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.schema import Config

_ALONE = threading.Lock()


def as_argument(source: Any) -> str | Mapping[str, Any]:
    """A configuration, a mapping of keys, a path or a text, as `load_config` takes it."""
    if isinstance(source, Config):
        return asdict(source)
    return source if isinstance(source, Mapping) else str(source)


def callable_module(name: str, function: Callable[..., Any]) -> None:
    """Let the module `name` be called: a command's module and its function have one name."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    CallableModule.__call__.__doc__ = function.__doc__
    sys.modules[name].__class__ = CallableModule


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """While open, torch is set as it is when a process starts; then the caller's settings are back.

    Raises:
        UserError: it is open already, in another thread: both would set torch's generators.
    """
    import torch

    if not _ALONE.acquire(blocking=False):
        raise UserError("another training runs in this process: wait for it, or start a process")
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    card = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with ExitStack() as settings:
            settings.enter_context(torch.inference_mode(False))
            settings.enter_context(torch.enable_grad())
            if _within_autocast():
                # Weights that it has cast are forgotten where the outermost ends: the caller's.
                for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
                    off = torch.autocast(device, enabled=False, cache_enabled=False)
                    settings.enter_context(off)
            if torch.get_default_device().type != "cpu":  # else it would cost every call its time
                settings.enter_context(torch.device("cpu"))
            settings.enter_context(torch.random.fork_rng(card))
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(kind)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        _ALONE.release()


def _within_autocast() -> bool:
    """Whether the caller is, be it switched off there."""
    import torch

    level = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return level > 1
