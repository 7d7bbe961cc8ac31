"""The page: what its template is filled with."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_resnet.base.chart import STYLE, Points, Series, curves
from dist_resnet.base.errors import UserError
from dist_resnet.base.tables import number
from dist_resnet.report.figures import (
    headline,
    per_class,
    remedies,
    result,
    speed,
    step_parts,
    train_curve,
)
from dist_resnet.report.record import RunRecord
from dist_resnet.report.side_by_side import configuration, environment, side_by_side
from dist_resnet.runs.diagnosis import RULES

Runs = Sequence[RunRecord]
_MATRIX_CLASSES = 20
"""Above, the matrix would be too large to read: its largest confusions are listed."""
_LISTED = 20
_SECTIONS = {
    "curves": "Curves", "diagnosis": "Diagnosis", "classes": "Accuracy by class",
    "images": "Mistakes and training images", "speed": "Speed", "figures": "Figures",
    "configuration": "Configuration", "environment": "Environment",
}  # fmt: skip


def render_page(runs: Runs) -> str:
    """One HTML document about one run or several.

    The model is evaluated where a checkpoint and the dataset are here, which takes seconds to
    minutes.
    """
    figures = [headline(run) for run in runs]
    return _template().render(
        title=" · ".join(run.label for run in runs),
        labels=[run.label for run in runs],
        style=STYLE + Path(__file__).with_name("style.css").read_text(encoding="utf-8"),
        sections=_SECTIONS,
        runs=[_told(run) | examples_of(run) for run in runs],
        curves=_curves(runs),
        classes=_by_class(runs),
        speed_curves=_speed_curves(runs),
        speed=_speed(runs),
        figures=[(row[0].name, *row) for row in zip(*figures, strict=True)],
        configuration=configuration(runs),
        plans=side_by_side([run.plan for run in runs]),
        waiting=", ".join(run.label for run in runs if not run.summary),
        facts=environment(runs),
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    found = Environment(autoescape=True, loader=loader, trim_blocks=True)
    # A key such as data.batch_size_per_replica may break after its . / or _ on a phone.
    found.filters["pieces"] = lambda text: re.split(r"(?<=[./_])", text)
    return found.get_template("page.html.j2")


def _told(run: RunRecord) -> dict[str, Any]:
    """What the page says of one run in words."""
    model = run.config.get("model.name", "unknown model")
    on = run.config.get("data.dataset", "unknown dataset")
    state, reason = run.status.get("state", "state unknown"), run.status.get("reason")
    seed = run.config.get("seed", "unknown")
    found = run.diagnosis
    remarks = [] if run.summary else ["The run has not ended: this is what its rows say so far."]
    if silent := ", ".join(rule for rule in RULES if rule not in {f["name"] for f in found}):
        remarks.append(f"Looked for and not found: {silent}.")
    return {
        "label": run.label,
        "result": result(run),
        "remedies": remedies(run),
        "about": f"{model} on {on}, seed {seed}; {state}{f': {reason}' if reason else ''}",
        "findings": found,
        "remark": " ".join(remarks),
        "config_note": run.config_note,
    }


def _drawn(title: str, unit: str, series: Sequence[Series], zero: bool = True) -> tuple[Any, ...]:
    return title, unit, series, curves(title, series, zero)


def _curves(runs: Runs) -> list[tuple[Any, ...]]:
    """Accuracy, loss, gap and learning rate over epochs."""
    top1 = _train_and_val(runs, train_curve, "val/top1")
    losses = _train_and_val(runs, lambda run: run.curve("train/loss"), "val/loss")
    return [
        _drawn("Top-1 accuracy", "share of images", top1, zero=False),
        _drawn("Loss", "cross-entropy, nats", losses, zero=False),
        _drawn("gap/top1", "train minus val", _one_each(runs, "gap/top1")),
        _drawn("Learning rate", "train/lr", _one_each(runs, "train/lr")),
        _drawn("Gradient norm", "train/grad_norm", _one_each(runs, "train/grad_norm")),
    ]


def _train_and_val(
    runs: Runs, training: Callable[[RunRecord], Points], validation: str
) -> list[Series]:
    """Validation solid, training dashed; one run has a colour for each, several one a run."""
    series = []
    for place, run in enumerate(runs):
        colour = 1 if len(runs) == 1 else place
        series.append(Series(_label(run, runs, "validation"), run.curve(validation), place))
        series.append(Series(_label(run, runs, "training"), training(run), colour, True))
    return series


def _one_each(runs: Runs, key: str) -> list[Series]:
    return [Series(run.label, run.curve(key), place) for place, run in enumerate(runs)]


def _label(run: RunRecord, runs: Runs, what: str) -> str:
    return what if len(runs) == 1 else f"{run.label}, {what}"


def _speed_curves(runs: Runs) -> list[tuple[Any, ...]]:
    steps = [
        Series(_label(run, runs, what), points, place, what != "step")
        for place, run in enumerate(runs)
        for what, points in zip(("step", "wait for data"), step_parts(run), strict=True)
    ]
    return [
        _drawn("Throughput", "images/s", _one_each(runs, "perf/images_per_second")),
        _drawn("Step time", "milliseconds", steps),
    ]


def _speed(runs: Runs) -> list[tuple[Any, ...]]:
    return [
        (
            _label(run, runs, key),
            *(_cell(value, number(value)) for value in spread),
            _cell(windows, f"{windows:,}"),
        )
        for run in runs
        for key, spread, windows in speed(run)
    ]


def _cell(value: Any, text: str, **look: str) -> dict[str, Any]:
    """A figure: rounded for the reader, whole for whoever reads the page by program."""
    return {"value": value, "text": text, **look}


def _by_class(runs: Runs) -> list[tuple[Any, ...]]:
    """The accuracy of every class, a column for each run."""
    found = [{figure.name: figure for figure in per_class(run)} for run in runs]
    names = dict.fromkeys(name for figures in found for name in figures)
    return [(name, *(figures.get(name, "–") for figures in found)) for name in names]


def examples_of(run: RunRecord) -> dict[str, Any]:
    """Confusions, worst mistakes and augmented samples of one run, or why there are none."""
    from dist_resnet.report.examples import find_examples  # torch and FFCV take seconds

    try:
        found = find_examples(run.path)
    except UserError as error:
        return {"missing": str(error)}
    where = f"of {found.file}, step {found.step:,}, on the {found.eval_set}"
    given = found.augmented
    mixed = "" if given.lam is None else f", mixing weight {given.lam:.4f}"
    samples = zip(given.pixels, given.labels, strict=True)
    return {
        "where": where,
        "confusions": confusions(found.classes, found.confusion, where),
        "mistakes": [
            (png_uri(m.pixels), f"{m.truth}, taken for {m.predicted}", f"loss {m.loss:.2f}")
            for m in found.mistakes
        ],
        "given": f"What the network was given in step {given.step + 1:,}: the beginning of the"
        f" first replica's batch{mixed}.",
        "samples": [(png_uri(pixels), label, "") for pixels, label in samples],
    }


def confusions(classes: Sequence[str], matrix: NDArray[np.int64], where: str) -> dict[str, Any]:
    """The matrix as a table, shaded; of many classes its largest confusions."""
    if len(classes) > _MATRIX_CLASSES:
        wrong = matrix - np.diag(matrix.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
        places = [divmod(int(place), len(classes)) for place in order]
        rows = [
            (classes[i], classes[j], _cell(int(wrong[i, j]), str(wrong[i, j])))
            for i, j in places
            if wrong[i, j]
        ]
        caption = f"The {len(rows)} most frequent confusions, {where}"
        return {"caption": caption, "head": ["true class", "predicted", "images"], "rows": rows}
    totals = np.maximum(matrix.sum(axis=1), 1)
    lines: list[tuple[Any, ...]] = []
    for i, name in enumerate(classes):
        cells = []
        for j, count in enumerate(matrix[i].tolist()):
            shade = f"background: rgba(var(--heat), {0.6 * count / totals[i]:.3f})"
            kind = "true" if i == j else "" if count else "zero"
            cells.append(_cell(count, str(count), style=shade if count else "", kind=kind))
        lines.append((name, *cells))
    return {
        "caption": f"Images by true class (rows) and predicted class (columns), {where}",
        "head": ["true class", *classes],
        "rows": lines,
        "kind": "confusion",
    }


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A data: URI of an image, uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
