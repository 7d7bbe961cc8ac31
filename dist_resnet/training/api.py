"""What the commands that Python can call too have in common.

import dist_resnet
summary = dist_resnet.train("configs/digits.yaml", train={"epochs": 3}, seed=1)
figures = dist_resnet.evaluate("runs/NAME", eval={"flip_tta": True})
model = dist_resnet.load("runs/NAME")
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import ModuleType
from typing import Any

from dist_resnet.config.schema import Config


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
def threads_kept() -> Iterator[None]:
    """Training sets torch's threads to what a rank may use; the caller's own come back."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
