"""A W&B sweep file read as a grid: which trainings it means and how each is started."""

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError, first_line
from dist_resnet.base.paths import user_path
from dist_resnet.config.checks import check
from dist_resnet.config.effects import changes_figures
from dist_resnet.config.load import load_config, trajectory_hash
from dist_resnet.config.schema import Config
from dist_resnet.config.values import Bare, read_yaml

TRAINER = "dist_resnet.train"
# What wandb's agent puts in their place; the runner here has no other.
_INTERPRETER, _ARGUMENTS = "${interpreter}", "${args_no_hyphens}"
# What YAML takes as it stands within brackets.
_PLAIN = re.compile(r"[^\s,:#&*!|>%@`?'\"\[\]{}\\]+( +[^\s,:#'\"\[\]{}\\]+)*")


@dataclass(frozen=True)
class Trial:
    """One combination of the grid."""

    values: dict[str, Any]
    """Dotted key -> value, of the swept keys."""
    folder: Path
    """Its run folder."""
    command: list[str]
    config: Config
    impossible: str
    """Why there is no such training; mostly empty."""


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
        UserError: unreadable, not a grid, mistyped, or no combination is possible.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a readable YAML file: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a sweep: method, metric, command, parameters")
    method, metric = content.get("method"), content.get("metric")
    if method != "grid":
        raise UserError(f"{path}: method={method}: here only grid; others need W&B (wandb sweep)")
    goal = isinstance(metric, dict) and metric.get("name") and metric.get("goal")
    if not isinstance(metric, dict) or goal not in ("maximize", "minimize"):
        raise UserError(f"{path}: metric: needs name, and goal: maximize or minimize")
    command = content.get("command")
    if not isinstance(command, list) or not {TRAINER, _ARGUMENTS} <= set(map(str, command)):
        raise UserError(f"{path}: command: must be a list with {TRAINER} and {_ARGUMENTS}")
    choices = dict(_choices(path, content.get("parameters")))
    trials = [
        _trial(path.stem, dict(zip(choices, values, strict=True)), list(map(str, command)), extra)
        for values in itertools.product(*choices.values())
    ]
    _refuse_shared_folders(path, trials)
    if all(trial.impossible for trial in trials):
        raise UserError(trials[0].impossible)
    return Grid(str(metric["name"]), goal == "maximize", trials)


def _refuse_shared_folders(path: Path, trials: Sequence[Trial]) -> None:
    """A folder's figures are those of one training only."""
    first: dict[Path, Trial] = {}
    for trial in trials:
        other = first.setdefault(trial.folder, trial)
        if other is not trial:
            both = " and ".join(
                " ".join(f"{key}={word(value)}" for key, value in one.values.items())
                for one in (other, trial)
            )
            raise UserError(f"{path}: {both} are one training; leave one of them out")


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
    pairs = [f"{key}={word(value)}" for key, value in values.items()]
    full: list[str] = []
    for part in command:
        full += pairs if part == _ARGUMENTS else [part]
    full = [sys.executable if part == _INTERPRETER else part for part in full] + [*extra]
    # What is mistyped is refused before the first of them starts; an impossible combination is a
    # row, as a grid cannot leave it out. Named by all that decides its figures: the same command
    # finds its runs again, another one does not take them for its own.
    config = load_config(full[full.index(TRAINER) + 1 :], checked=False)
    if config.run.name is not None:
        raise UserError(f"run.name={config.run.name}: a sweep names its runs itself; leave it out")
    short = "-".join(f"{key.split('.')[-1]}{word(value)}" for key, value in values.items())
    readable = re.sub(r"[^A-Za-z0-9._-]", "", f"{stem}-{short}").lstrip(".")[:48]
    digits = trajectory_hash(config, lambda key: changes_figures(key) or key in values)
    name = f"{readable}-{digits}"
    group = config.wandb.group or stem
    full += [f"run.name={name}", f"wandb.group={group}"]
    return Trial(values, user_path(config.run.dir) / name, full, config, _impossible(config))


def _impossible(config: Config) -> str:
    try:
        check(config)
    except UserError as error:
        return str(error)
    return ""


def word(value: Any) -> str:
    """A value as the command line has it: null, true, 0.1, [1,2], {depth: 16}."""
    return _item(value, alone=True)


def _item(value: Any, alone: bool = False) -> str:
    """A value within a list or a mapping, quoted where it was, or must be; `alone` it need not."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_item(key)}: {_item(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_item, value))}]"
    if value is None:
        return "null"
    if alone or (isinstance(value, Bare) and _PLAIN.fullmatch(value)):
        return str(value)
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
