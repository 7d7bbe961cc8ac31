"""Read what wandb recorded on disk: LevelDB log framing around wandb's protobuf records.

wandb 0.31 no longer has a reader in Python. A file is a header of 7 bytes (":W&B", 0xBEE1, version)
and blocks of 32 KiB of chunks (u32 CRC-32, u16 length, u8 type: 1 whole, 2 first, 3 middle, 4
last). A torn tail is left out, so that live and killed runs can be read too.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768


@dataclass
class Recorded:
    """What the tests look at of one recorded run."""

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    """Metric or glob -> its x axis ("" for an axis itself)."""
    exit_code: int | None = None
    alerts: list[str] = field(default_factory=list)
    """Titles."""
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    """Type -> paths of its files."""
    system: list[str] = field(default_factory=list)
    """Names of system metrics."""


def read_run(folder: Path) -> Recorded:
    """The record of one run folder (`.../offline-run-<time>-<id>`)."""
    (file,) = folder.glob("*.wandb")
    out = Recorded()
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            names = ("run_id", "project", "run_group", "job_type", "display_name")
            out.run = {name: getattr(record.run, name) for name in names}
            out.run["tags"] = list(record.run.tags)
            _put(out.config, record.run.config.update)
        elif kind == "config":
            _put(out.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _put(row, record.history.item)
            out.history.append(row)
        elif kind == "summary":
            _put(out.summary, record.summary.update)
        elif kind == "metric":
            metric = record.metric
            out.step_metrics[metric.name or metric.glob_name] = metric.step_metric
        elif kind == "alert":
            out.alerts.append(record.alert.title)
        elif kind == "artifact":
            artifact = record.artifact
            out.artifacts[artifact.type] = [entry.path for entry in artifact.manifest.contents]
        elif kind == "stats":
            out.system += [item.key for item in record.stats.item]
        elif kind == "exit":
            out.exit_code = record.exit.exit_code
    return out


def _put(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        inner = target
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    record_type: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]  # made at run time

    if len(data) < 7:
        return
    assert struct.unpack("<4sH", data[:6]) == (b":W&B", 0xBEE1), data[:7]
    position, record = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        crc, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or (size == 0 and kind == 0):  # padding at the end of a block
            position += left
            continue
        chunk = data[position + 7 : position + 7 + size]
        if len(chunk) < size:
            return
        position += 7 + size
        assert zlib.crc32(bytes([kind]) + chunk) == crc, f"damaged before byte {position}"
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield record_type.FromString(record)
