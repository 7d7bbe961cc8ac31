"""Train small ResNets from a laptop CPU to many GPUs; a run is a function of its configuration."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_resnet.config.schema import Config
    from dist_resnet.evaluate import evaluate
    from dist_resnet.runs.trained import Classifier, load
    from dist_resnet.train import train

__all__ = ["Classifier", "Config", "evaluate", "load", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes a second or two to import, which `--help` need not wait for.
    if name in ("train", "evaluate"):  # modules of the commands, which can be called
        return importlib.import_module(f"dist_resnet.{name}")
    if name in __all__:
        module = "config.schema" if name == "Config" else "runs.trained"
        return getattr(importlib.import_module(f"dist_resnet.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
