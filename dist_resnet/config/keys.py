"""What keys there are: read from the schema's source, where each stands with its meaning."""

import ast
import difflib
import functools
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_args, get_type_hints

from dist_resnet.config import schema
from dist_resnet.config.schema import Config


@functools.cache  # parsing the schema takes tens of milliseconds, and every merged key asks
def describe_keys() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, for --help."""
    rows = []
    for field_name, kind, default, meaning in _documented(Config):
        if is_dataclass(kind):
            for name, inner, value, text in _documented(cast(type, kind)):
                rows.append((f"{field_name}.{name}", _type_name(inner), _show(value), text))
        else:
            rows.append((field_name, _type_name(kind), _show(default), meaning))
    return rows


@functools.cache
def key_kinds() -> dict[str, str]:
    """Dotted key -> type."""
    return {name: kind for name, kind, _, _ in describe_keys()}


@functools.cache
def key_sections() -> frozenset[str]:
    return frozenset(name.split(".")[0] for name in key_kinds() if "." in name)


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choice that is most like `word`; empty where none is. Its last part may be like it."""
    by_last_part = {choice.split(".")[-1]: choice for choice in choices}
    found = difflib.get_close_matches(word, choices, 1) or [
        by_last_part[part] for part in difflib.get_close_matches(word, by_last_part, 1)
    ]
    return found[0] if found else ""


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The `nearest` choice as the end of a message; empty where there is none."""
    found = nearest(word, choices)
    return f"; did you mean {found}?" if found else ""


def _documented(cls: type) -> Iterator[tuple[str, Any, Any, str]]:
    """Fields of a schema class with the strings that follow them in its source."""
    tree = ast.parse(inspect.getsource(schema))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    texts = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            texts[node.target.id] = str(following.value.value)
    hints, instance = get_type_hints(cls), cls()
    for item in fields(cls):
        yield item.name, hints[item.name], getattr(instance, item.name), texts.get(item.name, "")


def _type_name(kind: Any) -> str:
    if "Literal" in str(kind):
        return " | ".join(repr(choice) for choice in get_args(kind))
    text = str(kind.__name__ if type(kind) is type else kind).replace("None", "null")
    return text.replace("list[typing.Any]", "list").replace("dict[str, typing.Any]", "dict")


def _show(value: Any) -> str:
    return json.dumps(value).strip('"')
