"""Train a model: python -m dist_resnet.train [FILE.yaml ...] [key=value ...]

Under torchrun every process is a rank; without it there is one. `--help` lists every key,
`--print-config` shows the resolved configuration and what follows from it.

The same command gives the same weights, bit for bit, on the same kind of processor or GPU with the
same build of torch and the same parallel.threads. Another kind rounds otherwise; a run that goes on
there says so.
"""

import sys
from collections.abc import Sequence

from dist_resnet.cli import run_command
from dist_resnet.config import describe_keys, load_config, named_keys, to_yaml
from dist_resnet.errors import EXIT_DONE
from dist_resnet.launcher import environment_rank
from dist_resnet.terminal import forgive


def main(arguments: Sequence[str]) -> int:
    """Parse, then train; the exit code."""
    if {"-h", "--help"} & set(arguments):
        return _show(_help())
    only_print = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    config = load_config(arguments)
    if only_print:
        from dist_resnet.preview import preview

        return _show(to_yaml(config) + "\n" + preview(config))
    # torch takes a second or two to import: not before the configuration is known to be right.
    from dist_resnet.run import run

    forgive()
    run(config, named_keys(arguments))
    return EXIT_DONE


def _show(text: str) -> int:
    if environment_rank() == 0:
        print(text)
    return EXIT_DONE


def _help() -> str:
    lines = [str(__doc__), "Keys (type, default):", ""]
    for key, kind, default, meaning in describe_keys():
        lines += [f"  {key}  ({kind}, {default})", f"      {meaning}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
