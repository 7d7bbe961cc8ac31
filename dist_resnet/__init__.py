"""Train small ResNets from a laptop CPU to many GPUs; a run is a function of its configuration."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_resnet.trained import Classifier, load

__all__ = ["Classifier", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes a second or two to import, which `--help` need not wait for.
    if name in __all__:
        from dist_resnet import trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
