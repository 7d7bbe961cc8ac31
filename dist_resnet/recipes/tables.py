"""Tables of kept runs: one row for each setting, over its seeds."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dist_resnet.recipes.kept import Kept, read_kept

_BLOCK = re.compile(r"(<!-- runs (\S+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, str]


def with_runs(text: str, folder: Path) -> str:
    """`text` with every block `<!-- runs FOLDER: GROUP -->` ... `<!-- end -->` made anew.

    Args:
        folder: where the named folders lie.

    Raises:
        UserError: a group without runs.
    """

    def fill(match: re.Match[str]) -> str:
        runs = read_kept(folder / match[2], match[3])
        return f"{match[1]}{section(runs)}\n{match[4]}"

    return _BLOCK.sub(fill, text)


def section(runs: Sequence[Kept]) -> str:
    """Where and how the runs of a group were made, their table, and what repeats each row."""
    rows = by_setting(runs)
    varying = _varying(runs)
    table = [_row(seeds, varying) for seeds in rows]
    columns = list(dict.fromkeys(key for row in table for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in table)]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commands = "\n".join(dict.fromkeys(seeds[0]["command"] for seeds in rows))
    return f"{_source(runs)}\n\n{markdown}\n\nRow by row, the first seed:\n\n```\n{commands}\n```"


def by_setting(runs: Sequence[Kept]) -> list[list[Kept]]:
    """Runs that differ by nothing but their seed, side by side, in the order of the seeds."""
    found: dict[str, list[Kept]] = {}
    for run in sorted(runs, key=lambda run: run["settings"].get("seed", 0)):
        found.setdefault(repr(sorted(_settings(run).items())), []).append(run)
    return list(found.values())


def _settings(run: Kept) -> dict[str, Any]:
    return {key: value for key, value in run["settings"].items() if key != "seed"}


def _varying(runs: Sequence[Kept]) -> list[str]:
    """Keys in which the runs differ, the seed aside."""
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1]


def _row(seeds: Sequence[Kept], varying: Sequence[str]) -> Row:
    first = seeds[0]
    row = {key: str(first["settings"].get(key, "default")) for key in varying}
    row["epochs"] = f"{fmean(run['epochs'] for run in seeds):g}"
    row["global batch"] = str(first["global_batch_size"])
    row["n"] = str(len(seeds))
    row["seeds"] = ", ".join(str(run["settings"].get("seed", 0)) for run in seeds)
    of = "held out" if first["eval_set"] != "test set" else "test"
    for key, name in {"val/top1": f"{of} top-1", "val/top1_tta": "with mirror images"}.items():
        if key in first["figures"]:
            row[name] = _percent([run["figures"][key] for run in seeds])
    row["train top-1"] = _percent([run["figures"]["train/top1"] for run in seeds])
    row["gap"] = _percent([run["figures"]["gap/top1"] for run in seeds])
    if (half := [_halfway(run) for run in seeds]) and None not in half:
        row["halfway"] = _percent([value for value in half if value is not None])
    row["hours"] = f"{fmean(run['wall_seconds'] for run in seeds) / 3600:.2f}"
    return row


def _halfway(run: Kept) -> float | None:
    """Validation accuracy of the evaluation at half of the epochs, if there was one there."""
    curve = run["curve"]
    for epoch, value in zip(curve["epoch"], curve["val/top1"], strict=True):
        if abs(epoch - run["epochs"] / 2) < 0.01:
            return float(value)
    return None


def _percent(shares: Sequence[float]) -> str:
    """Mean in percent, and the standard deviation of several."""
    text = f"{100 * fmean(shares):.2f}"
    return f"{text} ± {100 * stdev(shares):.2f}" if len(shares) > 1 else text


def _source(runs: Sequence[Kept]) -> str:
    """Where: all there were, as the runs of a group may be of several days."""
    places = dict.fromkeys(
        f"{run['world_size']} x {run['hardware']['threads_per_rank']} threads of "
        f"{run['hardware'].get('gpu') or run['hardware']['cpu']}"
        for run in runs
    )
    commits = dict.fromkeys(str(run["commit"])[:7] for run in runs)
    torch = dict.fromkeys(run["versions"]["torch"] for run in runs)
    total = sum(run["wall_seconds"] for run in runs) / 3600
    return (
        f"{len(runs)} {'runs' if len(runs) > 1 else 'run'}, {total:.1f} hours in all;"
        f" {', '.join(places)}; torch {', '.join(torch)}; at {', '.join(commits)}; percent, of the"
        " last epoch; mean ± standard deviation over seeds:"
    )
