"""Train a model: python -m dist_resnet.train [FILE.yaml ...] [key=value ...]

Under torchrun every process is a rank; without it there is one. `--help` lists every key,
`--print-config` shows the resolved configuration and what follows from it.

The same command gives the same weights, bit for bit, on the same kind of processor or GPU with the
same build of torch and the same parallel.threads. Another kind rounds otherwise; a run that goes on
there says so.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_resnet.base.cli import run_command
from dist_resnet.base.errors import EXIT_DONE
from dist_resnet.base.home import ensure_home
from dist_resnet.base.launcher import environment_rank
from dist_resnet.base.terminal import forgive
from dist_resnet.config.keys import describe_keys
from dist_resnet.config.load import load_config, named_keys, to_yaml
from dist_resnet.config.schema import Config
from dist_resnet.training.api import as_argument, as_in_a_new_process, callable_module


def main(arguments: Sequence[str]) -> int:
    """Parse, then train; the exit code."""
    if {"-h", "--help"} & set(arguments):
        return _show(_help())
    only_print = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    config = load_config(arguments)
    if only_print:
        from dist_resnet.config.preview import preview

        return _show(to_yaml(config) + "\n" + preview(config))
    # torch takes a second or two to import: not before the configuration is known to be right.
    from dist_resnet.training.run import run

    forgive()
    run(config, named_keys(arguments))
    return EXIT_DONE


def train(*sources: Config | Mapping[str, Any] | str | Path, **settings: Any) -> dict[str, Any]:
    """Train as `python -m dist_resnet.train` does, and return what summary.json holds.

    One process, or under torchrun each of its processes. Continues a run that was interrupted, as
    the command does; one that is complete is not trained again. Ctrl-C (a notebook's stop button)
    saves at the next step and raises KeyboardInterrupt.

    Args:
        sources: configurations, mappings of keys, YAML files and "key=value" texts; later ones win.
        settings: keys over these: seed=1, optim={"lr": 0.1}.

    Returns:
        The summary: `val/top1` (share of 1), `gap/top1`, `images_per_second`, `wall_seconds` and so
        on (docs/usage.md, "The run folder"). Empty on a machine that does not see the run folder.

    Raises:
        UserError: configuration, data or environment, in one line.
        Diverged: loss or gradient stopped being finite.
    """
    arguments = [*map(as_argument, sources), settings]
    config = load_config(arguments)
    ensure_home()
    from dist_resnet.base import signals  # torch takes a second or two to import
    from dist_resnet.runs.folder import RunFolder
    from dist_resnet.training import run

    with as_in_a_new_process(), signals.borrowed():
        folder = run.run(config, named_keys(arguments))
    return RunFolder(folder).summary()


def _show(text: str) -> int:
    if environment_rank() == 0:
        print(text)
    return EXIT_DONE


def _help() -> str:
    lines = [str(__doc__), "Keys (type, default):", ""]
    for key, kind, default, meaning in describe_keys():
        lines += [f"  {key}  ({kind}, {default})", f"      {meaning}"]
    return "\n".join(lines)


callable_module(__name__, train)

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
