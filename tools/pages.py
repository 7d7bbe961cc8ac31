"""Fill the tables of this repository's pages: python -m tools.pages FILE.md ...

Between `<!-- bench FILE: TABLE -->` and `<!-- end -->` stands that table of a benchmark's JSON,
between `<!-- runs FOLDER: GROUP -->` and `<!-- end -->` the kept runs of a group, a row for each
setting over its seeds, and between `<!-- effects FOLDER: GROUP -->` and `<!-- end -->` what each
factor of a two-level design did. Paths start beside the page; above each table stands what made it.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import write_for_user
from dist_resnet.base.paths import user_path
from dist_resnet.bench.report import cells_of
from tools.effects import effects_table
from tools.kept import Kept, read_kept

_BLOCK = re.compile(r"(<!-- (bench|runs|effects) (\S+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLUMNS = (
    "epochs", "global batch", "n", "seeds", "test top-1", "held out top-1", "with mirror images",
    "train top-1", "gap", "halfway", "hours",
)  # fmt: skip
Row = dict[str, str]


def filled(text: str, folder: Path) -> str:
    """`text` with every block made anew.

    Args:
        folder: where the named files and folders lie.

    Raises:
        UserError: a file, a table or a group that does not exist.
    """

    def fill(match: re.Match[str]) -> str:
        start, kind, place, name, end = match.groups()
        if kind == "runs":
            return f"{start}{of_runs(read_kept(folder / place, name))}\n{end}"
        if kind == "effects":
            return f"{start}{_markdown(effects_table(read_kept(folder / place, name)))}\n{end}"
        return f"{start}{of_benchmark(folder / place, name)}\n{end}"

    return _BLOCK.sub(fill, text)


def of_benchmark(path: Path, name: str) -> str:
    """A table of a benchmark's JSON, and what made it."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a benchmark's JSON: {error}") from None
    rows = [row for row in report["rows"] if row["table"] == name]
    if not rows:
        raise UserError(f"{path}: has no table {name!r}")
    facts = report["facts"]
    hardware, versions = facts["hardware"], facts["versions"]
    where = hardware.get("gpu") or f"{hardware['cores']} cores of {hardware['cpu']}"
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "ffcv", "wandb"))
    source = f"`{facts['command']}` at {facts['commit'][:7]}; {where}; {used}; median [quartiles]:"
    return f"{source}\n\n{_markdown(cells_of(rows))}"


def of_runs(runs: Sequence[Kept]) -> str:
    """Where and how the runs of a group were made, their table, and what repeats each row."""
    rows = by_setting(runs)
    varying = _varying(runs)
    rows.sort(key=lambda seeds: [_rank(seeds[0]["settings"].get(key)) for key in varying])
    table = [_row(seeds, varying) for seeds in rows]
    some = {key for row in table for key in row}
    head = [key for key in (*varying, *_COLUMNS) if key in some]
    markdown = _markdown([head, *([row.get(key, "") for key in head] for row in table)])
    commands = "\n".join(dict.fromkeys(seeds[0]["command"] for seeds in rows))
    return f"{_source(runs)}\n\n{markdown}\n\nRow by row, the first seed:\n\n```\n{commands}\n```"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


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


def _rank(value: Any) -> tuple[int, float, str]:
    """Defaults first, then numbers as numbers, then text."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, bool | int | float):
        return 1, float(value), ""
    return 2, 0.0, str(value)


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


def main(arguments: Sequence[str]) -> int:
    """Rewrite the named pages; the exit code."""
    parser = Parser("python -m tools.pages", __doc__)
    parser.add_argument("pages", nargs="+", type=user_path, metavar="FILE.md")
    for page in parser.parse_args(arguments).pages:
        try:
            text = page.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{page}: {error.strerror}") from None
        write_for_user(page, filled(text, page.parent))
    return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
