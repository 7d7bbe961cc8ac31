"""How the replicas' gradients, statistics and losses become one mean on every rank."""

from typing import Protocol

import torch
from torch import Tensor

from dist_resnet.distributed import overlap
from dist_resnet.distributed.flat import FlatModel
from dist_resnet.distributed.group import all_reduce_sum, gather_rows, world_size
from dist_resnet.distributed.overlap import OverlappedSum
from dist_resnet.distributed.shared_sum import build_sum


class Reduction(Protocol):
    """Takes what each local replica computed, then leaves the mean over all replicas."""

    remark: str
    """How a large model is summed, for the reader; else empty."""

    @property
    def in_chunks(self) -> bool:
        """Whether it sums during the backward pass, which must leave each gradient in its place."""

    def expect_last(self, exchange: Tensor) -> None:
        """The pass that follows is the step's last one on this rank."""

    def add(self, exchange: Tensor) -> None:
        """One local replica's values, float32 (E,); in the order of the replicas."""

    def finish(self, exchange: Tensor) -> None:
        """Replace `exchange` by the mean over all replicas, and be ready for the next step."""

    def forget(self) -> None:
        """Be ready for the next step without having finished this one."""


class FastReduction:
    """One all-reduce, or for large models one in chunks.

    Sums of three terms and more depend on their order, and training amplifies a rounding error a
    hundred thousand times within 40 steps. In float64 the order matters to one float32 result in
    some 10^8, so that trajectories on other numbers of ranks stay together; two terms are summed in
    float32, where order cannot matter.
    """

    def __init__(self, flat: FlatModel, replicas: int, local: int, overlaps: bool) -> None:
        self.replicas, self.remark = replicas, ""
        size, device = flat.exchange.numel(), flat.exchange.device
        dtype = torch.float64 if replicas > 2 else torch.float32
        needed = replicas > 2 or local > 1
        self._total = torch.zeros(size, dtype=dtype, device=device) if needed else None
        self._sum = build_sum(size, dtype, device)
        self._chunks: OverlappedSum | None = None
        if world_size() == 1 or flat.exchange.nbytes < overlap.LARGE:
            return
        shown = f"gradients: {flat.exchange.nbytes / 1e6:.0f} MB a step, summed"
        if overlaps and self._sum is all_reduce_sum:
            self._chunks = OverlappedSum(flat)
            self.remark = f"{shown} in {len(self._chunks)} chunks during the backward pass"
        else:
            way = "through shared memory" if self._sum is not all_reduce_sum else "in one piece"
            self.remark = f"{shown} {way} after the backward pass"

    @property
    def in_chunks(self) -> bool:
        return self._chunks is not None

    def expect_last(self, exchange: Tensor) -> None:
        total = self._total

        def ready(part: slice) -> Tensor:
            return exchange[part] if total is None else total[part].add_(exchange[part])

        if self._chunks is not None:
            self._chunks.expect(ready)

    def add(self, exchange: Tensor) -> None:
        if self._chunks is not None and self._chunks.expecting:
            self._chunks.finish(exchange.numel())
        elif self._total is not None:
            self._total += exchange

    def finish(self, exchange: Tensor) -> None:
        total = exchange if self._total is None else self._total
        if self._chunks is None:
            self._sum(total)
        if self.replicas > 1:
            total.div_(self.replicas)
        if self._total is not None:
            exchange.copy_(self._total)
            self._total.zero_()

    def forget(self) -> None:
        if self._total is not None:
            self._total.zero_()


class ExactReduction:
    """Gathers every replica's values and sums them in replica order: the same bits on any ranks."""

    remark, in_chunks = "", False

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self._rows: list[Tensor] = []

    def expect_last(self, exchange: Tensor) -> None:
        pass

    def add(self, exchange: Tensor) -> None:
        self._rows.append(exchange.clone())

    def finish(self, exchange: Tensor) -> None:
        torch.sum(gather_rows(torch.stack(self._rows)), dim=0, out=exchange)
        if self.replicas > 1:
            exchange.div_(self.replicas)
        self._rows.clear()

    def forget(self) -> None:
        self._rows.clear()


def build_reduction(
    kind: str, flat: FlatModel, replicas: int, local: int, overlaps: bool
) -> Reduction:
    """The reduction that `parallel.reduction` names.

    Args:
        local: replicas on this rank.
        overlaps: whether the backward pass may leave each gradient in its place as it comes, and be
            accompanied by exchanges.
    """
    if kind == "exact":
        return ExactReduction(replicas)
    return FastReduction(flat, replicas, local, overlaps)
