"""What runs were made of, and where: their keys and facts, a column each."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_resnet.config.load import flatten, to_dict
from dist_resnet.config.schema import Config
from dist_resnet.report.record import RunRecord

# What summary.json alone tells; its figures stand in other sections.
_ENVIRONMENT = ("hardware", "git_commit", "precision", "dataset", "eval_set", "versions", "code")
_HASHES, _HASH_SHOWN = ("git_commit", "dataset.fingerprint"), 12


def side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """(key, value in each column) of every key of any of them; a missing value is a dash."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, *(_show(column[key]) if key in column else "–" for column in columns))
            for key in keys]  # fmt: skip


def configuration(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """One run: every key, beside the default it departs from. Several: where they differ."""
    rows = side_by_side([run.config for run in runs])
    if len(runs) > 1:
        differing = [row for row in rows if len(set(row[1:])) > 1]
        equal = len(runs[0].config.keys() - {key for key, *_ in differing})
        caption = f"Keys in which the runs differ; the other {equal} are equal"
        return {"caption": caption, "head": ["key", *(r.label for r in runs)], "rows": differing}
    defaults = {key: _show(value) for key, value in flatten(to_dict(Config()))}
    lines = [
        (key, shown, "" if defaults.get(key) == shown else defaults.get(key, "–"))
        for key, shown in rows
    ]
    head = ["key", "value", "default, if another"]
    return {"caption": "config.yaml", "head": head, "rows": lines}


def environment(runs: Sequence[RunRecord]) -> list[tuple[Any, ...]]:
    """Versions, hardware, dataset and commit of the runs that have ended."""
    told = [
        dict(flatten({key: run.summary[key] for key in _ENVIRONMENT if key in run.summary}))
        for run in runs
    ]
    return [
        (key, *({"value": v, "text": _beginning(v)} for v in values))
        if key in _HASHES
        else (key, *values)
        for key, *values in side_by_side(told)
    ]


def _beginning(whole: str) -> str:
    # The + of a commit from which the source differed must not be lost.
    return whole[:_HASH_SHOWN] + ("+" if whole[_HASH_SHOWN:].endswith("+") else "")


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
