"""The source files that `module:callable` in a configuration brings in, and their hashes."""

import ast
import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from pathlib import Path

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import printable
from dist_resnet.config.plugins import OF_OTHERS, resolve


def code_of(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What identifies the code that names bring in.

    Args:
        named: configuration keys and their values, as for `resolve`.

    Returns:
        SHA-256 by file, named from the folder in which the plug-in's top module lies: of the module
        that is named and of the callable's own, or every source of their packages, and of what
        these import from the same folder; `name==version` under the name of a package that was
        installed. Files of one name in two folders have one value, of both.

    Raises:
        UserError: a name that leads nowhere, or a file that cannot be read.
    """
    found: dict[str, str] = {}
    digests: dict[str, set[str]] = {}
    for key, name in named:
        function = resolve(key, name)
        while isinstance(function, functools.partial):
            function = function.func
        own = inspect.getmodule(function)
        modules = {name.partition(":")[0], *([own.__name__] if own else [])}
        for module in filter(_not_ours, modules):
            root = _root_of(module)
            if root is None:
                found |= _installed(module.partition(".")[0])
                continue
            for source in _sources(module, root):
                digest = hashlib.sha256(_content(source)).hexdigest()
                digests.setdefault(str(source.relative_to(root)), set()).add(digest)
    for file, values in digests.items():
        one = next(iter(values))
        several = hashlib.sha256("".join(sorted(values)).encode()).hexdigest()
        found[file] = one if len(values) == 1 else several
    return found


def _root_of(module: str) -> Path | None:
    """The folder that its top package lies in; None for what was installed."""
    parts = module.split(".")
    # The outermost package that has a file: a plain folder has none.
    for depth in range(1, len(parts) + 1):
        file = getattr(sys.modules.get(".".join(parts[:depth])), "__file__", None)
        if file is not None:
            if os.path.realpath(file).startswith(OF_OTHERS):
                return None
            path = Path(file)
            return path.parents[depth if path.name == "__init__.py" else depth - 1]
    return None


def _not_ours(module: str) -> bool:
    return module.partition(".")[0] != __name__.partition(".")[0]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{printable(str(file))}: cannot be read: {error.strerror}") from None


def _sources(name: str, root: Path) -> set[Path]:
    """The files of the module `name` below `root`, and of those there that it imports."""
    todo, done, found = [name], set(), set[Path]()
    while todo:
        name = todo.pop()
        files = set(_files_of(name, root)) - found
        done.add(name)
        found |= files
        wanted = {module for file in files for module in _imports(file, root)}
        todo += set(filter(_not_ours, wanted)) - done
    return found


def _files_of(name: str, root: Path) -> list[Path]:
    """Of what a dotted name leads to from `root`: one file, or all of a package."""
    place = root
    for part in name.split("."):
        if (place / f"{part}.py").is_file():
            return [place / f"{part}.py"]
        place /= part
        if (place / "__init__.py").is_file():
            # Not an editor's links to nowhere, nor folders.
            return sorted(path for path in place.rglob("*.py") if path.is_file())
    return []


def _imports(file: Path, root: Path) -> set[str]:
    """Dotted names of what a source imports, anywhere in it, as seen from `root`."""
    names: set[str] = set()
    try:
        tree = ast.parse(_content(file))
    except (SyntaxError, ValueError):  # a template, say, or of another version of Python
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = list(file.relative_to(root).parts[: -node.level]) if node.level else []
            start += [node.module] if node.module else []
            names |= {".".join([*start, alias.name]) for alias in node.names}
    return names


def _installed(name: str) -> dict[str, str]:
    for distribution in packages_distributions().get(name, [])[:1]:
        return {name: f"{distribution}=={version(distribution)}"}
    return {name: f"python=={sys.version_info.major}.{sys.version_info.minor}"}
