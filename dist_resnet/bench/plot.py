"""A bar chart as SVG, written by hand: one figure does not need a plotting library."""

from html import escape

from dist_resnet.bench.report import Report, number

_BAR, _GAP, _LABEL, _WIDTH, _TOP = 18, 6, 300, 420, 56
_COLOURS = {True: "#1f6f8b", False: "#b9c4c9"}


def bar_chart(report: Report) -> str:
    """Bars of the plotted table's rows, whiskers for quartiles; ours in a colour of their own."""
    table, key = report.plot
    rows = [row for row in report.rows if row["table"] == table and row.get(key) is not None]
    top = max((float(row[key]) for row in rows), default=1.0) or 1.0
    height = _TOP + len(rows) * (_BAR + _GAP) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 110}"'
        f' height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="{height}" fill="white"/>',
        _text(8, 20, f"{report.kind}: {key.replace('_', ' ')}", size=15),
        _text(8, 38, f"{table}; median of rounds, whiskers: quartiles"),
    ]
    for place, row in enumerate(rows):
        parts += _bar(row, key, top, _TOP + place * (_BAR + _GAP))
    hardware = report.facts.get("hardware", {})
    where = hardware.get("gpu") or f"{hardware.get('cpu', '')}, {hardware.get('cores', '?')} cores"
    parts.append(_text(8, height - 10, f"{where}; commit {str(report.facts.get('commit'))[:10]}"))
    return "\n".join([*parts, "</svg>", ""])


def _bar(row: dict[str, object], key: str, top: float, y: int) -> list[str]:
    value = float(str(row[key]))
    length = max(1.0, _WIDTH * value / top)
    ours = str(row.get("name", "")).startswith("ours")
    labels = [str(row[k]) for k in ("batch", "ranks", "replicas", "network") if k in row]
    label = " · ".join([str(row.get("name", "")), *labels])
    middle = y + _BAR - 5
    parts = [
        _text(_LABEL - 8, middle, label, anchor="end"),
        f'<rect x="{_LABEL}" y="{y}" width="{length:.1f}" height="{_BAR}"'
        f' fill="{_COLOURS[ours]}"/>',
    ]
    end = length
    quartiles = row.get(f"{key}_quartiles")
    if isinstance(quartiles, list):
        low, high = (_LABEL + _WIDTH * float(q) / top for q in quartiles)
        centre = y + _BAR / 2
        parts.append(
            f'<path d="M{low:.1f} {centre}H{high:.1f}M{low:.1f} {y + 5}V{y + _BAR - 5}'
            f'M{high:.1f} {y + 5}V{y + _BAR - 5}" stroke="black" fill="none"/>'
        )
        end = max(length, high - _LABEL)
    return [*parts, _text(_LABEL + end + 6, middle, number(value))]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
