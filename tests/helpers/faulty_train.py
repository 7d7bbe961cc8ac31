"""dist_resnet.train with one fault built in: FAULT RANK STEP, then its own arguments.

nan: the loss of that step is not finite. hang: the rank sleeps for ever. hold, or hold:FILE: it
waits until it is asked to stop, or until FILE is there, so that what befalls the job meets it there
on any machine. These strike in the first start only, so that a restarted job can go on. decline:
any evaluation at a low rate is one.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from dist_resnet.base import signals
from dist_resnet.base.cli import run_command
from dist_resnet.base.launcher import environment_rank, restart_count
from dist_resnet.step import train_step as step_module
from dist_resnet.train import main
from dist_resnet.training import loop

fault, _, file = sys.argv[1].partition(":")
rank, step = int(sys.argv[2]), int(sys.argv[3])
original = step_module.TrainStep.sum_over_group


def faulty(self: step_module.TrainStep, *batch: Any) -> None:
    original(self, *batch)
    struck = environment_rank() == rank and self.state.step == step and restart_count() == 0
    if struck and fault == "hang":
        time.sleep(3600)
    while struck and fault == "hold" and not (signals.received() or (file and Path(file).exists())):
        time.sleep(0.01)
    if struck and fault == "nan":
        self.state.flat.gradients.mul_(torch.nan)
        self.state.flat.loss.mul_(torch.nan)


if __name__ == "__main__":
    if fault == "decline":
        loop.decline_threshold = lambda top1, images: -1.0
    step_module.TrainStep.sum_over_group = faulty  # type: ignore[method-assign]
    run_command(lambda: main(sys.argv[4:]))
