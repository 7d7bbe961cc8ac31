"""What `conv` launches: a tile of pixels times the filters."""

import triton
import triton.language as tl


@triton.jit
def _taps(
    line, column, factor, tap, channel, filter_,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Where the factors of a tile's results lie: line, column, whether there, place in `weight`."""
    if TRANSPOSED:
        down = line[:, None] + (SIZE // 2 - tap // SIZE)[None, :]
        across = column[:, None] + (SIZE // 2 - tap % SIZE)[None, :]
        inside = (down >= 0) & (across >= 0)
        if STRIDE > 1:
            inside = inside & (down % STRIDE == 0) & (across % STRIDE == 0)
            down, across = down // STRIDE, across // STRIDE
        taken = (channel * (SIZE * SIZE) + tap)[:, None] * FILTERS + filter_[None, :]
    else:
        down = line[:, None] * STRIDE + (tap // SIZE - SIZE // 2)[None, :]
        across = column[:, None] * STRIDE + (tap % SIZE - SIZE // 2)[None, :]
        inside = (down >= 0) & (across >= 0)
        taken = filter_[None, :] * (SIZE * SIZE * CHANNELS) + factor[:, None]
    return down, across, inside, taken


@triton.jit
def convolve(
    x, weight, z, origin, parts, rows, span, programs, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = conv(x), and mean and squared deviations of each program's rows of z."""
    _convolution(
        x, weight, z, origin, parts, None, tl.program_id(0), tl.program_id(1), tl.program_id(2),
        rows, span, programs, height, width, out_height, out_width, CHANNELS, FILTERS, SIZE, STRIDE,
        False, True, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def conv_gradients(
    dz, weight, dx, added, x, parts, height, width, out_height, out_width,
    dx_rows, dx_span, dx_programs, dx_columns, dw_rows, dw_span, dw_chunks,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, PADDED_FILTERS: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, INPUT: tl.constexpr, WEIGHT: tl.constexpr,
    ADD: tl.constexpr, DX_M: tl.constexpr, DX_N: tl.constexpr, DX_K: tl.constexpr,
    DW_M: tl.constexpr, DW_K: tl.constexpr, DW_STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of x, where INPUT, by the first programs, as the layer below waits for it; parts
    of the weight's, where WEIGHT, by the others."""
    program = tl.program_id(0)
    first = dx_programs * dx_columns if INPUT else 0  # of the weight's
    if INPUT:  # noqa: SIM102 - told while compiling, which `and` is not
        if program < first:
            _convolution(
                dz, weight, dx, None, None, added, program % dx_programs, program // dx_programs,
                0, dx_rows, dx_span, dx_programs, out_height, out_width, height, width, FILTERS,
                CHANNELS, SIZE, STRIDE, True, False, ADD, DX_M, DX_N, DX_K,
            )  # fmt: skip
    if WEIGHT:  # noqa: SIM102
        if program >= first:
            own = program - first
            _weight_gradient(
                dz, x, parts, own // dw_chunks, own % dw_chunks, dw_rows, dw_span, height, width,
                out_height, out_width, CHANNELS, FILTERS, PADDED_FILTERS, SIZE, STRIDE, DW_M, DW_K,
                DW_STAGES,
            )  # fmt: skip


@triton.jit
def _convolution(
    x, weight, z, origin, parts, added, program, column_block, replica, rows, span, programs,
    height, width, out_height, out_width,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, MOMENTS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = conv(x), or, TRANSPOSED, the gradient of x from that of z, with the names exchanged.

    Factors of a result are numbered tap by tap, channel by channel, and taken BLOCK_K at a time.
    """
    filter_ = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = filter_ < FILTERS
    first, last = program * span, tl.minimum(program * span + span, rows)
    if MOMENTS:
        shift = tl.load(origin + filter_, mask=wanted, other=0.0)
        sums, squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        there = row < last
        place = replica * rows + row
        column, line = place % out_width, place // out_width % out_height
        image = place // (out_width * out_height)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for chunk in range(0, SIZE * SIZE * CHANNELS, BLOCK_K):
            factor = chunk + tl.arange(0, BLOCK_K)
            known = factor < SIZE * SIZE * CHANNELS
            tap, channel = factor // CHANNELS, factor % CHANNELS
            down, across, inside, taken = _taps(
                line, column, factor, tap, channel, filter_,
                CHANNELS, FILTERS, SIZE, STRIDE, TRANSPOSED,
            )  # fmt: skip
            inside = inside & (down < height) & (across < width)
            inside = inside & there[:, None] & known[None, :]
            at = ((image[:, None] * height + down) * width + across) * CHANNELS + channel[None, :]
            pixels = tl.load(x + at, mask=inside, other=0.0)
            mask = known[:, None] & wanted[None, :]
            factors = tl.load(weight + taken, mask=mask, other=0.0)
            total = tl.dot(pixels, factors, total, input_precision="ieee")
        mask = there[:, None] & wanted[None, :]
        at = place[:, None] * FILTERS + filter_[None, :]
        if ADD:
            total += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        values = total.to(z.dtype.element_ty)
        tl.store(z + at, values, mask=mask)
        if MOMENTS:
            deviation = tl.where(mask, values.to(tl.float32) - shift[None, :], 0.0)
            sums += tl.sum(deviation, 0)
            squares += tl.sum(deviation * deviation, 0)
    if MOMENTS:
        mean = sums / (last - first).to(tl.float32)
        parts += (replica * programs + program) * 2 * FILTERS + filter_
        tl.store(parts, shift + mean, mask=wanted)
        tl.store(parts + FILTERS, squares - sums * mean, mask=wanted)


@triton.jit
def _weight_gradient(
    dz, x, parts, program, chunk, rows, span, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, PADDED_FILTERS: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_K factors of every filter over one program's pixels."""
    filter_ = tl.arange(0, PADDED_FILTERS)
    factor = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    known, wanted = factor < SIZE * SIZE * CHANNELS, filter_ < FILTERS
    tap, channel = factor // CHANNELS, factor % CHANNELS
    first, last = program * span, tl.minimum(program * span + span, rows)
    total = tl.zeros((PADDED_FILTERS, BLOCK_K), tl.float32)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_M)
        there = place < last
        column, line = place % out_width, place // out_width % out_height
        image = place // (out_width * out_height)
        down = line[:, None] * STRIDE + (tap // SIZE - SIZE // 2)[None, :]
        across = column[:, None] * STRIDE + (tap % SIZE - SIZE // 2)[None, :]
        inside = (down >= 0) & (across >= 0) & (down < height) & (across < width)
        inside = inside & there[:, None] & known[None, :]
        at = ((image[:, None] * height + down) * width + across) * CHANNELS + channel[None, :]
        pixels = tl.load(x + at, mask=inside, other=0.0)
        slopes = tl.load(
            dz + place[:, None] * FILTERS + filter_[None, :],
            mask=there[:, None] & wanted[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(tl.trans(slopes), pixels, total, input_precision="ieee")
    cell = filter_[:, None] * (SIZE * SIZE * CHANNELS) + factor[None, :]
    parts += program * FILTERS * SIZE * SIZE * CHANNELS
    tl.store(parts + cell, total, mask=wanted[:, None] & known[None, :])


@triton.jit
def add_up(parts, total, programs, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the programs' parts of each value, in a fixed order."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.arange(0, PARTS)
    mask = (program < programs)[:, None] & (cell < count)[None, :]
    values = tl.load(parts + program[:, None] * count + cell[None, :], mask=mask, other=0.0)
    tl.store(total + cell, tl.sum(values, 0).to(total.dtype.element_ty), mask=cell < count)
