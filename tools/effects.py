"""The effect of each factor of a two-level factorial design, from the kept runs of a group.

Shapes: R runs, F factors.
"""

import json
import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean, median
from typing import Any

from dist_resnet.base.errors import UserError
from tools.kept import Kept

_FIGURES = {"top-1, points": ("val/top1", 100.0, "+.2f"), "loss, nats": ("val/loss", 1.0, "+.4f")}
_ABSENT = "default"


def effects_table(runs: Sequence[Kept]) -> list[list[str]]:
    """Lines of cells: a head, then a factor each; the last holds the error of an effect.

    An effect is the mean over the runs with a factor's second level, less that over those with its
    first. Keys that change together are one factor.

    Raises:
        UserError: no factor, a key of more than two values, or levels that are not balanced against
            another factor's.
    """
    factors = _factors(runs)
    columns = {
        head: [scale * _effect(runs, key, second) for _, second in factors]
        for head, (key, scale, _) in _FIGURES.items()
    }
    lines = [["factor", "from", "to", *(f"effect on {head}" for head in columns)]]
    for place, (keys, second) in enumerate(factors):
        levels = [
            ", ".join(str(run["settings"].get(key, _ABSENT)) for key in keys)
            for run in (runs[second.index(False)], runs[second.index(True)])
        ]
        found = [format(columns[head][place], form) for head, (*_, form) in _FIGURES.items()]
        lines.append([", ".join(keys), *levels, *found])
    errors = [format(standard_error(columns[h]), form[1:]) for h, (*_, form) in _FIGURES.items()]
    return [*lines, ["error of an effect (Lenth)", "", "", *errors]]


def standard_error(effects: Sequence[float]) -> float:
    """Of an effect, from all of them, most of which are taken to be noise.

    R. Lenth 1989, "Quick and easy analysis of unreplicated factorials": 1.5 times the median size
    of the effects that are no farther out than 2.5 times a first such estimate.
    """
    sizes = [abs(effect) for effect in effects]
    first = 1.5 * median(sizes)
    return 1.5 * median([size for size in sizes if size <= 2.5 * first])


def _effect(runs: Sequence[Kept], figure: str, second: Sequence[bool]) -> float:
    values = [run["figures"][figure] for run in runs]
    means = [fmean(v for v, s in zip(values, second, strict=True) if s == side) for side in (1, 0)]
    return means[0] - means[1]


def _factors(runs: Sequence[Kept]) -> list[tuple[list[str], list[bool]]]:
    """(keys, whether each run has the second level)."""
    found: dict[tuple[bool, ...], list[str]] = {}
    keys = dict.fromkeys(key for run in runs for key in run["settings"] if key != "seed")
    # Of keys that change together, one with a default says which level is the second.
    for key in sorted(keys, key=lambda key: all(key in run["settings"] for run in runs)):
        values = [json.dumps(run["settings"].get(key, _ABSENT)) for run in runs]
        levels = sorted(set(values), key=_order)
        if len(levels) == 1:
            continue
        if len(levels) > 2:
            raise UserError(f"{key} has {len(levels)} values; a factor has two")
        pattern = tuple(value == levels[1] for value in values)
        inverse = tuple(not second for second in pattern)
        found.setdefault(inverse if inverse in found else pattern, []).append(key)
    if not found:
        raise UserError("these runs differ in nothing but their seed: no factor")
    for one, other in product(found, repeat=2):
        share = 2 if one == other else 4
        if share * sum(a and b for a, b in zip(one, other, strict=True)) != len(runs):
            names = ", ".join(dict.fromkeys(found[one] + found[other]))
            raise UserError(f"{names}: not balanced in these runs")
    return [(keys, list(pattern)) for pattern, keys in found.items()]


def _order(written: str) -> tuple[bool, float, str]:
    """The default first, then numbers by size, then text."""
    value: Any = json.loads(written)
    return value != _ABSENT, value if isinstance(value, int | float) else math.inf, written
