"""From text, of the command line or of a YAML file, to a value of a key's type.

YAML decides by a value's looks: 007 is 7, 0012 is 10, 12:30 is 750, on is true. Here the key does,
and one of type text takes the text as it stands.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

Tree = Any
"""A text, None (nothing was written), a list or a dict of these."""

_NULLS = ("null", "Null", "NULL", "~")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_ITEM = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^']|'')*)'|([^,]*?))\s*(?:,|$)""", re.DOTALL)
_MOST_NODES = 10_000  # a few lines with aliases of aliases stand for billions


class Bare(str):
    """A text that was written without quotes: only such a one may be a number, true or null."""


def read_yaml(content: str) -> Tree:
    """A YAML document, its scalars as they stand.

    Raises:
        ValueError: not YAML, a key twice, or nested endlessly.
    """
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        return None if node is None else _tree(node, itertools.count())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def read_value(kind: str, given: Tree) -> Any:
    """The value of a key.

    Args:
        kind: the key's type, as `describe_keys` shows it.
        given: of a file or of the command line, where a list is one text: [a,b].

    Raises:
        ValueError: not of this type.
    """
    if kind.endswith(" | null"):
        if given is None or _is_null(given):
            return None
        kind = kind.removesuffix(" | null")
    if kind in ("dict", "list"):
        found = plain(read_yaml(given) if isinstance(given, str) else given)
        if type(found).__name__ != kind:
            raise ValueError(f"no {kind}")
        return found
    if kind.startswith("list["):
        items = _items(given) if isinstance(given, str) else given
        if not isinstance(items, list):
            raise ValueError("no list")
        if kind == "list[str]":  # in which nothing else can be meant
            items = [str(item) if isinstance(item, str) else item for item in items]
        return [read_value(kind[5:-1], item) for item in items]
    first, *others = kind.split(" | ")
    if others:
        with contextlib.suppress(ValueError):
            return read_value(first, given)
        return read_value(" | ".join(others), given)
    if not isinstance(given, str):
        raise ValueError("no single value")
    if _is_null(given):
        raise ValueError("null")
    return _single(kind, given)


def plain(tree: Tree) -> Any:
    """The tree with each text as what it looks like: a number, true, false, null, else a string."""
    if isinstance(tree, list):
        return [plain(item) for item in tree]
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if not isinstance(tree, Bare):
        return tree
    if tree.startswith(("[", "{")):  # of the command line, for YAML's own are no text by now
        return plain(read_yaml(tree))
    if _is_null(tree):
        return None
    # Not infinity or nan, which are words.
    for kind in ("int", "float") if re.search("[0-9]", tree) else ():
        with contextlib.suppress(ValueError):
            return _single(kind, tree)
    return {"true": True, "false": False}.get(tree.lower(), str(tree))


def as_tree(value: Any) -> Tree:
    """A value that was read before, as it would be written."""
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's
    if value is None or isinstance(value, Bare):
        return value
    if isinstance(value, dict):
        return {key: as_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_tree(item) for item in value]
    return str(value) if isinstance(value, str) else Bare(value)


def shown(given: Tree) -> str:
    """A value for a message: one line, not too long."""
    if isinstance(given, dict):
        text = "{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"
    elif isinstance(given, list):
        text = f"[{', '.join(map(str, given[:50]))}]"
    else:
        text = "null" if given is None else given[:200]
    line = _printable(text)
    return line if len(line) <= 80 else f"{line[:77]}..."


def _printable(text: str) -> str:
    # More is escaped than in `paths.printable`, which shows names that a file has.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _single(kind: str, text: str) -> Any:
    if kind == "bool":
        if text.lower() not in _BOOLS:
            raise ValueError("neither true nor false")
        return _BOOLS[text.lower()]
    if kind == "int":
        if not re.fullmatch(r"[+-]?[0-9][0-9_]*", text.strip()):
            raise ValueError("no whole number")
        return int(text)
    if kind == "float":
        return float(text.replace("_", "x"))  # Python's own underscores are no part of a number
    return str(text)


def _items(given: str) -> list[Tree]:
    """The items of [a,"b",c]."""
    text = given.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("no list")
    inner, found, at = text[1:-1], [], 0
    while at < len(inner.rstrip()):
        match = _ITEM.match(inner, at)
        if match is None:
            raise ValueError("no list")
        double, single, bare = match.groups()
        if double is not None:
            found.append(re.sub(r"\\(.)", r"\1", double))
        elif single is not None:
            found.append(single.replace("''", "'"))
        else:
            found.append(Bare(bare))
        at = match.end()
    return found


def _is_null(given: Tree) -> bool:
    return isinstance(given, Bare) and given in _NULLS


def _tree(node: yaml.Node, count: Iterator[int]) -> Tree:
    if next(count) > _MOST_NODES:
        raise ValueError("too large for a configuration")
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else Bare(node.value) if node.value else None
    if isinstance(node, yaml.SequenceNode):
        return [_tree(item, count) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    found: dict[str, Tree] = {}
    merged: dict[str, Tree] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError("a key is no text")
        key, value = key_node.value, _tree(value_node, count)
        if key_node.tag == "tag:yaml.org,2002:merge":
            for part in value if isinstance(value, list) else [value]:
                if not isinstance(part, Mapping):
                    raise ValueError("<< needs a mapping")
                merged |= {name: inner for name, inner in part.items() if name not in merged}
        elif key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        else:
            found[key] = value
    return merged | found


def _reason(error: BaseException) -> str:
    """YAML's, with its place, in one line."""
    return _printable(" ".join(str(error).split())[:160]) or type(error).__name__
