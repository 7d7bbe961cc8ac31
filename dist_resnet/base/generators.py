"""torch's default generators, which ordinary modules draw from: set, kept and compared."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_resnet.base.randomness import named_key, splitmix64


def replica_seeds(keys: Tensor, replicas: range) -> Tensor:
    """What the generators are set to before a replica's forward pass: int64 (S, R).

    Args:
        keys: int64 (S,), of the steps; on the CPU.
        replicas: their numbers among all replicas of the run.
    """
    numbers = torch.arange(replicas.start, replicas.stop)
    return splitmix64(named_key(keys, "model").unsqueeze(1), numbers)


def set_generators(seed: int, device: torch.device) -> None:
    """Set the default generators of the CPU and of `device`."""
    for generator in _generators(device):
        generator.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """While open, the default generators start at `seed`; then they are as they were."""
    device = device or torch.device("cpu")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        set_generators(seed, device)
        yield


def default_states(device: torch.device) -> list[bytes]:
    """Where the default generators stand, the CPU's first, to compare."""
    return [bytes(generator.get_state().numpy()) for generator in _generators(device)]


def foreign_states() -> dict[str, str]:
    """Where the generators that the training does not set stand, to compare."""
    return {"Python's random": repr(random.getstate()), "numpy.random": repr(np.random.get_state())}


def all_states(device: torch.device) -> dict[str, Any]:
    """Both, by the name for a reader."""
    return {"torch's generator": default_states(device), **foreign_states()}


def _generators(device: torch.device) -> list[torch.Generator]:
    found = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found
