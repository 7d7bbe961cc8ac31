"""Report on runs: python -m dist_resnet.report RUN [RUN ...] [--output FILE.html] [--text]

RUN is a run folder, also of a run that goes on: called again, the report shows its newest state.
Several runs stand side by side, with the configuration keys in which they differ. Where a
checkpoint and the dataset lie here, the page also shows the confusion matrix, the worst mistakes
and augmented training images; the dataset is looked for at data.root of the run's configuration.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import check_writable, write_for_user
from dist_resnet.base.paths import user_path
from dist_resnet.base.terminal import forgive
from dist_resnet.report.record import read_records
from dist_resnet.report.text import BLOCKS, render_text


def main(arguments: Sequence[str]) -> int:
    """Read the runs, write the page or print the text; the exit code."""
    asked = _parse(arguments)
    records = read_records(asked.runs)
    if asked.text:
        print(render_text(records, plain=not _shows_blocks()))
        return EXIT_DONE
    from dist_resnet.report.page import render_page

    output = asked.output or Path("report.html")
    forgive()
    check_writable(output)  # before the model is evaluated, which takes a while
    print("report: evaluating the checkpoints that are here ...", file=sys.stderr)
    page = render_page(records)
    write_for_user(output, page)
    print(f"{output}: {len(records)} run{'s' * (len(records) > 1)}")
    return EXIT_DONE


def _shows_blocks() -> bool:
    try:
        BLOCKS.encode((sys.stdout and sys.stdout.encoding) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m dist_resnet.report", __doc__)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN")
    parser.add_argument(
        "--output", "--out", type=user_path, metavar="FILE",
        help="the page, one self-contained file; default: report.html",
    )  # fmt: skip
    parser.add_argument(
        "--text", action="store_true", help="print figures, a curve and the diagnosis; no file"
    )
    asked = parser.parse_args(arguments)
    if asked.text and asked.output is not None:
        raise UserError("report: --text prints and writes no file; leave --output away")
    return asked


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
