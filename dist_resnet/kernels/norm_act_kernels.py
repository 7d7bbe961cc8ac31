"""What `norm_act` launches: BatchNorm, addition and ReLU, in two kernels a direction."""

import triton
import triton.language as tl


@triton.jit
def moments(
    x, parts, rows, span, programs,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared deviations from it, of one program's rows: (2, C) of `parts`.

    Deviations are taken from the program's first row: squares of the values themselves would cancel
    where a mean is large beside its deviation.
    """
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    first, last = program * span, tl.minimum(program * span + span, rows)
    x += replica.to(tl.int64) * rows * CHANNELS
    origin = tl.load(x + first.to(tl.int64) * CHANNELS + channel, mask=inside, other=0.0)
    origin = origin.to(tl.float32)
    sums = tl.zeros((BLOCK, PADDED), tl.float32)
    squares = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, values - origin[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, 0)
    parts += (replica * programs + program) * 2 * CHANNELS + channel
    tl.store(parts, origin + total / count, mask=inside)
    tl.store(parts + CHANNELS, tl.sum(squares, 0) - total * (total / count), mask=inside)


@triton.jit
def _combined(
    parts, rows, span, programs, channel, inside,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of one replica from the parts of its rows (Chan et al. 1979)."""
    program = tl.arange(0, PARTS)
    mask = (program < programs)[:, None] & inside[None, :]
    at = program[:, None] * 2 * CHANNELS + channel[None, :]
    means = tl.load(parts + at, mask=mask, other=0.0)
    squares = tl.load(parts + at + CHANNELS, mask=mask, other=0.0)
    count = tl.minimum(tl.maximum(rows - program * span, 0), span).to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / rows
    apart = tl.where(mask, means - mean[None, :], 0.0)
    return mean, (tl.sum(squares, 0) + tl.sum(apart * apart * count, 0)) / rows


@triton.jit
def normalise(
    x, shortcut, y, parts, weight, bias, running_mean, running_var, batch, moved,
    momentum, eps, rows, span, programs, part_span, part_count,
    RELU: tl.constexpr, ADD: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """The forward pass's second half; each replica's first program moves the running statistics."""
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own = parts + replica * part_count * 2 * CHANNELS
    mean, variance = _combined(own, rows, part_span, part_count, channel, inside, CHANNELS, PARTS)
    inverse = tl.rsqrt(variance + eps)
    if program == 0:
        tl.store(batch + replica * 2 * CHANNELS + channel, mean, mask=inside)
        tl.store(batch + replica * 2 * CHANNELS + CHANNELS + channel, inverse, mask=inside)
        old_mean = tl.load(running_mean + channel, mask=inside)
        old_variance = tl.load(running_var + channel, mask=inside)
        new_mean = (1 - momentum) * old_mean + momentum * mean
        new_variance = (1 - momentum) * old_variance + momentum * variance * (rows / (rows - 1))
        if ALONE:
            tl.store(running_mean + channel, new_mean, mask=inside)
            tl.store(running_var + channel, new_variance, mask=inside)
        else:  # summed afterwards: the other replicas start from the old ones
            tl.store(moved + replica * 2 * CHANNELS + channel, new_mean, mask=inside)
            tl.store(moved + replica * 2 * CHANNELS + CHANNELS + channel, new_variance, mask=inside)
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    first, last = program * span, tl.minimum(program * span + span, rows)
    base = replica.to(tl.int64) * rows * CHANNELS
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = base + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        values = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        if ADD:
            values += tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + at, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _unrectified(
    dy, x, y, at, mask, mean, inverse, scale, offset, RELU: tl.constexpr, ADD: tl.constexpr
):
    """What reaches BatchNorm's output, and its normalised input, for one tile."""
    gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    normal = (values - mean[None, :]) * inverse[None, :]
    if RELU:
        if ADD:
            result = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        else:
            result = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        gradient = tl.where(result <= 0, 0.0, gradient)
    return gradient, tl.where(mask, normal, 0.0)


@triton.jit
def gradient_sums(
    dy, x, y, weight, bias, batch, parts, rows, span, programs,
    RELU: tl.constexpr, ADD: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a program's gradients, and of their products with the normalised input."""
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    mean = tl.load(batch + replica * 2 * CHANNELS + channel, mask=inside, other=0.0)
    inverse = tl.load(batch + replica * 2 * CHANNELS + CHANNELS + channel, mask=inside, other=0.0)
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    first, last = program * span, tl.minimum(program * span + span, rows)
    base = replica.to(tl.int64) * rows * CHANNELS
    sums = tl.zeros((BLOCK, PADDED), tl.float32)
    products = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = base + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        gradient, normal = _unrectified(dy, x, y, at, mask, mean, inverse, scale, offset, RELU, ADD)
        sums += gradient
        products += gradient * normal
    parts += (replica * programs + program) * 2 * CHANNELS + channel
    tl.store(parts, tl.sum(sums, 0), mask=inside)
    tl.store(parts + CHANNELS, tl.sum(products, 0), mask=inside)


@triton.jit
def gradients(
    dy, x, y, weight, bias, batch, parts, dx, dshortcut, dparameters, rows, span, programs,
    RELU: tl.constexpr, ADD: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The backward pass's second half; each replica's first program writes sums of its own."""
    program, replica = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    part = tl.arange(0, PROGRAMS)
    held = (part < programs)[:, None] & inside[None, :]
    own = (replica * programs + part)[:, None] * 2 * CHANNELS + channel[None, :]
    sums = tl.sum(tl.load(parts + own, mask=held, other=0.0), 0)
    products = tl.sum(tl.load(parts + own + CHANNELS, mask=held, other=0.0), 0)
    if program == 0:
        tl.store(dparameters + replica * 2 * CHANNELS + channel, sums, mask=inside)
        tl.store(dparameters + replica * 2 * CHANNELS + CHANNELS + channel, products, mask=inside)
    mean = tl.load(batch + replica * 2 * CHANNELS + channel, mask=inside, other=0.0)
    inverse = tl.load(batch + replica * 2 * CHANNELS + CHANNELS + channel, mask=inside, other=0.0)
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    first, last = program * span, tl.minimum(program * span + span, rows)
    base = replica.to(tl.int64) * rows * CHANNELS
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & inside[None, :]
        at = base + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        gradient, normal = _unrectified(dy, x, y, at, mask, mean, inverse, scale, offset, RELU, ADD)
        result = gradient - (sums / rows)[None, :] - normal * (products / rows)[None, :]
        tl.store(dx + at, (result * scale[None, :]).to(dx.dtype.element_ty), mask=mask)
        if ADD:
            tl.store(dshortcut + at, gradient.to(dshortcut.dtype.element_ty), mask=mask)


@triton.jit
def sum_rows(each, first, second, replicas, channels, REPLICAS: tl.constexpr, BLOCK: tl.constexpr):
    """Add both rows of every replica; the second index of a program is the row."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    replica = tl.arange(0, REPLICAS)
    mask = (replica < replicas)[:, None] & (channel < channels)[None, :]
    at = (replica * 2 + tl.program_id(1))[:, None] * channels + channel[None, :]
    total = tl.sum(tl.load(each + at, mask=mask, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(first + channel, total, mask=channel < channels)
    else:
        tl.store(second + channel, total, mask=channel < channels)
