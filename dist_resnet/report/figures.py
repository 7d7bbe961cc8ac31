"""The figures of a run that both the page and the text show, whole, with how to round them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from dist_resnet.base.tables import quartiles
from dist_resnet.report.record import RunRecord
from dist_resnet.runs.diagnosis import REMEDIES

Value = float | int | str | None
_BEST = "best/val/top1", "best/step"


@dataclass(frozen=True)
class Figure:
    """One figure as its file has it."""

    name: str
    value: Value
    """None: not known, or not yet."""
    form: str = ""
    """Format of the rounded value."""

    @property
    def text(self) -> str:
        """Rounded; as it stands where a file holds another kind of value than is written."""
        try:
            return "–" if self.value is None else format(self.value, self.form)
        except ValueError:
            return str(self.value)


def result(run: RunRecord) -> str:
    """What the run came to, in one line of plain words."""
    done = run.summary
    row = done or (run.evaluations[-1] if run.evaluations else {})
    top1, images, gap = (row.get(key) for key in ("val/top1", "val/images", "gap/top1"))
    epoch = row.get("epoch", run.last("epoch"))
    seconds = done.get("wall_seconds") if done else run.last("seconds")
    told = str(done.get("eval_set") or "")
    held_out = told.startswith("held-out") if told else run.config.get("data.val_split", 0) > 0
    name = "held-out" if held_out else "test"
    parts = ["no evaluation yet"]
    if _is_number(top1):
        of = f"{images:,} " if _is_number(images) else ""
        parts = [f"{100 * top1:.2f}% of {of}{name} images{_beside(run, row)}"]
    if _is_number(epoch):
        parts.append(f"{epoch:.4g} epoch{'s' * (epoch != 1)}")
    if _is_number(gap):
        parts.append(f"train minus {name} {100 * gap:+.1f} points")
    if _is_number(seconds):
        parts.append(f"{duration(seconds)}{_machine(done)}")
    return ", ".join(parts) + ("" if done else " (so far)")


def _beside(run: RunRecord, row: Mapping[str, Any]) -> str:
    """The best epoch where it was better, and the figure with mirror images where it is known."""
    parts = []
    best: list[Any] = [*(map(row.get, _BEST) if run.summary else _best(run))]
    numbers = [*best, *map(row.get, ("step", "epoch", "val/top1"))]
    if all(map(_is_number, numbers)):
        top1, at, step, epoch, last = numbers
        if 0 < at < step and top1 > last:
            parts.append(f"best {100 * top1:.2f}% at epoch {epoch * at / step:.4g}")
    if _is_number(mirrored := row.get("val/top1_tta")):
        parts.append(f"{100 * mirrored:.2f}% with mirror images")
    return f" ({', '.join(parts)})" if parts else ""


def remedies(run: RunRecord) -> str:
    """What a finished run's diagnosis advises; empty where it found nothing of the kind."""
    if not run.summary:
        return ""  # half a run looks like underfitting
    found = (finding["name"] for finding in run.diagnosis)
    return " ".join(f"{n.capitalize()}: {REMEDIES[n]}." for n in found if n in REMEDIES)


def duration(seconds: float) -> str:
    """12 s, 4 min, 1 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _machine(summary: dict[str, Any]) -> str:
    """On what: empty where the summary does not tell."""
    hardware, ranks = summary.get("hardware"), summary.get("world_size")
    if not isinstance(hardware, dict) or not isinstance(ranks, int):
        return ""
    if gpu := hardware.get("gpu"):
        return f" on {ranks} x {gpu}"
    threads = ranks * hardware.get("threads_per_rank", 1)
    return f" on {threads} thread{'s' * (threads != 1)} of {hardware.get('cpu', 'a CPU')}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int)


def headline(run: RunRecord) -> list[Figure]:
    """A finished run's figures from summary.json; else the newest of metrics.jsonl."""
    newest = {
        **dict(zip(_BEST, _best(run), strict=True)),
        "train/top1": _train_top1(run),
        "images_per_second": run.last("perf/images_per_second"),
        "wall_seconds": run.last("seconds"),
    }

    def figure(key: str, form: str, name: str = "") -> Figure:
        value = run.summary.get(key) if run.summary else newest.get(key, run.last(key))
        return Figure(name or key, _value(value), form)

    return [
        Figure("state", str(run.status.get("state", "unknown"))),
        figure("step", ",d"),
        Figure("of steps", _value(run.plan.get("total_steps")), ",d"),
        figure("epoch", ".4g"),
        *(figure(f"val/{name}", ".4f") for name in ("top1", "top5", "balanced", "f1_macro")),
        figure("best/val/top1", ".4f"),
        figure("best/step", ",d"),
        figure("val/loss", ".4f"),
        figure("train/top1", ".4f"),
        figure("gap/top1", "+.4f"),
        figure("images_per_second", ",.0f", "images/s"),
        figure("wall_seconds", ",.0f", "wall seconds"),
        figure("parameters", ",d"),
    ]


def per_class(run: RunRecord) -> list[Figure]:
    """The share of each class that is recognised, at the last evaluation."""
    prefix = "val/per_class/"
    source = run.summary or (run.evaluations[-1] if run.evaluations else {})
    found = ((key, value) for key, value in source.items() if key.startswith(prefix))
    return [Figure(key.removeprefix(prefix), _value(value), ".3f") for key, value in found]


def _value(found: object) -> Value:
    """What a figure can be; a damaged file may hold anything in its place."""
    return found if isinstance(found, float | int | str) else None


def train_curve(run: RunRecord) -> list[tuple[float, float]]:
    """(epoch, train/top1 over the epoch before an evaluation): val/top1 plus the gap."""
    return [
        (float(row.get("epoch") or 0), val + gap)
        for row in run.evaluations
        if (val := row.get("val/top1")) is not None and (gap := row.get("gap/top1")) is not None
    ]


def speed(run: RunRecord) -> list[tuple[str, tuple[float, float, float], int]]:
    """(key, quartiles, number of windows) of everything below perf/, and of the evaluations."""
    curves = {key: [value for _, value in run.curve(key)] for key in run.keys("perf/")}
    curves["evaluation, seconds"] = _evaluation_seconds(run)
    return [(key, quartiles(values), len(values)) for key, values in curves.items() if values]


def step_parts(run: RunRecord) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(epoch, milliseconds) of a whole step, and of its wait for data."""
    step, waiting = [], []
    for row in run.rows:
        total, share = row.get("perf/step_ms"), row.get("perf/data_wait_fraction")
        if total is not None and share is not None:
            epoch = float(row.get("epoch") or 0)
            step.append((epoch, float(total)))
            waiting.append((epoch, total * share))
    return step, waiting


def _evaluation_seconds(run: RunRecord) -> list[float]:
    """From the last row of training to the evaluation of the same step."""
    found, before = [], None
    for row in run.rows:
        seconds = row.get("seconds")
        if row.get("val/top1") is not None:
            if before is not None and before[0] == row.get("step") and seconds is not None:
                found.append(seconds - before[1])
        elif seconds is not None:
            before = (row.get("step"), seconds)
    return found


def _best(run: RunRecord) -> tuple[Value, Value]:
    """val/top1 and step of the first evaluation that is as good as any."""
    rows = run.evaluations
    if not rows:
        return None, None
    best = max(rows, key=lambda row: row["val/top1"] or 0.0)
    return best["val/top1"], best.get("step")


def _train_top1(run: RunRecord) -> Value:
    curve = train_curve(run)
    return curve[-1][1] if curve else None
