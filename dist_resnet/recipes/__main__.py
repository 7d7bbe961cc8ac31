"""Results of recipes, kept as one small JSON a run, and the tables made of them.

  python -m dist_resnet.recipes keep GROUP RUN [RUN ...] [--folder DIR]   condense finished runs
  python -m dist_resnet.recipes tables FILE.md                            fill the page's tables
  python -m dist_resnet.recipes plot GROUP FILE.svg [--folder DIR]        their curves

DIR is benchmarks/runs. Runs of one GROUP stand in one table, a row for each setting over its seeds.
"""

import argparse
import sys
from collections.abc import Sequence

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import write_for_user
from dist_resnet.base.paths import user_path
from dist_resnet.base.terminal import forgive
from dist_resnet.recipes.curves import curve_chart
from dist_resnet.recipes.kept import condense, read_kept, write_kept
from dist_resnet.recipes.tables import with_runs


def main(arguments: Sequence[str]) -> int:
    """Do what is asked; the exit code."""
    asked = _parser().parse_args(arguments)
    forgive()
    if asked.action == "keep":
        for run in [condense(path, asked.group) for path in asked.runs]:
            print(write_kept(run, asked.folder))
    elif asked.action == "plot":
        write_for_user(asked.file, curve_chart(read_kept(asked.folder, asked.group)))
    else:
        try:
            text = asked.file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{asked.file}: {error.strerror}") from None
        write_for_user(asked.file, with_runs(text, asked.file.parent))
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m dist_resnet.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    keep, tables, plot = (actions.add_parser(name) for name in ("keep", "tables", "plot"))
    for action in (keep, plot):
        action.add_argument("group")
        action.add_argument("--folder", type=user_path, default="benchmarks/runs")
    keep.add_argument("runs", nargs="+", type=user_path, metavar="RUN")
    plot.add_argument("file", type=user_path)
    tables.add_argument("file", type=user_path)
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
