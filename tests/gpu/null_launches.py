"""Launches and waits of a step on a null CUDA device, as JSON: "MODE DTYPE [key=value]" ..."""

import ctypes
import json
import os
import sys

import torch

from dist_resnet.data.stream import Batch
from dist_resnet.step.captured import CHECKED_STEPS, WARM_UP_STEPS, CapturedStep
from tests.helpers.training import batch_of, small_config, train_step

KINDS = ("launch", "graph launch", "replayed kernel", "copy on device", "copy to host",
         "stream sync", "event sync", "device sync", "malloc")  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def launches(mode: str, dtype: str, *pairs: str) -> dict[str, int]:
    """Calls by kind, of the step after those that a graph is warmed up and checked in.

    Raises:
        RuntimeError: something in it waits for the device.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    config = small_config("model.widths=[16,32,64]", f"train.step_mode={mode}", *pairs)
    step = train_step(config, 1, DTYPES[dtype], torch.device("cuda"), 40)
    run = CapturedStep(step, sys.exit) if mode == "graph" else step

    def batch(number: int) -> Batch:
        host = batch_of(number, 1)
        return Batch(host.images.cuda(), host.labels.cuda(), host.samples.cuda())

    first = WARM_UP_STEPS + CHECKED_STEPS
    for number in range(first):
        run(batch(number))
    last = batch(first)
    driver.nullcuda_reset()
    torch.cuda.set_sync_debug_mode("error")
    run(last)
    torch.cuda.set_sync_debug_mode("default")
    return {kind: n for kind in KINDS if (n := driver.nullcuda_count(kind.encode()))}


if __name__ == "__main__":
    CapturedStep._differs = lambda self, expected: None  # type: ignore[method-assign]
    print(json.dumps([launches(*case.split()) for case in sys.argv[1:]]), flush=True)
    # Not through the interpreter's end: libraries tear down threads and contexts there, on a device
    # that is none, and sometimes one aborts. How a training ends is tested by the command itself.
    os._exit(0)
