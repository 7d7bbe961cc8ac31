"""Curves as SVG, drawn by hand: a page that needs no script and no library."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_resnet.report.markup import Html, element

# Small, so that its letters stay legible on a phone; two stand side by side on a wide screen.
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 36  # the last mark of 3 digits is not cut
_BUCKETS = 200
COLOURS = 6

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    points: Points
    colour: int
    dashed: bool = False


def thin(points: Points, buckets: int = _BUCKETS) -> list[tuple[float, float]]:
    """At most about 2 * `buckets` of the points: the lowest and highest of each, first and last.

    The extremes stay, so a spike that is one step wide is still drawn.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for number in range(buckets):
        start, stop = (len(points) * n // buckets for n in (number, number + 1))
        part = range(start, stop)
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(title: str, unit: str, series: Sequence[Series], zero: bool = False) -> Html:
    """A figure of curves over epochs, with its legend.

    Args:
        unit: of the vertical axis, for the caption.
        zero: the vertical axis includes 0.
    """
    drawn = [Series(s.label, thin(s.points), s.colour, s.dashed) for s in series if s.points]
    if not drawn:
        return element("p", f"{title}: not logged.", class_="note")
    frame = _Frame.around([p for s in drawn for p in s.points], zero)
    names = ", ".join(dict.fromkeys(s.label for s in drawn))
    curves = (_curve(s, frame) for s in drawn)
    picture = element(
        "svg",
        element("title", f"{title} over epochs: {names}"),
        *frame.axes(),
        *curves,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} over epochs: {names}",
    )
    keys = drawn if len(series) > 1 else []  # a single curve is named by the title
    legend = element("span", *(_key(s) for s in keys), class_="legend")
    caption = element("figcaption", element("b", title), f" {unit} ", legend)
    return element("figure", caption, picture, class_="chart")


@dataclass(frozen=True)
class _Frame:
    """From figures to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    @staticmethod
    def around(points: Points, zero: bool) -> "_Frame":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys, default=0.0), max(ys, default=1.0)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high == low:
            low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
        low, high = _rounded(low, high)
        right = max(xs)
        return _Frame((0.0, right if right > 0 else 1.0), (low, high))

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    def axes(self) -> list[Html]:
        parts = []
        for value in ticks(*self.y):
            _, y = self.place(0.0, value)
            kind = "grid" if value else "axis"  # of a gap: on which side of zero is it?
            parts.append(element("path", d=f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}", class_=kind))
            parts.append(_text(_LEFT - 6, y + 4, _mark(value), "end"))
        for value in ticks(*self.x):
            x, _ = self.place(value, self.y[0])
            bottom = _HEIGHT - _BOTTOM
            parts.append(element("path", d=f"M{x:.1f} {bottom}v4", class_="tick"))
            parts.append(_text(x, bottom + 16, _mark(value), "middle"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_text(middle, _HEIGHT - 5, "epoch", "middle"))
        return parts


def _mark(value: float) -> str:
    """A mark's number; 20,000 rather than 2e+04."""
    return f"{value:,.0f}" if abs(value) >= 1000 or not value else f"{value:.4g}"


def _rounded(low: float, high: float) -> tuple[float, float]:
    """The range widened to marks, so that no curve ends above the highest one."""
    inside = ticks(low, high)
    step = inside[1] - inside[0] if len(inside) > 1 else high - low
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _curve(series: Series, frame: _Frame) -> Html:
    places = [frame.place(*point) for point in series.points]
    kind = _class(series)
    if len(places) == 1:
        x, y = places[0]
        return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"dot {kind}")
    steps = itertools.chain("M", itertools.repeat("L"))
    path = "".join(f"{s}{x:.1f} {y:.1f}" for s, (x, y) in zip(steps, places, strict=False))
    return element("path", d=path, class_=f"line {kind}")


def _key(series: Series) -> Html:
    """An entry of the legend; the entry holds together when the line breaks."""
    swatch = element(
        "svg",
        element("path", d="M0 5H22", class_=f"line {_class(series)}"),
        viewBox="0 0 22 10",
        aria_hidden="true",
    )
    return element("span", swatch, series.label, class_="key")


def _class(series: Series) -> str:
    return f"c{series.colour % COLOURS}" + (" dashed" if series.dashed else "")


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
