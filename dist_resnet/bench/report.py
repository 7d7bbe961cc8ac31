"""What a benchmark found: tables on the terminal, JSON, and facts about how it was measured."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_resnet.base.files import write_for_user
from dist_resnet.config.schema import Config

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    config: Config
    pairs: tuple[str, ...]
    """The key=value pairs it was made of, for worker processes."""
    rounds: int
    quick: bool = False
    """Seconds instead of minutes: for tests, its figures mean nothing."""
    full: bool = False
    """Also what takes long."""
    step_microseconds: float | None = None
    """scaling: predict for this step time instead of the one measured."""


@dataclass
class Report:
    """One benchmark's result; its JSON has exactly these keys."""

    kind: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Figures, each with its "table"; a row that could not be measured has a "failure"."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know to read the rows."""
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    plot: tuple[str, str] = ("", "images_per_second")
    """Table and key that the plot shows."""

    def add(self, table: str, *rows: dict[str, Any]) -> None:
        self.rows += [{"table": table, **row} for row in rows]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "kind": f"bench/{self.kind}",
            "schema": SCHEMA,
            "facts": self.facts,
            "settings": self.settings,
            "rows": self.rows,
            "notes": self.notes,
        }

    def tables(self) -> str:
        """All rows for the terminal, each table under its name, then the notes."""
        names = list(dict.fromkeys(row["table"] for row in self.rows))
        blocks = [
            f"{name}\n{render([row for row in self.rows if row['table'] == name])}"
            for name in names
        ]
        return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in self.notes)]).rstrip()


def gather_facts(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware, commit and command; no path, no date, no name of a machine or user."""
    import torch

    from dist_resnet.machine.devices import cuda_count
    from dist_resnet.machine.environment import git_commit, hardware, versions
    from dist_resnet.training.session import choose_threads

    device = torch.device("cuda" if cuda_count(config.parallel.device) else "cpu")
    return {
        "command": f"python -m dist_resnet.bench {shlex.join(map(_without_path, arguments))}",
        "commit": git_commit(),
        "versions": versions(),
        "hardware": {
            **hardware(device, choose_threads(config, 1)),
            "cores": len(os.sched_getaffinity(0)),
        },
    }


def _without_path(argument: str) -> str:
    """Keys keep their values, but a path only its last part."""
    key, sign, value = argument.rpartition("=")
    return f"{key}{sign}{Path(value).name}" if "/" in value else argument


def write_json(path: Path, report: Report) -> None:
    write_for_user(path, json.dumps(report.as_dict(), indent=2) + "\n")


def cells_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Names of the columns, then each row's texts, quartiles beside their value."""
    keys = _columns(rows)
    head = [key.replace("_", " ") for key in keys]
    return [head, *([_cell(row, key) for key in keys] for row in rows)]


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if key != "table" and not key.endswith("_quartiles")
    ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal."""
    keys, cells = _columns(rows), cells_of(rows)
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    numeric = [all(isinstance(row.get(key, 0), int | float | None) for row in rows) for key in keys]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    text = number(value) if isinstance(value, float) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    around = row.get(f"{key}_quartiles")
    return f"{text} [{number(around[0])}, {number(around[1])}]" if around else text


def number(value: float) -> str:
    """Four significant digits, with thousands separated, never an exponent for what is readable."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
