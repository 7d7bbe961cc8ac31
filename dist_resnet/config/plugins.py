"""What `module:callable` in a configuration names: found, and checked.

Modules are found on the Python path or in the working folder.
"""

import contextlib
import importlib
import inspect
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

from dist_resnet.base.errors import DistResnetError, StepError, UserError, is_of_memory, one_line
from dist_resnet.base.paths import PACKAGE, printable
from dist_resnet.config.keys import did_you_mean

OF_OTHERS = tuple(
    os.path.realpath(folder) + os.sep
    for folder in (
        *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")),
        *site.getsitepackages(),  # the system's too, where a virtual environment sees them
        site.getusersitepackages(),
    )
)
"""Folders of what is installed."""
_PASSED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_plugin(name: str) -> bool:
    """Whether `name` names something of the user's, not a built-in."""
    return ":" in name


def resolve(key: str, name: str) -> Callable[..., Any]:
    """The callable that the value `name` of the configuration key `key` names.

    Raises:
        UserError: the module cannot be imported, or has no such callable.
    """
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), *attribute.split("."))):
        raise UserError(f"{key}={name}: write it as module:callable, such as my_nets:wide")
    found: Any = _imported(key, name, path)
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, [word for word in dir(found) if not word.startswith("_")])
            raise UserError(f"{key}={name}: {path} has no {part}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}={name}: is a {type(found).__name__}, which cannot be called")
    result: Callable[..., Any] = found
    return result


def check_arguments(
    key: str, function: Callable[..., Any], args: Mapping[str, Any], given: Collection[str] = ()
) -> None:
    """Hold the configured arguments against a signature.

    Args:
        key: the configuration's, such as model.args.
        given: names of arguments that are passed beside `args`, also by position.

    Raises:
        UserError: an argument that it does not take, or lacks.
    """
    parameters = signature(function)
    if parameters is None:
        return
    names = [name for name, p in parameters.items() if p.kind in _PASSED and name not in given]
    for name in args:
        if name in given:
            raise UserError(f"{key}.{name}: is set by the training itself; leave it out")
        if name not in names and not takes_any(parameters):
            hint = did_you_mean(name, names) or f"; it takes {', '.join(names) or 'none'}"
            raise UserError(f"{key}.{name}: unknown argument of {label(function)}{hint}")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in args:
            raise UserError(f"{key}: {label(function)} needs the argument {name}: {key}.{name}=...")


def signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Parameters by name; None where Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a signature has **kwargs."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def label(function: Callable[..., Any]) -> str:
    """A callable's name for a message."""
    return str(getattr(function, "__qualname__", type(function).__name__))


@contextlib.contextmanager
def calling(key: str, name: str) -> Iterator[None]:
    """Turn what a plug-in raises while open into a line with the place.

    Raises:
        UserError: in place of any other exception; our own errors and a lack of memory pass.
    """
    try:
        yield
    except DistResnetError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit(0) would look like success
        if is_of_memory(error):
            raise
        raise UserError(f"{key}={name}: raised {one_line(error)}{_place(error)}") from error


@contextlib.contextmanager
def within_step(key: str, name: str) -> Iterator[None]:
    """As `calling`, for calls in a step, which other ranks need not see fail.

    While a CUDA graph is captured all pass: an error is the capture's then, which has a way out.

    Raises:
        StepError: in place of any other exception; a lack of memory and our own errors pass.
    """
    if _capturing():
        yield
        return
    try:
        with calling(key, name):
            yield
    except UserError as error:
        cause = error.__cause__
        if cause is not None and is_of_memory(cause):
            raise cause from None
        if error.of_one_rank:
            raise
        raise StepError(str(error)) from cause


def _capturing() -> bool:
    """Whether a CUDA graph is; torch is not loaded to find out."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda is not None and cuda.is_initialized() and cuda.is_current_stream_capturing()


def _imported(key: str, name: str, path: str) -> ModuleType:
    # Last, so that no file of the working folder hides an installed package.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # sys.exit(0) would look like success
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{path}.".startswith(f"{missing}."):
            raise UserError(
                f"{key}={name}: there is no module {missing} on the Python path or in "
                f"{printable(os.getcwd())}"
            ) from None
        raise UserError(
            f"{key}={name}: importing it raised {one_line(error)}{_place(error)}"
        ) from error


def _place(error: BaseException) -> str:
    """Where in somebody's file an error came from, or nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({printable(error.filename)}:{error.lineno})"
    own = f"{PACKAGE}{os.sep}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        inside = (*OF_OTHERS, own)
        if not os.path.realpath(frame.filename).startswith(inside) and frame.filename[:1] != "<":
            return f" ({printable(frame.filename)}:{frame.lineno})"
    return ""
