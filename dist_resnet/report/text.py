"""The report for a terminal."""

from collections.abc import Sequence

from dist_resnet.base.paths import printable
from dist_resnet.report.figures import headline, per_class, remedies, result
from dist_resnet.report.record import RunRecord

BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = "_.:-=+*#"  # in their place where the terminal's encoding has no blocks
_SPARK_WIDTH, _BAR_WIDTH = 60, 30


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH, marks: str = BLOCKS) -> str:
    """One character a value, lowest to highest; of more than `width` values, evenly spaced ones.

    The last value is always among them.
    """
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    low, high = min(values), max(values)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join(marks[round((value - low) * scale)] for value in values)


def render_text(runs: Sequence[RunRecord], plain: bool = False) -> str:
    """All runs, one after the other; `plain`: of ASCII characters alone, but for names."""
    return "\n\n".join("\n".join(_lines(run, plain)) for run in runs)


def _lines(run: RunRecord, plain: bool) -> list[str]:
    marks = _PLAIN if plain else BLOCKS
    lines = [printable(run.label), f"  {printable(result(run))}"]
    lines += [f"  {advice}", ""] if (advice := remedies(run)) else [""]
    lines += [f"  {figure.name:16} {figure.text}" for figure in headline(run)]
    curve = [value for _, value in run.curve("val/top1")]
    if curve:
        span = f"{min(curve):.4f} to {max(curve):.4f}, {len(curve)} evaluations"
        lines += ["", f"  val/top1  {sparkline(curve, marks=marks)}  {span}"]
    classes = per_class(run)
    width = max((len(figure.name) for figure in classes), default=0)
    lines += ["", *(["  accuracy by class"] if classes else [])]
    for figure in classes:
        share = min(max(figure.value, 0), 1) if isinstance(figure.value, float | int) else 0
        lines.append(
            f"    {figure.name:{width}} {figure.text:>6} {marks[-1] * round(share * _BAR_WIDTH)}"
        )
    findings = run.diagnosis
    lines += ["", "  diagnosis" if findings else "  no evaluation yet: no diagnosis"]
    lines += [f"    {finding['name']}: {finding['text']}" for finding in findings]
    return [line.replace("–", "-") if plain else line for line in lines]
