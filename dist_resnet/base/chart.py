"""Curves and bars as SVG: what shows them needs no script, and what draws them no library."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from dist_resnet.base.tables import number

# Small, so that its letters stay legible on a phone; two stand side by side on a wide screen.
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 36  # the last mark of 3 digits is not cut
_BAR, _PITCH, _LABEL = 18, 24, 300
_BUCKETS = 200
COLOURS = 6
# What surrounds a drawing gives the colours; a file of its own gets those of _FILE.
STYLE = """
svg text { font: 12px Charter, "Bitstream Charter", Georgia, "DejaVu Serif", serif;
  fill: var(--soft); }
.grid { stroke: var(--faint); } .axis { stroke: var(--rule); } .tick { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 3; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.dot { fill: var(--paper); stroke-width: 2; }
"""
_FILE = """
svg { --paper: #fff; --soft: #444; --rule: #d4d4d4; --faint: #e4e4e4; --c0: #1f6f8b; --c1: #b5541c;
  --c2: #4a7a2c; --c3: #7b4a9e; --c4: #9a7b00; --c5: #a3305c; background: #fff; }
.bar { fill: #b9c4c9; } .ours { fill: var(--c0); }
"""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    points: Points
    colour: int
    dashed: bool = False

    @property
    def kind(self) -> str:
        """Its classes in the style sheet."""
        return f"line c{self.colour % COLOURS}" + (" dashed" if self.dashed else "")


@dataclass(frozen=True)
class Bar:
    """One bar, with whiskers where the quartiles are known."""

    label: str
    value: float
    quartiles: tuple[float, float] | None = None
    ours: bool = False


def thin(points: Points, buckets: int = _BUCKETS) -> list[tuple[float, float]]:
    """At most about 2 * `buckets` of the points: the lowest and highest of each, first and last.

    The extremes stay, so a spike that is one step wide is still drawn.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        part = range(*(len(points) * n // buckets for n in (bucket, bucket + 1)))
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


def curves(title: str, series: Sequence[Series], zero: bool = False) -> str:
    """An <svg> of curves over epochs; empty where no series has a point.

    Args:
        zero: the vertical axis includes 0.
    """
    drawn = [replace(s, points=thin(s.points)) for s in series if s.points]
    if not drawn:
        return ""
    name = escape(f"{title} over epochs: {', '.join(dict.fromkeys(s.label for s in drawn))}")
    frame = _Frame.around([p for s in drawn for p in s.points], zero)
    inner = "".join([*frame.axes(), *(_curve(s, frame) for s in drawn)])
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{name}"><title>{name}</title>{inner}</svg>'


def curves_file(title: str, note: str, series: Sequence[Series]) -> str:
    """A file of curves with its heading, and a line of legend for each solid curve."""
    named = [s for s in series if not s.dashed]
    keys = [
        f'<path d="M{_LEFT} {y - 4}h24" class="{s.kind}"/>{_text(_LEFT + 30, y, s.label)}'
        for y, s in zip(itertools.count(_HEIGHT + 60, 18), named, strict=False)
    ]
    drawing = curves(title, series).replace("<svg ", f'<svg y="44" height="{_HEIGHT}" ', 1)
    return _file(_WIDTH, _HEIGHT + 60 + 18 * len(named), title, note, [drawing, *keys])


def bars_file(title: str, note: str, bars: Sequence[Bar]) -> str:
    """A file of bars, one below the other."""
    top = max((bar.value for bar in bars), default=1.0) or 1.0
    parts = []
    for y, bar in zip(itertools.count(56, _PITCH), bars, strict=False):
        length, middle = max(1.0, _WIDTH * bar.value / top), y + _BAR - 5
        kind = "bar ours" if bar.ours else "bar"
        size = f'width="{length:.1f}" height="{_BAR}"'
        parts.append(f'<rect x="{_LABEL}" y="{y}" {size} class="{kind}"/>')
        end = _LABEL + length
        if bar.quartiles:
            low, high = (_LABEL + _WIDTH * q / top for q in bar.quartiles)
            ends = "".join(f"M{x:.1f} {y + 5}V{y + _BAR - 5}" for x in (low, high))
            parts.append(f'<path d="M{low:.1f} {y + 9}H{high:.1f}{ends}" class="tick"/>')
            end = max(end, high)
        parts.append(_text(_LABEL - 8, middle, bar.label, "end"))
        parts.append(_text(end + 6, middle, number(bar.value)))
    return _file(_LABEL + _WIDTH + 110, 64 + _PITCH * len(bars), title, note, parts)


def _file(width: int, height: int, title: str, note: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    )
    style, heading = f"<style>{escape(STYLE + _FILE)}</style>", _text(8, 18, title)
    return "\n".join([head, style, heading, _text(8, 36, note), *parts, "</svg>", ""])


@dataclass(frozen=True)
class _Frame:
    """From figures to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    @staticmethod
    def around(points: Points, zero: bool) -> "_Frame":
        xs, ys = zip(*points, strict=True)
        low, high = min(ys), max(ys)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high == low:
            low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
        # Widened to marks, so that no curve ends above the highest one.
        inside = ticks(low, high)
        step = inside[1] - inside[0] if len(inside) > 1 else high - low
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return _Frame((0.0, max(xs) if max(xs) > 0 else 1.0), (low, high))

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + across * width, _HEIGHT - _BOTTOM - up * height

    def axes(self) -> list[str]:
        parts, bottom = [], _HEIGHT - _BOTTOM
        for value in ticks(*self.y):
            _, y = self.place(0.0, value)
            kind = "grid" if value else "axis"  # of a gap: on which side of zero is it?
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="{kind}"/>')
            parts.append(_text(_LEFT - 6, y + 4, number(value), "end"))
        for value in ticks(*self.x):
            x, _ = self.place(value, self.y[0])
            parts.append(f'<path d="M{x:.1f} {bottom}v4" class="tick"/>')
            parts.append(_text(x, bottom + 16, number(value), "middle"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        return [*parts, _text(middle, _HEIGHT - 5, "epoch", "middle")]


def _curve(series: Series, frame: _Frame) -> str:
    places = [frame.place(*point) for point in series.points]
    if len(places) == 1:
        x, y = places[0]
        kind = series.kind.replace("line", "dot")
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="{kind}"/>'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path d="M{path}" class="{series.kind}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
