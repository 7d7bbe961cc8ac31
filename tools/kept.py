"""A finished run condensed to what tables and curves need: some kilobytes of JSON."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.files import write_for_user
from dist_resnet.config.effects import changes_result
from dist_resnet.config.load import flatten, load_config, to_dict
from dist_resnet.report.record import RunRecord, read_record

SCHEMA = 1
_CURVES = ("train/top1", "val/top1", "val/loss")

Kept = dict[str, Any]


def condense(path: Path, group: str) -> Kept:
    """The figures, settings and curves of a finished run; no path, no name of a machine or user.

    Args:
        group: the table that the run belongs to.

    Raises:
        UserError: no run folder, or the run has not finished.
    """
    run = read_record(path, path.resolve().name)
    if not run.summary:
        raise UserError(f"{path}: the run has not finished: it has no summary.json")
    if not run.config:
        raise UserError(f"{path}: {run.config_note}")
    try:
        return _condensed(run, group)
    except KeyError as error:
        raise UserError(f"{path}: its summary.json or plan.json lacks {error}") from None


def _condensed(run: RunRecord, group: str) -> Kept:
    summary = run.summary
    settings = changed_settings(run.config)
    figures = ("train/top1", "val/top1", "val/top1_tta", "val/loss", "gap/top1", "best/val/top1")
    facts = ("eval_set", "parameters", "world_size", "replicas", "wall_seconds")
    return {
        "kind": "run",
        "schema": SCHEMA,
        "group": group,
        "name": run.label,
        "command": command(settings, summary["world_size"]),
        "settings": settings,
        "epochs": round(summary["epoch"], 2),
        "global_batch_size": run.plan["global_batch_size"],
        "figures": {key: summary[key] for key in figures if summary.get(key) is not None},
        **{key: summary[key] for key in facts},
        "diagnosis": [finding["name"] for finding in summary["diagnosis"]],
        "curve": _curve(run),
        "commit": summary["git_commit"],
        "versions": summary["versions"],
        "hardware": summary["hardware"],
    }


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a flattened configuration that alter figures and differ from their defaults."""
    defaults = dict(flatten(to_dict(load_config([]))))
    return {
        key: value
        for key, value in config.items()
        if (changes_result(key) or key == "train.step_mode") and value != defaults[key]
    }


def command(settings: Mapping[str, Any], world_size: int) -> str:
    """What repeats a run with these settings."""
    start = "python" if world_size == 1 else f"torchrun --standalone --nproc_per_node={world_size}"
    pairs = (shlex.quote(f"{key}={_written(value)}") for key, value in settings.items())
    return " ".join([start, "-m dist_resnet.train", *pairs])


def write_kept(kept: Kept, folder: Path) -> Path:
    """Write it as folder/<group>-<name>.json.

    Raises:
        UserError: it cannot be written, or another run of that name is there.
    """
    path = folder / f"{kept['group']}-{kept['name']}.json"
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    if path.exists() and _read(path)["settings"] != kept["settings"]:
        raise UserError(f"{path} holds another run; give one of them another run.name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    write_for_user(path, f"{{\n{lines}\n}}\n")
    return path


def read_kept(folder: Path, group: str) -> list[Kept]:
    """The runs of a group, by name.

    Raises:
        UserError: there is none, or a file is not a kept run.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        kept = _read(path)
        if kept["group"] == group:
            found.append(kept)
    if not found:
        raise UserError(f"{folder}: no run of the group {group!r}")
    return found


def _read(path: Path) -> Kept:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a kept run: {error}") from None
    if not isinstance(kept, dict) or not {"group", "name", "settings", "figures"} <= kept.keys():
        raise UserError(f"{path}: not a kept run; remove it, or keep the run again")
    found: Kept = kept
    return found


def _curve(run: RunRecord) -> dict[str, list[float | None]]:
    """Evaluations only; training accuracy is the mean over the epoch before."""
    rows: Sequence[Mapping[str, Any]] = [
        row | {"train/top1": _sum(row["val/top1"], row.get("gap/top1"))} for row in run.evaluations
    ]
    curve = {key: [_rounded(row.get(key)) for row in rows] for key in _CURVES}
    return {"epoch": [_rounded(row["epoch"]) for row in rows], **curve}


def _sum(val: Any, gap: Any) -> float | None:
    return None if val is None or gap is None else val + gap


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _written(value: Any) -> str:
    """As the command line takes it."""
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value
