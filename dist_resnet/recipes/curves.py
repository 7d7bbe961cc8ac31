"""Curves of kept runs as SVG, by hand: one figure does not need a plotting library."""

from collections.abc import Sequence
from html import escape

from dist_resnet.recipes.kept import Kept

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 380, 48, 44, 36
_COLOURS = ("#1f6f8b", "#b5541c", "#4a7a2c", "#7b4a9e", "#9a7b00", "#a3305c")
_LOW = 0.5  # top-1 below it is only the first epochs


def curve_chart(runs: Sequence[Kept]) -> str:
    """Top-1 over epochs: evaluation solid, training dashed, a colour for each run."""
    last = max(run["epochs"] for run in runs)
    height = _HEIGHT + 18 * len(runs)

    def place(epoch: float, share: float) -> str:
        x = _LEFT + epoch / last * (_WIDTH - _LEFT - 12)
        y = _TOP + (1 - share) / (1 - _LOW) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f} {y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(8, 20, f"{runs[0]['group']}: top-1 over epochs", 15),
        _text(8, 36, "solid: evaluation; dashed: training, as trained on; below 50% not drawn"),
    ]
    for percent in range(50, 101, 10):
        at = place(0, percent / 100)
        parts.append(f'<path d="M{at}H{_WIDTH - 12}" stroke="#ddd"/>')
        parts.append(_text(8, float(at.split()[1]) + 4, f"{percent}%"))
    for part in range(5):
        epoch = last * part / 4
        parts.append(_text(float(place(epoch, 1).split()[0]) - 8, _HEIGHT - 14, f"{epoch:g}"))
    for number, run in enumerate(runs):
        colour, curve = _COLOURS[number % len(_COLOURS)], run["curve"]
        for key, dash in (("val/top1", ""), ("train/top1", ' stroke-dasharray="4 3"')):
            points = zip(curve["epoch"], curve[key], strict=True)
            path = "L".join(place(x, y) for x, y in points if y is not None and y >= _LOW)
            if path:
                parts.append(f'<path d="M{path}" fill="none" stroke="{colour}"{dash}/>')
        label = f"{run['name']}: {100 * run['figures']['val/top1']:.2f}%"
        y = _HEIGHT + 14 + 18 * number
        parts.append(f'<path d="M{_LEFT} {y - 4}h24" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_LEFT + 30, y, label))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'
