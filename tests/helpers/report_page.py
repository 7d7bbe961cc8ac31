"""A report read back with the standard library's parser, and run folders to make one of."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dist_resnet.config.load import load_config, to_yaml

VOID = ("meta", "img", "br", "wbr")


@dataclass
class Cell:
    """A cell of a table: its text, and the whole figure where it holds one."""

    header: bool
    scope: str | None
    text: str = ""
    value: str | None = None


@dataclass
class Table:
    caption: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def row(self, name: str) -> list[Cell]:
        return next(row[1:] for row in self.rows if row[0].text == name)


class Page(HTMLParser):
    """Tags must nest, as a browser would otherwise mend them silently."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[Table] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in VOID:
            self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append(Table())
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag in ("th", "td"):
            self.tables[-1].rows[-1].append(Cell(tag == "th", values.get("scope")))
        elif tag == "data":
            self.tables[-1].rows[-1][-1].value = values["value"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += text
        if "caption" in self._open:
            self.tables[-1].caption += text
        elif {"td", "th"} & set(self._open):
            self.tables[-1].rows[-1][-1].text += text

    def table(self, caption: str) -> Table:
        return next(table for table in self.tables if caption in table.caption)


def make_run(
    folder: Path, epochs: int = 3, rows_per_epoch: int = 4, finished: bool = True, *pairs: str
) -> list[dict[str, Any]]:
    """A run folder as training writes it, without checkpoints; its rows."""
    folder.mkdir(parents=True)
    config = load_config(["data.root=nowhere", f"train.epochs={epochs}", *pairs])
    (folder / "config.yaml").write_text(to_yaml(config))
    total = epochs * rows_per_epoch
    rows: list[dict[str, Any]] = []
    for step in range(1, total + 1):
        base = {"step": 50 * step, "epoch": step / rows_per_epoch, "seconds": 1.25 * step}
        rows.append(
            base
            | {"train/loss": 2.3 / step**0.3, "train/top1": 1 - 0.9 / step**0.3}
            | {"train/lr": 0.05 * (1 - (step - 1) / total), "train/grad_norm": 1 / step}
            | {"perf/images_per_second": 1000 + 7.3 * (step % 11), "perf/step_ms": 31.7}
            | {"perf/data_wait_fraction": 0.0123}
        )
        if step % rows_per_epoch == 0:
            top1 = 1 - 0.8 / step**0.3
            classes = {f"val/per_class/{c}": top1 + d for c, d in (("cat", -0.01), ("dog", 0.01))}
            evaluation = {"val/loss": 1.9 / step**0.3, "val/top1": top1, "val/images": 1000}
            rows.append(base | evaluation | classes | {"gap/top1": -0.0312345})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    write_json(folder / "plan.json", {"total_steps": 50 * total, "replicas": 2})
    state = "done" if finished else "running"
    write_json(folder / "status.json", {"state": state, "step": 50 * total, "reason": ""})
    if finished:
        write_json(folder / "summary.json", summary_of(rows))
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures that stand nowhere else, so that it shows where the report took them from."""
    last = rows[-1]
    kept = {key: value for key, value in last.items() if key.startswith(("val/", "gap/"))}
    return kept | {
        "step": last["step"], "epoch": last["epoch"], "train/top1": 0.123456789,
        "best/val/top1": 0.98765432, "best/step": 150, "images_per_second": 4321.0987,
        "wall_seconds": 99.87654, "parameters": 272474, "eval_set": "test set",
        "dataset": {"name": "cifar10", "fingerprint": "f" * 64}, "git_commit": "abc123",
        "versions": {"torch": "9.9.9"}, "hardware": {"cpu": "a processor"},
        "diagnosis": [{"name": "a finding", "text": "from the summary"}],
    }  # fmt: skip


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))
