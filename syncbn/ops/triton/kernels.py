"""The four phases as Triton kernels: see `reference` for equations, `tiles` for how the work is cut.

A program has a block of channels, and of their values every ``splits``-th tile, ``(rows, block, width)``; its ids are
``(block, split)``. Sums over tiles are float32, forward of values minus the mean of the program's first tile, exact
however large the mean; per channel all is float64. Programs that share a channel store their sums, and the last adds
them in one order: equal bits in every run. Python floats arrive as float32, so eps and momentum come as two numbers.
"""

import torch
import triton
import triton.language as tl

_IS_AMD = tl.constexpr(torch.version.hip is not None)
_NUMBERS = ("outer", "channels", "inner", "splits", "eps", "eps_rest", "momentum", "momentum_rest")
_PER_CHANNEL = (
    "packed", "summed", "statistics", "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    "momentum_tensor", "grad_weight", "grad_bias", "partials", "counters",
)  # fmt: skip
_jit = triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_PER_CHANNEL)  # not compiled for each


@triton.jit
def begin(outer, channels, inner, rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr, vector: tl.constexpr):
    """Return sizes, of which `vector` is known to divide what is contiguous, and this program's channels."""
    channels = channels * vector if width == 1 else channels
    inner = 1 if width == 1 else inner * vector
    c = tl.program_id(0) * block + tl.arange(0, block)
    return channels, inner, ((outer - 1) // rows + 1) * ((inner - 1) // width + 1), c, c < channels  # no overflow


@triton.jit
def locate(tile, c, outer, channels, inner, rows: tl.constexpr, width: tl.constexpr):
    """Return offsets and mask, ``(rows, block, width)``, of a tile, and how many values per channel it has."""
    zero, across = tl.zeros((), tl.int64), (inner - 1) // width + 1  # offsets need 64 bits
    first_row, first = (tile // across + zero) * rows, (tile % across + zero) * width
    row, s = (first_row + tl.arange(0, rows))[:, None, None], (first + tl.arange(0, width))[None, None, :]
    mask = (row < outer) & (c < channels)[None, :, None] & (s < inner)
    count = (tl.maximum(tl.minimum(outer - first_row, rows), 0) * tl.minimum(inner - first, width)).to(tl.int32)
    return (row * channels + c[None, :, None]) * inner + s, mask, count


@triton.jit
def read(values, offsets, mask, sum_type: tl.constexpr):
    return tl.load(values + offsets, mask=mask, other=0.0).to(sum_type)


@triton.jit
def read_centred(values, offsets, mask, mean, sum_type: tl.constexpr):
    """Read, and subtract a float64 mean per channel: rounded to float32, and for float32 values what that left."""
    high = mean.to(sum_type)
    xmu = read(values, offsets, mask, sum_type) - high[None, :, None]
    if values.dtype.element_ty == tl.float32:
        xmu -= (mean - high.to(tl.float64)).to(sum_type)[None, :, None]
    return xmu


@triton.jit
def add_up(first, second, partials, counters, c, channels, splits, block: tl.constexpr):
    """Add two float64 sums per channel over the programs of a block; tell whether this one has the result."""
    parts: tl.constexpr = 256 if block < 8 else 2048 // block
    split, counter = tl.program_id(1), counters + tl.program_id(0)
    is_last_program = splits == 1
    if splits > 1:
        mine = partials + split * 2 * channels + c
        tl.store(mine, first, mask=c < channels)
        tl.store(mine + channels, second, mask=c < channels)
        if _IS_AMD:  # whose barrier does not wait for stores, as this does
            tl.atomic_xchg(mine + channels, second, mask=c < channels, sem="acq_rel", scope="gpu")
        tl.debug_barrier()  # all threads have stored before one of them counts
        is_last_program = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
        if is_last_program:
            tl.store(counter, 0)  # for the next launch
            first, second = tl.zeros((block,), tl.float64), tl.zeros((block,), tl.float64)
            for start in range(0, splits, parts):
                part = (start + tl.arange(0, parts))[:, None]
                theirs, mask = partials + part * 2 * channels + c[None, :], (part < splits) & (c < channels)[None, :]
                first += tl.sum(tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
                second += tl.sum(tl.load(theirs + channels, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    return first, second, is_last_program


@_jit
def forward_reduce(
    rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr, vector: tl.constexpr, sum_type: tl.constexpr,
    outer, channels, inner, splits, partials, counters, x, packed, num_batches_tracked,
):  # fmt: skip
    """Write ``packed = [sum, sqsum, count]``; count the batch."""
    channels, inner, num_tiles, c, exists = begin(outer, channels, inner, rows, block, width, vector)
    offsets, mask, count = locate(tl.program_id(1), c, outer, channels, inner, rows, width)
    values = read(x, offsets, mask, sum_type)
    shift = tl.sum(tl.sum(values, 2), 0) / tl.maximum(count, 1).to(sum_type)
    values = tl.where(mask, values - shift[None, :, None], 0.0)
    sums, squares, num_values = values, values * values, count
    for tile in range(tl.program_id(1) + splits, num_tiles, splits):
        offsets, mask, count = locate(tile, c, outer, channels, inner, rows, width)
        values = tl.where(mask, read(x, offsets, mask, sum_type) - shift[None, :, None], 0.0)
        sums += values
        squares += values * values
        num_values += count
    rest, shift = tl.sum(tl.sum(sums, 2), 0).to(tl.float64), shift.to(tl.float64)
    first = rest + shift * num_values.to(tl.float64)
    second = tl.sum(tl.sum(squares, 2), 0).to(tl.float64) + shift * (rest + first)
    first, second, is_last_program = add_up(first, second, partials, counters, c, channels, splits, block)
    if is_last_program:
        tl.store(packed + c, first, mask=exists)
        tl.store(packed + channels + c, second, mask=exists)
        if tl.program_id(0) == 0:
            tl.store(packed + 2 * channels, outer.to(tl.float64) * inner)
            if num_batches_tracked is not None:
                tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)


@_jit
def forward_apply(
    rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr, vector: tl.constexpr, sum_type: tl.constexpr,
    outer, channels, inner, splits, x, y, summed, statistics, weight, bias, running_mean, running_var,
    num_batches_tracked, momentum_tensor, momentum, momentum_rest, eps, eps_rest,
):  # fmt: skip
    """Write y and ``statistics = [mean, invstd, count]``; move the running statistics, where there are any."""
    channels, inner, num_tiles, c, exists = begin(outer, channels, inner, rows, block, width, vector)
    split, zeros = tl.program_id(1), tl.zeros((block,), tl.float64)
    count, total = tl.load(summed + 2 * channels), read(summed, c, exists, tl.float64)
    mean = total / tl.maximum(count, 1.0)
    sqdev = read(summed, channels + c, exists, tl.float64) - total * mean
    sqdev = tl.where(sqdev < 0, 0.0, sqdev)  # which keeps NaN
    invstd = 1.0 / tl.sqrt(sqdev / tl.maximum(count, 1.0) + eps + eps_rest)
    if split == 0:
        tl.store(statistics + c, mean, mask=exists)
        tl.store(statistics + channels + c, invstd, mask=exists)
        if tl.program_id(0) == 0:
            tl.store(statistics + 2 * channels, count)
        if running_mean is not None:
            share = zeros + momentum + momentum_rest  # unless it is in a tensor, or the average of all batches
            if momentum_tensor is not None:
                share = zeros + tl.load(momentum_tensor)
            elif num_batches_tracked is not None:
                share = 1.0 / (zeros + tl.load(num_batches_tracked))
            moves, old = zeros + count > 0, read(running_mean, c, exists, tl.float64)
            new = tl.where(moves, old + (mean - old) * share, old).to(sum_type)
            tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=exists)
            old = read(running_var, c, exists, tl.float64)
            new = tl.where(moves, old + (sqdev / (count - 1) - old) * share, old).to(sum_type)
            tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=exists)
    if weight is not None:
        invstd *= read(weight, c, exists, tl.float64)
    slope, constant = invstd.to(sum_type), zeros.to(sum_type)
    if bias is not None:
        constant = read(bias, c, exists, sum_type)
    for tile in range(split, num_tiles, splits):
        offsets, mask, _ = locate(tile, c, outer, channels, inner, rows, width)
        values = read_centred(x, offsets, mask, mean, sum_type) * slope[None, :, None] + constant[None, :, None]
        tl.store(y + offsets, values.to(y.dtype.element_ty), mask=mask)


@_jit
def backward_reduce(
    rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr, vector: tl.constexpr, sum_type: tl.constexpr,
    outer, channels, inner, splits, partials, counters, x, dy, statistics, packed, grad_weight, grad_bias,
):  # fmt: skip
    """Write ``packed = [sum_dy, sum_dy_xhat]`` and the gradients of weight and bias."""
    channels, inner, num_tiles, c, exists = begin(outer, channels, inner, rows, block, width, vector)
    mean = read(statistics, c, exists, tl.float64)
    sum_dy, sum_dy_xmu = tl.zeros((rows, block, width), sum_type), tl.zeros((rows, block, width), sum_type)
    for tile in range(tl.program_id(1), num_tiles, splits):
        offsets, mask, _ = locate(tile, c, outer, channels, inner, rows, width)
        gradient = read(dy, offsets, mask, sum_type)
        sum_dy += gradient
        sum_dy_xmu += gradient * read_centred(x, offsets, mask, mean, sum_type)
    first, second = tl.sum(tl.sum(sum_dy, 2), 0).to(tl.float64), tl.sum(tl.sum(sum_dy_xmu, 2), 0).to(tl.float64)
    second *= read(statistics, channels + c, exists, tl.float64)
    first, second, is_last_program = add_up(first, second, partials, counters, c, channels, splits, block)
    if is_last_program:
        tl.store(packed + c, first, mask=exists)
        tl.store(packed + channels + c, second, mask=exists)
        if grad_weight is not None:
            tl.store(grad_weight + c, second.to(sum_type).to(grad_weight.dtype.element_ty), mask=exists)
        if grad_bias is not None:
            tl.store(grad_bias + c, first.to(sum_type).to(grad_bias.dtype.element_ty), mask=exists)


@_jit
def backward_apply(
    rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr, vector: tl.constexpr, sum_type: tl.constexpr,
    outer, channels, inner, splits, x, dy, dx, statistics, weight, summed,
):  # fmt: skip
    """Write dx."""
    channels, inner, num_tiles, c, exists = begin(outer, channels, inner, rows, block, width, vector)
    count, mean = tl.maximum(tl.load(statistics + 2 * channels), 1.0), read(statistics, c, exists, tl.float64)
    invstd = read(statistics, channels + c, exists, tl.float64)
    mean_dy = (read(summed, c, exists, tl.float64) / count).to(sum_type)
    tilt = (read(summed, channels + c, exists, tl.float64) / count * invstd).to(sum_type)
    if weight is not None:
        invstd *= read(weight, c, exists, tl.float64)
    for tile in range(tl.program_id(1), num_tiles, splits):
        offsets, mask, _ = locate(tile, c, outer, channels, inner, rows, width)
        gradient = read(dy, offsets, mask, sum_type)
        xmu = read_centred(x, offsets, mask, mean, sum_type)
        values = (gradient - mean_dy[None, :, None] - xmu * tilt[None, :, None]) * invstd.to(sum_type)[None, :, None]
        tl.store(dx + offsets, values.to(dx.dtype.element_ty), mask=mask)
