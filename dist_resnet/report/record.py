"""What a run folder holds, finished or still growing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import flatten, load_config, to_dict
from dist_resnet.runs.diagnosis import diagnose
from dist_resnet.tracking.jsonl import read_rows

_LARGEST = 1e100


@dataclass(frozen=True)
class RunRecord:
    """One run as its files tell it at this moment."""

    path: Path
    label: str
    """Name of the folder, or its path where another run of the report has the same name."""
    rows: list[dict[str, float | int | None]]
    config: dict[str, Any]
    """Dotted keys; empty where `config_note` says why."""
    config_note: str
    plan: dict[str, Any]
    status: dict[str, Any]
    summary: dict[str, Any]
    """Empty while the run goes on."""

    @property
    def evaluations(self) -> list[dict[str, float | int | None]]:
        return [row for row in self.rows if row.get("val/top1") is not None]

    def last(self, key: str) -> float | int | None:
        """The newest value of a metric; None: never logged."""
        return next((r[key] for r in reversed(self.rows) if r.get(key) is not None), None)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every row that has a finite `key`."""
        return [
            (float(row["epoch"] or 0), float(value))
            for row in self.rows
            if (value := row.get(key)) is not None and "epoch" in row
        ]

    def keys(self, prefix: str) -> list[str]:
        """Metric keys that begin so, in the order of their first appearance."""
        found = dict.fromkeys(k for row in self.rows for k in row if k.startswith(prefix))
        return list(found)

    @property
    def diagnosis(self) -> list[dict[str, str]]:
        """The summary's; of a run without one, or a damaged one, that of the rows so far."""
        told = self.summary.get("diagnosis")
        whole = isinstance(told, list) and all(map(_is_finding, told))
        return told if isinstance(told, list) and whole else diagnose(self.rows)


def read_records(paths: Sequence[Path]) -> list[RunRecord]:
    """The records of several run folders.

    Raises:
        UserError: one is no run folder, has no metrics yet, or is named twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{path}: named twice")
    names = [place.name for place in resolved]
    labels = [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]
    return [read_record(path, label) for path, label in zip(paths, labels, strict=True)]


def read_record(path: Path, label: str) -> RunRecord:
    """The record of one run folder; a line that is being written is left out.

    Raises:
        UserError: no run folder, or no metrics yet.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    metrics = path / "metrics.jsonl"
    known = ("config.yaml", "metrics.jsonl", "status.json")
    if not any((path / name).exists() for name in known):
        raise UserError(f"{path}: not a run folder: it holds none of {', '.join(known)}")
    try:
        rows = read_rows(metrics)
    except FileNotFoundError:
        rows = []
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read: {error.strerror}") from None
    rows = [
        _without_nonsense(row) for row in rows if all(_is_figure(value) for value in row.values())
    ]
    if not any("epoch" in row for row in rows):
        raise UserError(f"{path}: no metrics yet; the first row comes after log.every_steps steps")
    config, note = _read_config(path / "config.yaml")
    read = (_read_json(path / f"{name}.json") for name in ("plan", "status", "summary"))
    return RunRecord(path, label, rows, config, note, *read)


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return dict(flatten(to_dict(load_config([str(path)])))), ""
    except UserError as error:  # of another version, say; the figures can be shown all the same
        return {}, str(error)


def _read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is none, or none yet."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _without_nonsense(loaded) if isinstance(loaded, dict) else {}


def _is_figure(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _without_nonsense(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that cannot be drawn become None: JSON's readers take NaN and 400 digits too."""
    return {
        k: None if isinstance(v, int | float) and not _drawable(v) else v for k, v in values.items()
    }


def _drawable(value: float) -> bool:
    return -_LARGEST <= value <= _LARGEST  # false of NaN


def _is_finding(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), str) for k in ("name", "text"))
