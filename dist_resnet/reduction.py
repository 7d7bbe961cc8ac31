"""How the replicas' gradients, statistics and losses become one mean on every rank."""

from typing import Protocol

import torch
from torch import Tensor

from dist_resnet.distributed import gather_rows
from dist_resnet.summing import build_sum


class Reduction(Protocol):
    """Takes what each local replica computed, then leaves the mean over all replicas."""

    def add(self, exchange: Tensor) -> None:
        """One local replica's values, float32 (E,); in the order of the replicas."""

    def finish(self, exchange: Tensor) -> None:
        """Replace `exchange` by the mean over all replicas, and be ready for the next step."""


class FastReduction:
    """One all-reduce.

    Sums of three terms and more depend on their order, and training amplifies a rounding error a
    hundred thousand times within 40 steps. In float64 the order matters to one float32 result in
    some 10^8, so that trajectories on other numbers of ranks stay together; two terms are summed in
    float32, where order cannot matter.
    """

    def __init__(self, size: int, replicas: int, local: int, device: torch.device) -> None:
        self.replicas = replicas
        dtype = torch.float64 if replicas > 2 else torch.float32
        needed = replicas > 2 or local > 1
        self._total = torch.zeros(size, dtype=dtype, device=device) if needed else None
        self._sum = build_sum(size, dtype, device)

    def add(self, exchange: Tensor) -> None:
        if self._total is not None:
            self._total += exchange

    def finish(self, exchange: Tensor) -> None:
        total = exchange if self._total is None else self._total
        self._sum(total)
        if self.replicas > 1:
            total.div_(self.replicas)
        if self._total is not None:
            exchange.copy_(self._total)
            self._total.zero_()


class ExactReduction:
    """Gathers every replica's values and sums them in replica order: the same bits on any ranks."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self._rows: list[Tensor] = []

    def add(self, exchange: Tensor) -> None:
        self._rows.append(exchange.clone())

    def finish(self, exchange: Tensor) -> None:
        torch.sum(gather_rows(torch.stack(self._rows)), dim=0, out=exchange)
        if self.replicas > 1:
            exchange.div_(self.replicas)
        self._rows.clear()


def build_reduction(
    kind: str, size: int, replicas: int, local: int, device: torch.device
) -> Reduction:
    """The reduction that `parallel.reduction` names.

    Args:
        size: number of values exchanged.
        local: replicas on this rank.
    """
    if kind == "exact":
        return ExactReduction(replicas)
    return FastReduction(size, replicas, local, device)
