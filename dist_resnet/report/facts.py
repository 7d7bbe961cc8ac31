"""The sections of the page that tell what was run, and where."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_resnet.config.load import flatten, to_dict
from dist_resnet.config.schema import Config
from dist_resnet.report.markup import Html, data, element, join, table
from dist_resnet.report.record import RunRecord

# What summary.json alone tells; its figures stand in other sections.
_ENVIRONMENT = ("hardware", "git_commit", "precision", "dataset", "eval_set", "versions", "code")
_HASHES, _HASH_SHOWN = ("git_commit", "dataset.fingerprint"), 12


def configuration(runs: Sequence[RunRecord]) -> Html:
    """One run: every key, beside the default it departs from. Several: where they differ."""
    notes = [
        element("p", f"{run.label}: no configuration: {run.config_note}", class_="note")
        for run in runs
        if run.config_note
    ]
    if len(runs) > 1:
        differing = side_by_side([run.config for run in runs], only_differing=True)
        equal = len(runs[0].config.keys() - {key for key, *_ in differing})
        caption = f"Keys in which the runs differ; the other {equal} are equal"
        content = table(caption, ("key", *(run.label for run in runs)), differing)
    else:
        defaults = {key: _show(value) for key, value in flatten(to_dict(Config()))}
        rows = [
            (key, _show(value), "" if defaults.get(key) == _show(value) else defaults.get(key, "–"))
            for key, value in runs[0].config.items()
        ]
        content = table("config.yaml", ("key", "value", "default, if another"), rows)
    return join(*notes, content, _plans(runs))


def environment(runs: Sequence[RunRecord]) -> Html:
    """Versions, hardware, dataset and commit of the runs that have ended."""
    told = [
        dict(flatten({key: run.summary[key] for key in _ENVIRONMENT if key in run.summary}))
        for run in runs
    ]
    waiting = [run.label for run in runs if not run.summary]
    note = f"Not known of {', '.join(waiting)}: summary.json is written at the end of a run."
    parts = [element("p", note, class_="note")] if waiting else []
    if any(told):
        rows = [_shorter(row) for row in side_by_side(told)]
        parts.append(table("From summary.json", ("fact", *(run.label for run in runs)), rows))
    return join(*parts)


def _shorter(row: tuple[str, ...]) -> tuple[str, ...]:
    """A row of hashes: their beginning for the eye, whole in `value`; others as they are."""
    if row[0] not in _HASHES:
        return row
    return row[0], *(data(whole, _beginning(whole)) for whole in row[1:])


def _beginning(whole: str) -> str:
    # The + of a commit from which the source differed must not be lost.
    return whole[:_HASH_SHOWN] + ("+" if whole[_HASH_SHOWN:].endswith("+") else "")


def side_by_side(
    columns: Sequence[Mapping[str, Any]], only_differing: bool = False
) -> list[tuple[str, ...]]:
    """(key, value in each column) of every key of any of them; a missing value is a dash."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [
        (key, *(_show(column[key]) if key in column else "–" for column in columns)) for key in keys
    ]
    return [row for row in rows if not only_differing or len(set(row[1:])) > 1]


def _plans(runs: Sequence[RunRecord]) -> Html:
    rows = side_by_side([run.plan for run in runs])
    caption = "What follows from it (plan.json)"
    return table(caption, ("number", *(run.label for run in runs)), rows)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
