"""How long an all-reduce and a step take on more replicas than there are here.

T(N) = t1 + T_AR(N) + sigma sqrt(2 ln N): a replica's own step, one all-reduce of the flat buffer
that nothing hides (at this size its latency is all there is), and the wait for the slowest of N
replicas, whose steps vary by sigma (the expected maximum of N normal deviates, for large N).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dist_resnet.bench.gate import Finished, Gate
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import World

# NCCL's own model of a tree all-reduce: base + 2 ((local - 1) intra + log2(nodes) inter), us, and
# 14 us for 1.09 MB at its bandwidth.
# Constants for LL128 from NVIDIA/nccl issue 1334, formula from its tuning.cc.
_BASE, _INTRA, _INTER, _BANDWIDTH = 14.0, 1.25, 8.5, 14.0
# Global batches that ResNet-20's recipe can use: test error with tuned rates is 7.3 to 7.7% up to
# 512, 8.1% at 1,024, 8.7% at 2,048, 10.2% at 4,096, 12.4% at 8,192 (README of
# hysts/pytorch_image_classification, 200 epochs).
BATCH_EDGE, BATCH_LIMIT = 1024, 2048
BYTES = 1_090_000
"""What the sources of `NETWORKS` sum, ResNet-20's gradients: 1 MiB, or the model's 14 us."""


@dataclass(frozen=True)
class Network:
    """Microseconds of one all-reduce of BYTES, by the number of replicas."""

    name: str
    source: str
    measured: Mapping[int, float] = field(default_factory=dict)
    """Where somebody measured it."""
    per_node: int = 8
    across_nodes: float = 0.0
    """What this kind of network adds to NCCL's model once there is more than one node."""
    doubling: float | None = None
    """In place of NCCL's model: what each doubling of the replicas costs."""

    def all_reduce(self, replicas: int) -> float:
        """Measured, or from the model; 0 for one replica."""
        if replicas == 1:
            return 0.0
        if replicas in self.measured:
            return self.measured[replicas]
        if self.doubling is not None:
            return self.doubling * math.log2(replicas)
        local = min(replicas, self.per_node)
        nodes = replicas / local
        latency = _BASE + 2 * ((local - 1) * _INTRA + math.log2(nodes) * _INTER)
        return latency + _BANDWIDTH + (self.across_nodes if nodes > 1 else 0.0)


NETWORKS = (
    Network(
        "8 GPUs a node, NVSwitch; InfiniBand NDR",
        "4 and 8: NCCL on H100 with NVSwitch, vLLM PR 42324 and 24532; beyond: NCCL's tree model"
        " (nccl issue 1334, tuning.cc), 46 to 48 us measured at 16 for small messages (issue 1244)",
        {4: 23.0, 8: 25.0},
    ),
    Network(
        "8 GPUs a node, NVSwitch; TCPX",
        "as above within a node; 203 us at 16 from nccl-tests on GCP a3-mega, the 141 us that this"
        " is above the model kept for more nodes",
        {4: 23.0, 8: 25.0, 16: 203.0},
        across_nodes=140.5,
    ),
)


def as_measured(microseconds: float, collective: float) -> Network:
    """The network between this machine's ranks, extrapolated.

    Args:
        microseconds: of two ranks' all-reduce as in a step.
        collective: of the same by a collective; on CPUs a step has a way of its own, which leads
            to no other machine.
    """
    return Network(
        "as between two ranks here",
        "2: measured as in a step; beyond, where there are other machines: every doubling is taken"
        f" to cost what the collective takes here, {collective:,.0f} us, as in a tree",
        {2: microseconds},
        doubling=collective,
    )


@dataclass(frozen=True)
class Prediction:
    """Of N replicas."""

    replicas: int
    step_us: float
    efficiency: float
    """Images per second, over N times those of one replica."""
    images_per_second: float
    global_batch: int

    @property
    def warning(self) -> str:
        """What the recipe makes of this global batch; empty: nothing to say."""
        if self.global_batch > BATCH_LIMIT:
            return f"no recipe: global batch {self.global_batch:,} > {BATCH_LIMIT:,}"
        if self.global_batch >= BATCH_EDGE:
            return f"costs accuracy: global batch {self.global_batch:,}"
        return ""


def predict(
    replicas: int, step_us: float, sigma_us: float, all_reduce_us: float, batch: int
) -> Prediction:
    """By the formula above.

    Args:
        step_us: t1, of one replica alone.
        sigma_us: standard deviation of t1 from step to step.
        batch: images in one replica's step.
    """
    total = step_us + all_reduce_us + sigma_us * math.sqrt(2 * math.log(replicas))
    return Prediction(
        replicas, total, step_us / total, 1e6 * replicas * batch / total, replicas * batch
    )


def all_reduce_turns(
    config: Config, world: World, gate: Gate, size: int, count: int, collective: bool
) -> None:
    """Sum `size` float32 values over the ranks, `count` times a turn.

    The facts of a turn are the microseconds of each.

    Args:
        collective: whether by the process group's, or as a step does.

    Raises:
        Finished: the gate has closed.
    """
    import torch

    from dist_resnet.distributed.group import all_reduce_sum
    from dist_resnet.distributed.shared_sum import build_sum

    buffer = torch.zeros(size, device=world.device)
    if collective:
        replace_by_sum: Callable[[torch.Tensor], None] = all_reduce_sum
    else:
        replace_by_sum = build_sum(size, buffer.dtype, world.device)
    microseconds: list[float] = []
    while gate(microseconds=microseconds):
        microseconds = []
        for _ in range(count):
            start = time.perf_counter()
            replace_by_sum(buffer)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            microseconds.append(1e6 * (time.perf_counter() - start))
    raise Finished
