"""What a benchmark found: tables on the terminal, JSON, and facts about how it was measured."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_resnet.base.chart import Bar, bars_file
from dist_resnet.base.tables import columns, number
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


@dataclass
class Report:
    """One benchmark's result; its JSON has exactly these keys."""

    kind: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Figures, each with its "table"; a row that could not be measured has a "failure"."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know to read the rows."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that are this benchmark's own."""
    facts: dict[str, Any] = field(default_factory=dict)
    plot: tuple[str, str] = ("", "images_per_second")
    """Table and key that the plot shows."""

    def add(self, table: str, *rows: dict[str, Any]) -> None:
        self.rows += [{"table": table, **row} for row in rows]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        kept = {"facts": self.facts, "settings": self.settings, "rows": self.rows}
        return {"kind": f"bench/{self.kind}", "schema": SCHEMA, **kept, "notes": self.notes}

    def tables(self) -> str:
        """All rows for the terminal, each table under its name, then the notes."""
        names = dict.fromkeys(row["table"] for row in self.rows)
        blocks = [
            "\n".join([name, *_lines([row for row in self.rows if row["table"] == name])])
            for name in names
        ]
        return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in self.notes)]).rstrip()

    def drawn(self) -> str:
        """An SVG file of the plotted table: ours in another colour, quartiles as whiskers."""
        table, key = self.plot
        bars = [
            Bar(
                " · ".join(str(row[k]) for k in ("name", "batch", "ranks") if k in row),
                row[key],
                row.get(f"{key}_quartiles"),
                str(row["name"]).startswith("ours"),
            )
            for row in self.rows
            if row["table"] == table and row.get(key) is not None
        ]
        hardware = self.facts.get("hardware", {})
        where = hardware.get("gpu") or f"{hardware.get('cores')} cores of {hardware.get('cpu')}"
        note = f"{table}, median and quartiles; {where}; {str(self.facts.get('commit'))[:7]}"
        return bars_file(f"{self.kind}: {key.replace('_', ' ')}", note, bars)


def gather_facts(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware, commit and command; no path, no date, no name of a machine or user."""
    import torch

    from dist_resnet.machine.devices import cuda_count
    from dist_resnet.machine.environment import git_commit, hardware, versions
    from dist_resnet.training.session import choose_threads

    device = torch.device("cuda" if cuda_count(config.parallel.device) else "cpu")
    found = hardware(device, choose_threads(config, 1)) | {"cores": len(os.sched_getaffinity(0))}
    command = f"python -m dist_resnet.bench {shlex.join(map(_without_path, arguments))}"
    return {
        "command": command, "commit": git_commit(), "versions": versions(), "hardware": found
    }  # fmt: skip


def _without_path(argument: str) -> str:
    """Keys keep their values, but a path only its last part."""
    key, sign, value = argument.rpartition("=")
    return f"{key}{sign}{Path(value).name}" if "/" in value else argument


def cells_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Names of the columns, then each row's texts, quartiles beside their value."""
    keys = _keys(rows)
    head = [key.replace("_", " ") for key in keys]
    return [head, *([_cell(row, key) for key in keys] for row in rows)]


def _keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if key != "table" and not key.endswith("_quartiles")]


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    head, *cells = cells_of(rows)
    right = [
        place
        for place, key in enumerate(_keys(rows))
        if all(isinstance(row.get(key, 0), int | float | None) for row in rows)
    ]
    return columns([head, ["-" * len(name) for name in head], *cells], right)


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    text = number(value) if isinstance(value, float) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    around = row.get(f"{key}_quartiles")
    return f"{text} [{number(around[0])}, {number(around[1])}]" if around else text
