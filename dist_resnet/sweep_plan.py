"""A W&B sweep file read as a grid: which trainings it means and how each is started."""

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_resnet.config import load_config, trajectory_hash
from dist_resnet.errors import UserError, first_line
from dist_resnet.paths import user_path

TRAINER = "dist_resnet.train"
# What wandb's agent puts in their place; the runner here has no other.
_INTERPRETER, _ARGUMENTS = "${interpreter}", "${args_no_hyphens}"


@dataclass(frozen=True)
class Trial:
    """One combination of the grid."""

    values: dict[str, Any]
    """Dotted key -> value, of the swept keys."""
    folder: Path
    """Its run folder."""
    command: list[str]


@dataclass(frozen=True)
class Grid:
    """All combinations, in the file's order, the last key's values changing fastest."""

    metric: str
    maximize: bool
    trials: list[Trial]


def read_grid(path: Path, extra: Sequence[str]) -> Grid:
    """The grid of a sweep file.

    Args:
        extra: further arguments of every training, files and key=value.

    Raises:
        UserError: unreadable, not a grid, or a combination is no possible configuration.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a sweep: method, metric, command, parameters")
    method, metric = content.get("method"), content.get("metric")
    if method != "grid":
        raise UserError(f"{path}: method={method}: here only grid; others need W&B (wandb sweep)")
    if not isinstance(metric, dict) or metric.get("goal") not in ("maximize", "minimize"):
        raise UserError(f"{path}: metric: needs name, and goal: maximize or minimize")
    command = content.get("command")
    if not isinstance(command, list) or not {TRAINER, _ARGUMENTS} <= set(map(str, command)):
        raise UserError(f"{path}: command: must be a list with {TRAINER} and {_ARGUMENTS}")
    choices = dict(_choices(path, content.get("parameters")))
    trials = [
        _trial(path.stem, dict(zip(choices, values, strict=True)), list(map(str, command)), extra)
        for values in itertools.product(*choices.values())
    ]
    return Grid(str(metric.get("name")), metric["goal"] == "maximize", trials)


def _choices(path: Path, parameters: Any, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted keys and the values that each is to take."""
    if not isinstance(parameters, Mapping) or not parameters:
        raise UserError(f"{path}: {prefix.rstrip('.') or 'parameters'}: must name parameters")
    for name, spec in parameters.items():
        key = f"{prefix}{name}"
        if isinstance(spec, Mapping) and "parameters" in spec:
            yield from _choices(path, spec["parameters"], f"{key}.")
        elif isinstance(spec, Mapping) and "value" in spec:
            yield key, [spec["value"]]
        elif isinstance(spec, Mapping) and isinstance(spec.get("values"), list) and spec["values"]:
            yield key, spec["values"]
        else:
            raise UserError(f"{path}: {key}: needs values: [...]; ranges need W&B (wandb sweep)")


def _trial(stem: str, values: dict[str, Any], command: list[str], extra: Sequence[str]) -> Trial:
    pairs = [f"{key}={_word(value)}" for key, value in values.items()]
    full: list[str] = []
    for word in command:
        full += pairs if word == _ARGUMENTS else [word]
    full = [sys.executable if word == _INTERPRETER else word for word in full] + [*extra]
    # Refused here, before the first of them starts, and named by what decides its weights: the same
    # command finds its runs again, another one does not take them for its own.
    config = load_config(full[full.index(TRAINER) + 1 :])
    short = "-".join(f"{key.split('.')[-1]}{_word(value)}" for key, value in values.items())
    readable = re.sub(r"[^A-Za-z0-9._-]", "", f"{stem}-{short}").lstrip(".")[:48]
    name = f"{readable}-{trajectory_hash(config)}"
    group = config.wandb.group or stem
    full += [f"run.name={name}", f"wandb.group={group}"]
    return Trial(values, user_path(config.run.dir) / name, full)


def _word(value: Any) -> str:
    """A value as the command line has it: null, true, 0.1, [1,2]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)
