"""SGD, moving average, gradient norm and totals on a GPU: two launches in place of twelve.

torch's fused SGD gives a block 65,536 values: five blocks for this model, 10 us a call.

Shapes: P parameters, S BatchNorm statistics, G programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 1024  # of a program


def update(
    values: Tensor,
    exchange: Tensor,
    momentum: Tensor,
    ema: Tensor | None,
    num_decayed: int,
    lr: float | Tensor,
    ema_weight: float | Tensor,
    momentum_factor: float,
    weight_decay: float,
    nesterov: bool,
) -> Tensor:
    """One step of SGD, and of the moving average of parameters and statistics.

    Args:
        values, momentum: float32 (P,), changed in place.
        exchange: float32, at least (P + S,): gradients, then statistics.
        ema: float32 (P + S,), changed in place.
        num_decayed: parameters, the first ones, under weight decay.
        lr, ema_weight: numbers, or 0-dimensional float32 tensors.

    Returns:
        float32 (G,): sums of the gradients' squares, for `account`.
    """
    count = values.numel()
    total = count if ema is None else ema.numel()
    programs = triton.cdiv(total, _VALUES)
    squares = torch.empty(programs, device=values.device)
    _update[(programs,)](
        values, exchange, momentum, ema, squares, lr, ema_weight, count, total, num_decayed,
        momentum_factor, weight_decay, NESTEROV=nesterov, AVERAGE=ema is not None,
        LR_THERE=isinstance(lr, Tensor), WEIGHT_THERE=isinstance(ema_weight, Tensor),
        BLOCK=_VALUES,
    )  # fmt: skip
    return squares


def account(
    squares: Tensor, row: Tensor, sums: Tensor, finite: Tensor, finite_steps: Tensor
) -> None:
    """Put the gradient's norm into `row` and count the step, as `step.totals.Totals.add`."""
    _account[(1,)](
        squares, row, sums, finite, finite_steps, squares.numel(), WIDTH=row.numel(),
        COLUMNS=triton.next_power_of_2(row.numel()), BLOCK=triton.next_power_of_2(squares.numel()),
    )  # fmt: skip


@triton.jit
def _update(
    values, exchange, momentum, ema, squares, lr, ema_weight, count, total, num_decayed,
    momentum_factor, weight_decay, NESTEROV: tl.constexpr, AVERAGE: tl.constexpr,
    LR_THERE: tl.constexpr, WEIGHT_THERE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program's values: gradient squared, momentum, parameter, average."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    rate = tl.load(lr) if LR_THERE else lr
    gradient = tl.load(exchange + at, mask=there, other=0.0)
    tl.store(squares + tl.program_id(0), tl.sum(gradient * gradient, 0))
    value = tl.load(values + at, mask=there, other=0.0)
    slope = gradient + value * tl.where(at < num_decayed, weight_decay, 0.0)
    buffer = tl.load(momentum + at, mask=there, other=0.0) * momentum_factor + slope
    tl.store(momentum + at, buffer, mask=there)
    if NESTEROV:
        value -= rate * (slope + momentum_factor * buffer)
    else:
        value -= rate * buffer
    tl.store(values + at, value, mask=there)
    if AVERAGE:
        weight = tl.load(ema_weight) if WEIGHT_THERE else ema_weight
        new = tl.where(there, value, tl.load(exchange + at, mask=at < total, other=0.0))
        old = tl.load(ema + at, mask=at < total, other=0.0)
        tl.store(ema + at, old + weight * (new - old), mask=at < total)


@triton.jit
def _account(
    squares, row, sums, finite, finite_steps, count, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradient's norm, both windows of the totals, the count of good steps."""
    place = tl.arange(0, BLOCK)
    parts = tl.load(squares + place, mask=place < count, other=0.0)
    norm = tl.sqrt(tl.sum(parts, 0))
    loss = tl.load(row)
    column = tl.arange(0, COLUMNS)
    added = tl.load(row + column, mask=column < WIDTH, other=0.0)
    added = tl.where(column == WIDTH - 2, norm, added).to(tl.float64)
    tl.store(row + WIDTH - 2, norm)
    for window in tl.static_range(2):
        at = sums + window * WIDTH + column
        tl.store(at, tl.load(at, mask=column < WIDTH, other=0.0) + added, mask=column < WIDTH)
    good = tl.load(finite) * (loss + norm < float("inf")).to(tl.float32)
    tl.store(finite, good)
    tl.store(finite_steps, tl.load(finite_steps) + good.to(tl.int64))
