"""The sections of the page that show metrics: figures, diagnosis, curves, speed, classes."""

from collections.abc import Callable, Sequence

from dist_resnet.report.chart import COLOURS, Points, Series, chart
from dist_resnet.report.figures import (
    Figure,
    headline,
    per_class,
    speed,
    step_parts,
    train_curve,
)
from dist_resnet.report.markup import Html, data, element, join, table
from dist_resnet.report.record import RunRecord
from dist_resnet.runs.diagnosis import RULES

Runs = Sequence[RunRecord]
_BAR_WIDTH, _BAR_HEIGHT = 100, 7


def headline_table(runs: Runs) -> Html:
    """What the runs came to, a column each."""
    columns = [headline(run) for run in runs]
    rows = [(row[0].name, *map(_figure, row)) for row in zip(*columns, strict=True)]
    caption = (
        "Finished runs: of the last evaluation, the best one beside it (summary.json);"
        " others: the newest rows of metrics.jsonl"
    )
    return table(caption, ("figure", *(run.label for run in runs)), rows, "number")


def diagnosis(runs: Runs) -> Html:
    """The findings, and the names of the rules that found nothing."""
    return join(*(join(_heading(run, runs), _findings(run)) for run in runs))


def curves(runs: Runs) -> Html:
    """Accuracy, gap, loss and learning rate over epochs."""
    both = [
        ("Top-1 accuracy", "share of images", _train_and_val(runs, train_curve, "val/top1")),
        ("Loss", "cross-entropy, nats", _train_and_val(runs, _training_loss, "val/loss")),
    ]
    charts = [
        *(chart(title, unit, series) for title, unit, series in both),
        chart("gap/top1", "train minus val", _one_each(runs, "gap/top1"), zero=True),
        chart("Learning rate", "train/lr", _one_each(runs, "train/lr"), zero=True),
        chart("Gradient norm", "train/grad_norm", _one_each(runs, "train/grad_norm"), zero=True),
    ]
    note = (
        "Training accuracy is the mean over the epoch before each evaluation, on augmented images"
        " and, under mixup, weighted by its weights; training loss is the mean over each window of"
        " log.every_steps steps. Long curves are thinned to their extremes for drawing."
    )
    return join(element("div", *charts, class_="charts"), element("p", note, class_="note"))


def speed_section(runs: Runs) -> Html:
    """Throughput and where a step's time goes."""
    parts = [(run, *step_parts(run)) for run in runs]
    steps = [
        Series(_label(run, runs, what), points, number, dashed)
        for number, (run, total, waiting) in enumerate(parts)
        for what, points, dashed in (("step", total, False), ("wait for data", waiting, True))
    ]
    charts = [
        chart("Throughput", "images/s", _one_each(runs, "perf/images_per_second"), zero=True),
        chart("Step time", "milliseconds", steps, zero=True),
    ]
    spreads = [(run, spread) for run in runs for spread in speed(run)]
    rows = [
        (
            _label(run, runs, s.key),
            *(data(v, f"{v:,.4g}" if v < 1000 else f"{v:,.0f}") for v in (s.low, s.median, s.high)),
            data(s.windows, f"{s.windows:,}"),
        )
        for run, s in spreads
    ]
    caption = "Over all windows of metrics.jsonl, evaluation and saving left out of the steps' time"
    head = ("metric", "lower quartile", "median", "upper quartile", "windows")
    return join(element("div", *charts, class_="charts"), table(caption, head, rows, "number"))


def by_class(runs: Runs) -> Html:
    """The accuracy of every class, a column for each run."""
    found = [{figure.name: figure for figure in per_class(run)} for run in runs]
    names = list(dict.fromkeys(name for figures in found for name in figures))
    if not names:
        return element("p", "No evaluation yet.", class_="note")
    rows = [
        (name, *(_with_bar(figures.get(name), n) for n, figures in enumerate(found)))
        for name in names
    ]
    caption = "Share of each class's images that are recognised, at the last evaluation"
    return table(caption, ("class", *(run.label for run in runs)), rows, "number")


def _findings(run: RunRecord) -> Html:
    found = run.diagnosis
    if not found:
        return element("p", "No evaluation yet.", class_="note")
    items = (element(kind, finding[key]) for finding in found for kind, key in _DEFINITION)
    silent = ", ".join(name for name in RULES if name not in {f["name"] for f in found})
    notes = [f"Looked for and not found: {silent}."] if silent else []
    if not run.summary:
        notes.insert(0, "The run has not ended: this is what its rows say so far.")
    return join(element("dl", *items), element("p", " ".join(notes), class_="note"))


_DEFINITION = (("dt", "name"), ("dd", "text"))


def _train_and_val(
    runs: Runs, training: Callable[[RunRecord], Points], validation: str
) -> list[Series]:
    """Validation solid, training dashed; one run has a colour for each, several one a run."""
    series = []
    for number, run in enumerate(runs):
        colour = 1 if len(runs) == 1 else number
        series.append(Series(_label(run, runs, "validation"), run.curve(validation), number))
        series.append(Series(_label(run, runs, "training"), training(run), colour, True))
    return series


def _training_loss(run: RunRecord) -> Points:
    return run.curve("train/loss")


def _one_each(runs: Runs, key: str) -> list[Series]:
    return [Series(run.label, run.curve(key), number) for number, run in enumerate(runs)]


def _label(run: RunRecord, runs: Runs, what: str) -> str:
    return what if len(runs) == 1 else f"{run.label}, {what}"


def _heading(run: RunRecord, runs: Runs) -> Html:
    return element("h3", run.label) if len(runs) > 1 else Html()


def _figure(figure: Figure) -> str:
    return figure.text if figure.value is None else data(figure.value, figure.text)


def _with_bar(figure: Figure | None, number: int) -> str:
    if figure is None or not isinstance(figure.value, float | int):
        return "–"
    path = element(
        "path",
        d=f"M0 {_BAR_HEIGHT / 2}H{_BAR_WIDTH * figure.value:.2f}",
        class_=f"fill c{number % COLOURS}",
    )
    bar = element(
        "svg",
        path,
        viewBox=f"0 0 {_BAR_WIDTH} {_BAR_HEIGHT}",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )
    return join(_figure(figure), bar)
