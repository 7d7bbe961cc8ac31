"""Tables from the benchmarks' JSON: python -m dist_resnet.bench.readme PAGE.md

Between `<!-- bench FILE: TABLE -->` and `<!-- end -->` stands the table of that name in FILE, whose
path starts beside the README; above it, where and how it was measured.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_resnet.base.cli import run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import write_for_user
from dist_resnet.bench.report import cells_of

_BLOCK = re.compile(r"(<!-- bench (\S+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, folder: Path) -> str:
    """`text` with every block made anew.

    Args:
        folder: where the named files lie.

    Raises:
        UserError: a file or a table that does not exist.
    """

    def fill(match: re.Match[str]) -> str:
        report = _read(folder / match[2])
        rows = [row for row in report["rows"] if row["table"] == match[3]]
        if not rows:
            raise UserError(f"{match[2]}: has no table {match[3]!r}")
        return f"{match[1]}{_source(report)}\n\n{_markdown(rows)}\n{match[4]}"

    return _BLOCK.sub(fill, text)


def _read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        return report
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a benchmark's JSON: {error}") from None


def _source(report: dict[str, Any]) -> str:
    facts = report["facts"]
    hardware, versions = facts["hardware"], facts["versions"]
    where = hardware.get("gpu") or f"{hardware['cores']} cores of {hardware['cpu']}"
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "ffcv", "wandb"))
    commit = str(facts["commit"])[:7]
    return f"`{facts['command']}` at {commit}; {where}; {used}; median [quartiles]:"


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    head, *lines = cells_of(rows)
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the named file; the exit code."""
    if len(arguments) != 1:
        raise UserError("usage: python -m dist_resnet.bench.readme README.md")
    path = Path(arguments[0])
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    write_for_user(path, with_tables(text, path.parent))
    return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
