"""From the command line to a frozen `Config`: YAML files left to right, then key=value.

The only module that imports omegaconf.
"""

import ast
import difflib
import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_resnet import schema
from dist_resnet.checks import check
from dist_resnet.errors import UserError, first_line
from dist_resnet.paths import user_path
from dist_resnet.schema import Config, changes_trajectory


def load_config(arguments: Sequence[str]) -> Config:
    """Merge YAML files and key=value pairs over the defaults.

    Raises:
        UserError: unreadable file, unknown key, wrong type or impossible value; one line that names
            the key, the value and the nearest valid choice.
    """
    files = [argument for argument in arguments if "=" not in argument]
    pairs = [argument for argument in arguments if "=" in argument]
    return _merge([*map(_read_file, files), *map(_read_pair, pairs)])


def stored_config(values: Mapping[str, Any], pairs: Sequence[str] = ()) -> Config:
    """The configuration of which `values` is the `to_dict`, with key=value pairs over it.

    Raises:
        UserError: as `load_config`.
    """
    return _merge([("stored configuration", values), *map(_read_pair, pairs)])


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain numbers, strings and lists."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, depth first."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def trajectory_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every differing key that decides what the weights are.

    A key that one of them lacks, being of an earlier version, has its default: what was done then.
    """
    default = dict(flatten(to_dict(Config())))
    before, after = default | dict(flatten(old)), default | dict(flatten(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if changes_trajectory(key) and before.get(key) != after.get(key)
    ]


def trajectory_hash(config: Config) -> str:
    """Eight hexadecimal digits that two configurations share when they train the same weights."""
    default = dict(flatten(to_dict(Config())))
    # A key at its default does not count, or every new key would rename all runs.
    relevant = {
        key: value
        for key, value in flatten(to_dict(config))
        if changes_trajectory(key) and value != default[key]
    }
    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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


def _merge(overlays: Iterable[tuple[str, Mapping[Any, Any]]]) -> Config:
    merged = OmegaConf.structured(Config)
    for source, overlay in overlays:
        for key, value in flatten(overlay):
            merged = _merge_one(merged, key, value, source)
    config = cast(Config, OmegaConf.to_object(merged))
    check(config)
    return config


def _read_file(path: str) -> tuple[str, Mapping[Any, Any]]:
    if not user_path(path).is_file():
        hint = _nearest(path, [key for key, *_ in describe_keys()])
        raise UserError(
            f"{path}: no such configuration file{hint and f'; to set a key write {hint}=VALUE'}"
        )
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(user_path(path)), resolve=False)
    except Exception as error:  # the YAML parser has a dozen exceptions of its own
        raise UserError(f"{path}: not a readable YAML file: {first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: must hold key: value pairs")
    _refuse_interpolation(loaded, path)
    return path, loaded


def _read_pair(argument: str) -> tuple[str, Mapping[Any, Any]]:
    key = argument.split("=", 1)[0]
    if not key or key.startswith("-"):
        raise UserError(f"{argument}: write it as key=value, such as optim.lr=0.1")
    try:
        overlay = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
    except Exception as error:  # as above
        raise UserError(f"{argument}: cannot be read: {first_line(error)}") from None
    assert isinstance(overlay, dict)
    _refuse_interpolation(overlay, argument)
    return "command line", overlay


def _refuse_interpolation(values: Mapping[Any, Any], source: str) -> None:
    # ${oc.env:WANDB_API_KEY} would write a secret into config.yaml and W&B.
    for key, value in flatten(values):
        if "${" in str(value):  # in a list too
            raise UserError(f"{key}={value} ({source}): interpolation is not supported")


def _merge_one(merged: Any, key: str, value: Any, source: str) -> Any:
    known = {name: (kind, default) for name, kind, default, _ in describe_keys()}
    if key not in known:
        sections = {name.split(".")[0] for name in known if "." in name}
        if key in sections:
            raise UserError(f"{key}={value} ({source}): {key} is a section, not a key")
        hint = _nearest(key, list(known))
        raise UserError(
            f"{key}={value} ({source}): unknown key{hint and f'; did you mean {hint}?'}"
        )
    kind, _ = known[key]
    if "|" in kind and "'" in kind and str(value) not in (choices := _choices(kind)):
        hint = _nearest(str(value), choices)
        raise UserError(
            f"{key}={value}: must be one of {', '.join(choices)}"
            f"{hint and f'; did you mean {hint}?'}"
        )
    # OmegaConf reads true as 1 and 3 as true.
    if isinstance(value, bool) != (kind == "bool") and kind in ("bool", "int", "float"):
        raise UserError(f"{key}={value}: must be of type {kind}")
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        return OmegaConf.merge(merged, nested)
    except OmegaConfBaseException:
        raise UserError(f"{key}={value}: must be of type {kind}") from None


def _nearest(word: str, choices: Sequence[str]) -> str:
    by_last_part = {choice.split(".")[-1]: choice for choice in choices}
    found = difflib.get_close_matches(word, choices, 1) or [
        by_last_part[part] for part in difflib.get_close_matches(word, by_last_part, 1)
    ]
    return found[0] if found else ""


def _choices(kind: str) -> list[str]:
    return [part.strip().strip("'") for part in kind.split("|")]


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
    return str(kind.__name__ if isinstance(kind, type) else kind).replace("None", "null")


def _show(value: Any) -> str:
    return json.dumps(value).strip('"')
