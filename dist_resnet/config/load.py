"""From the command line to a frozen `Config`: YAML files left to right, then key=value.

The only module that imports omegaconf.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import OmegaConf

from dist_resnet.base.errors import UserError, first_line
from dist_resnet.base.paths import user_path
from dist_resnet.config.checks import check
from dist_resnet.config.effects import changes_trajectory
from dist_resnet.config.keys import did_you_mean, key_kinds, key_sections, nearest
from dist_resnet.config.schema import Config
from dist_resnet.config.values import Bare, as_tree, read_value, read_yaml, shown

_ABSENT = "(not given)"
Argument = str | Mapping[str, Any]
Counts = Callable[[str], bool]


def load_config(arguments: Sequence[Argument], checked: bool = True) -> Config:
    """Merge YAML files, then key=value pairs, over the defaults; with mappings, in their order.

    With `checked` false, values of the right type need not be possible.

    Raises:
        UserError: unreadable file, unknown key, wrong type or impossible value; one line that names
            the key, the value and the nearest valid choice.
    """
    return _merge(_overlays(arguments), checked)


def named_keys(arguments: Sequence[Argument]) -> frozenset[str]:
    """The dotted keys that `arguments`, as of `load_config`, name."""
    return frozenset(key for _, values in _overlays(arguments) for key, _ in flatten(values))


def stored_config(values: Mapping[str, Any], arguments: Sequence[Argument] = ()) -> Config:
    """The configuration of which `values` is the `to_dict`, with key=value pairs over it.

    Raises:
        UserError: as `load_config`.
    """
    return _merge([("stored configuration", values), *map(_read_pair, arguments)])


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain numbers, strings and lists."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(
    values: Mapping[Any, Any], prefix: str = "", whole: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, depth first; a mapping of a key in `whole` is its value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in whole:
            yield from flatten(value, f"{key}.", whole)
        else:
            yield key, value


def trajectory_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], counts: Counts = changes_trajectory
) -> list[str]:
    """`key: old -> new` for every differing key that `counts`: that decides what the weights are.

    A key that one of them lacks, being of an earlier version, has its default: what was done then.
    """
    default = dict(flatten(to_dict(Config())))
    before, after = default | dict(flatten(old)), default | dict(flatten(new))
    found = []
    for key in sorted(before.keys() | after.keys()):
        was, wanted = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if counts(key) and was != wanted:
            found.append(f"{key}: {was} -> {wanted}")
    return found


def trajectory_hash(config: Config, counts: Counts = changes_trajectory) -> str:
    """Eight hexadecimal digits that two configurations share when they train the same weights.

    Args:
        counts: whether a dotted key matters; others than these may be asked about, too.
    """
    default = dict(flatten(to_dict(Config())))
    # A key at its default does not count, or every new key would rename all runs.
    relevant = {
        key: value
        for key, value in flatten(to_dict(config))
        if counts(key) and (key not in default or value != default[key])
    }
    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _merge(overlays: Iterable[tuple[str, Mapping[Any, Any]]], checked: bool = True) -> Config:
    values: dict[str, Any] = {}
    for source, overlay in overlays:
        for key, given in _entries(overlay):
            for name, value in _read(key, given, source).items():
                kept = values.get(name)
                merges = isinstance(kept, dict) and isinstance(value, dict) and value
                values[name] = kept | value if merges else value
    config = Config()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, replace(getattr(config, section), **{name: value})
        config = replace(config, **{name: value})
    if checked:
        check(config)
    return config


def _entries(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """As `flatten`, but a key that takes a mapping has one for its value."""
    mappings = [key for key, kind in key_kinds().items() if kind.startswith("dict")]
    for name, value in flatten(values, whole=mappings):
        key = next((key for key in mappings if name.startswith(f"{key}.")), None)
        yield (name, value) if key is None else (key, {name.removeprefix(f"{key}."): value})


def _overlays(arguments: Sequence[Argument]) -> list[tuple[str, Mapping[Any, Any]]]:
    if any(isinstance(argument, Mapping) for argument in arguments):  # from Python: as they stand
        ordered: list[Argument] = list(arguments)
    else:
        ordered = sorted(arguments, key=lambda argument: not _is_file(str(argument)))
    return [
        _read_file(argument)
        if isinstance(argument, str) and _is_file(argument)
        else _read_pair(argument)
        for argument in ordered
    ]


def _is_file(argument: str) -> bool:
    """Whether an argument names a file: a path may have a = in it, too."""
    key, equals, _ = argument.partition("=")
    known = key in key_kinds() or key.split(".")[0] in key_sections()
    named = argument.lower().endswith((".yaml", ".yml"))
    exists = os.path.isfile(user_path(argument))
    return not equals or (named and not known) or (exists and (named or not known))


def _read_file(path: str) -> tuple[str, Mapping[Any, Any]]:
    name = shown(path)
    if not os.path.isfile(user_path(path)):
        hint = nearest(path, list(key_kinds()))
        raise UserError(
            f"{name}: no such configuration file{hint and f'; to set a key write {hint}=VALUE'}"
        )
    try:
        loaded = read_yaml(user_path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{name}: not a readable YAML file: {first_line(error)}") from None
    if not isinstance(loaded, dict | None):
        raise UserError(f"{name}: must hold key: value pairs")
    return name, loaded or {}


def _read_pair(argument: Argument) -> tuple[str, Mapping[Any, Any]]:
    if isinstance(argument, Mapping):
        return "argument", argument
    key, _, text = argument.partition("=")
    if not key or key.startswith("-"):
        raise UserError(f"{shown(argument)}: write it as key=value, such as optim.lr=0.1")
    given: Any = Bare(text)
    if key in key_sections() and text.startswith("{"):  # as W&B's agent gives nested parameters
        try:
            given = read_yaml(text)
        except ValueError as error:
            line = first_line(error)
            raise UserError(f"{shown(argument)}: cannot be read: {line}") from None
    return "command line", {key: given}


def _read(key: str, given: Any, source: str) -> dict[str, Any]:
    """The key and its value, of its type; nothing for a section in which nothing stands."""
    tree = as_tree(given)
    name, value = shown(key), shown(tree)
    if key not in key_kinds():
        if key in key_sections():
            if tree is None or tree == {}:
                return {}
            raise UserError(f"{name}={value} ({source}): {name} is a section, not a key")
        hint = did_you_mean(key, list(key_kinds()))
        raise UserError(f"{name}={value} ({source}): unknown key{hint}")
    _refuse_text(name, tree, source)
    kind = key_kinds()[key]
    if "'" in kind:
        choices = re.findall("'(.*?)'", kind)
        if tree not in choices:
            hint = did_you_mean(value, choices)
            raise UserError(f"{name}={value}: must be one of {', '.join(choices)}{hint}")
        return {key: str(tree)}
    try:
        return {key: read_value(kind, tree)}
    except ValueError:
        example = {"l": " such as [a,b]", "d": " such as {depth: 16}"}.get(kind[0], "")
        raise UserError(f"{name}={value}: must be of type {kind}{example}") from None


def _refuse_text(name: str, tree: Any, source: str) -> None:
    for text in _scalars(tree):
        # ${oc.env:WANDB_API_KEY} would write a secret into config.yaml and W&B.
        if "${" in text:
            raise UserError(f"{name}={shown(tree)} ({source}): interpolation is not supported")
        if not text.isprintable() or text == "???":  # OmegaConf's word for a missing value
            raise UserError(f"{name}={shown(tree)} ({source}): must be one line of plain text")


def _scalars(tree: Any) -> Iterator[str]:
    if isinstance(tree, list | dict):
        for item in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            yield from _scalars(item)
    else:
        yield str(tree)
