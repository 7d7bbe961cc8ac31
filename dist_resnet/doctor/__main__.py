"""Examine this machine: python -m dist_resnet.doctor [FILE.yaml ...] [key=value ...]

The configuration says which dataset, folder and device. Under torchrun, or with DOCTOR=1 before any
launcher, the processes examine their network, clocks, versions and data together too. Exit code 2
if anything failed.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, EXIT_USER
from dist_resnet.base.files import write_for_user
from dist_resnet.base.launcher import environment_int, environment_world_size
from dist_resnet.config.load import load_config
from dist_resnet.distributed.group import gather_objects, start, stop
from dist_resnet.doctor import Finding, show
from dist_resnet.doctor.network import network_findings
from dist_resnet.doctor.node import node_findings


def main(arguments: Sequence[str]) -> int:
    """Examine and print; the exit code."""
    parser = Parser("python -m dist_resnet.doctor", __doc__)
    parser.add_argument("words", nargs="*", metavar="FILE.yaml, key=value", help="as of a training")
    config = load_config(parser.parse_args(arguments).words)
    several = environment_int("GROUP_WORLD_SIZE", 1) > 1
    good = True
    if environment_int("LOCAL_RANK", 0) == 0:
        local_size = environment_int("LOCAL_WORLD_SIZE", 1, least=1)
        good = show(node_findings(config, local_size), several)
    if environment_world_size() == 1:
        how = "DOCTOR=1 launch/single_node.sh or multi_node.sh examines several together"
        show([Finding("ok", "processes", "one", how)], several)
        return _verdict(EXIT_DONE if good else EXIT_USER)
    world = start(config.parallel.device, config.parallel.timeout_seconds)
    try:
        findings = network_findings(config, world)
        if world.is_main:
            good &= show(findings, several)
        # The others wait: torchrun would end rank 0 in the middle of its lines.
        return _verdict(EXIT_DONE if all(gather_objects(good)) else EXIT_USER)
    finally:
        stop()


def _verdict(code: int) -> int:
    """The code to end with: 0 under launch/run.sh, which reads the verdict from a file.

    Told by the exit code, it would be buried under torchrun's own report of a failed process.
    """
    file = os.environ.get("DOCTOR_VERDICT")
    if file is None:
        return code
    write_for_user(Path(file), f"{code}\n")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
