"""Results of recipes: python -m tools.recipes keep|plot GROUP ...

  keep GROUP RUN [RUN ...] [--folder DIR]   condense finished runs to one small JSON each
  plot GROUP FILE.svg [--folder DIR]        the curves of a group's runs

DIR is benchmarks/runs. `python -m tools.pages` makes the tables of them.
"""

import sys
from collections.abc import Sequence

from dist_resnet.base.chart import Series, curves_file
from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import write_for_user
from dist_resnet.base.paths import user_path
from tools.kept import Kept, condense, read_kept, write_kept

_LOW = 0.5  # top-1 below it is only the first epochs


def main(arguments: Sequence[str]) -> int:
    """Do what is asked; the exit code."""
    parser = Parser("python -m tools.recipes", __doc__)
    parser.add_argument("action", choices=("keep", "plot"))
    parser.add_argument("group")
    parser.add_argument("paths", nargs="+", type=user_path, metavar="RUN or FILE.svg")
    parser.add_argument("--folder", type=user_path, default="benchmarks/runs", metavar="DIR")
    asked = parser.parse_args(arguments)
    if asked.action == "keep":
        for run in [condense(path, asked.group) for path in asked.paths]:
            print(write_kept(run, asked.folder))
    elif len(asked.paths) > 1:
        raise UserError("recipes: plot takes one FILE.svg")
    else:
        write_for_user(asked.paths[0], top1_curves(read_kept(asked.folder, asked.group)))
    return EXIT_DONE


def top1_curves(runs: Sequence[Kept]) -> str:
    """An SVG file of top-1 over epochs: evaluation solid, training dashed, a colour a run."""
    series = []
    for colour, run in enumerate(runs):
        label, curve = f"{run['name']}: {100 * run['figures']['val/top1']:.2f}%", run["curve"]
        for key in ("val/top1", "train/top1"):
            both = zip(curve["epoch"], curve[key], strict=True)
            points = [(x, y) for x, y in both if y is not None and y >= _LOW]
            series.append(Series(label, points, colour, dashed=key == "train/top1"))
    note = "solid: evaluation; dashed: training, as trained on; below 0.5 not drawn"
    return curves_file(f"{runs[0]['group']}: top-1", note, series)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
