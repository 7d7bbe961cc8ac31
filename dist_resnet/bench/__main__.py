"""Benchmarks: python -m dist_resnet.bench NAME [options] [key=value ...]

  loader    images/s of our loaders with device augmentation, beside torchvision's and FFCV's own
  step      one training step in every mode, its share of the machine's limits, where time goes
  train     end to end, beside the loop everyone writes; one process and two ranks
  scaling   one rank and two, and their all-reduce
  startup   seconds from the command to the first step
  peers     overhead a step of other frameworks (those that are installed), and their images/s

key=value are those of the trainer (--help of dist_resnet.train lists them), such as data.root=data.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError
from dist_resnet.base.files import check_writable, write_for_user
from dist_resnet.base.launcher import under_torchrun
from dist_resnet.base.paths import user_path
from dist_resnet.base.terminal import forgive
from dist_resnet.config.load import load_config, named_keys

NAMES = {"loader": 7, "step": 7, "train": 6, "scaling": 8, "peers": 7, "startup": 5}
"""Benchmarks, and their default number of rounds."""
# Of a loop that neither evaluates nor saves, and of which each rank is one replica.
_LOOP = ("train.max_steps", "eval.", "checkpoint.", "parallel.replicas")
_RANKS = (*_LOOP, "parallel.timeout_seconds")
_MODES = ("train.step_mode", "precision.dtype", "precision.channels_last")
_OWN_KEYS = {
    "loader": (*_LOOP, "data.batch_size_per_replica", "data.loader"),
    "step": (*_RANKS, *_MODES),
    "train": _RANKS,
    "scaling": _RANKS,
    "peers": (*_RANKS, "augment.", "data.dataset", "data.loader", "data.root", "train.epochs"),
    "startup": ("log.every_steps", "run.dir", "run.name", "run.overwrite"),
}
"""Keys, or how they begin, for which a benchmark has values of its own."""
# Quick runs have to fit into a test: a slim net, small batches, the embedded digits.
_QUICK = ("data.dataset=digits", "model.widths=[8,10,12]", "data.batch_size_per_replica=8")


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, show; the exit code."""
    asked = _parser().parse_intermixed_args(arguments)
    if under_torchrun():
        raise UserError("bench: start it without torchrun; it starts its own ranks")
    if asked.rounds is not None and asked.rounds < 1:
        raise UserError(f"bench: --rounds {asked.rounds}: must be at least 1")
    pairs = (*(_QUICK if asked.quick else ()), *asked.pairs)
    config = load_config(pairs)

    from dist_resnet.bench.load import LIMIT, LoadMeter, check_idle
    from dist_resnet.bench.report import Settings, gather_facts

    for path in (asked.json, asked.plot):
        if path is not None:
            check_writable(path)  # before what takes minutes
            forgive()
    notes = not_taken(asked.name, asked.pairs)
    for note in notes:
        print(f"bench: {note}", file=sys.stderr)
    before = check_idle(asked.force, 0.2 if asked.quick else 3.0)
    rounds = asked.rounds or (2 if asked.quick else NAMES[asked.name])
    settings = Settings(config, pairs, rounds, asked.quick, asked.full)
    facts = gather_facts(config, arguments)
    meter = LoadMeter()
    report = importlib.import_module(f"dist_resnet.bench.{asked.name}").run(settings)
    during = meter.others()
    given = {"rounds": rounds, "dataset": config.data.dataset, "model": config.model.name}
    report.settings = given | report.settings
    report.facts = facts | {"other_load_cores": {"before": before, "during": during}}
    report.notes += notes
    if during > LIMIT:
        report.notes.append(f"{during:.1f} cores were busy with something else: do not believe it")
    if asked.quick:
        report.notes.append("--quick: these figures mean nothing")
    if asked.json is not None:
        write_for_user(asked.json, json.dumps(report.as_dict(), indent=2) + "\n")
    if asked.plot is not None:
        write_for_user(asked.plot, report.drawn())
    print(report.tables())
    return EXIT_DONE


def not_taken(name: str, pairs: Sequence[str]) -> list[str]:
    """A line that names what `pairs` give and the benchmark `name` sets itself; or nothing."""
    lost = [key for key in sorted(named_keys(pairs)) if key.startswith(_OWN_KEYS[name])]
    return [f"{', '.join(lost)}: set by bench {name} itself, not as given"] if lost else []


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m dist_resnet.bench", __doc__)
    parser.add_argument("name", choices=NAMES, metavar="NAME")
    parser.add_argument("pairs", nargs="*", metavar="key=value", help="the trainer's keys")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--plot", type=user_path, metavar="FILE.svg", help="draw the main table")
    parser.add_argument("--rounds", type=int, help="how often each candidate takes its turn")
    parser.add_argument("--quick", action="store_true", help="seconds, for tests; digits")
    parser.add_argument("--full", action="store_true", help="also what takes long")
    parser.add_argument("--force", action="store_true", help="on a loaded machine: warn only")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
