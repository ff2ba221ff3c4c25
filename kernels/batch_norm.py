"""Triton kernels of ``swa_fast::batch_norm_collect`` and ``swa_fast::batch_norm_merge_``.

Formula: csrc/batch_norm.h, but a group's pivot is the mean of the group before it, and that of a
program's first group, of at most eight blocks, the mean of its first block. Around the mean of k
values the squares of the next k' are those around their own mean and (k + k') / k <= 7 times what
lies between both groups. What lies between neighbours is at most twice the channel's M2, so the
squares are at most 15 times M2 whatever the data.

Layout: [n, c, s], or [n s, c] with channels-last; a program reads blocks of ``ROWS`` samples by
``COLS`` values of one channel, or of ``ROWS`` rows by ``COLS`` channels. Bytes per element: 3
sizeof(x), 12 for fp32: a read for the statistics, a read and a write for the output; bound by
memory bandwidth. Plus 16 bytes for a program and channel of its tile.

The statistics ask for several blocks, 128 bytes a thread, before the first is used: a program that
waited for each block by itself would wait for the memory's latency as often as it has blocks.

Two launches, one without the output. The last program of a tile to finish adds up the sums of all
of them in a fixed order; it knows that it is the last from a ticket, which it resets. Where that
would be many, a tile's programs are divided into groups, each of which is added up by its own last
one first.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swa_fast import _layout as layout

__all__ = ["batch_norm_collect", "batch_norm_merge_"]

NUM_WARPS = 4
BLOCK = 2048  # values of the output that a program has in flight: 16 of a thread
# Of the statistics: eight values of a thread, because each slot of a block has two sums of its own.
SUMMED = 1024
IN_FLIGHT = 128  # bytes of a thread that the statistics have in flight
# Turns of so many blocks in a group: each slot of a block sums up 48 values at most, and ten levels
# of a tree add up the slots, which keeps the bound in csrc/batch_norm.h.
GROUP_TURNS = tl.constexpr(6)
LEAST = 16384  # values of a program, so that what it leaves to the last one pays
# Bytes of a row that a tile of channels fills, for the statistics and for the output: lines that
# several programs write in parts are slow to write.
LINE, OUTPUT_LINE = 128, 512
PROGRAMS = 1024  # fills any GPU; not its own number, for the same bits on all
MAX_SPLITS = 1024
MERGE_BLOCK = 256
POOLED, TORCH = tl.constexpr(layout.POOLED), tl.constexpr(layout.TORCH)


@triton.constexpr_function
def _chunk(width: int) -> int:
    """How many programs' sums of ``width`` channels are loaded at once, 16 values of a thread."""
    return min(2048 // width, 512)


@triton.jit
def _int64(number):
    """Also of an argument that is 1, which Triton compiles as a constant."""
    return number * tl.full([], 1, tl.int64)


@triton.jit
def _over_tile(values, LAST: tl.constexpr):
    """The sums of a block's values that belong to one channel: [COLS], or [1]."""
    if LAST:
        return tl.sum(values, axis=0)
    else:
        return tl.sum(tl.sum(values, axis=1, keep_dims=True), axis=0)


@triton.jit
def _block(step, end, tile, samples, channels, length, LAST: tl.constexpr, ROWS: tl.constexpr,
           COLS: tl.constexpr):  # fmt: skip
    """Offsets of a program's block, which of them to read, and which count: none from step ``end``
    on. Columns past the last channel count, because what becomes of them is never used, and a
    condition for each row is cheaper. ``samples`` counts rows, with channels-last."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    col = tl.arange(0, COLS)[None, :]
    if LAST:
        row += _int64(step) * ROWS
        col += (tile * COLS).to(tl.int32)
        counts = (row < samples) & (step < end)
        return row * channels + col, counts & (col < channels), counts
    else:
        across = tl.cdiv(_int64(length), COLS).to(tl.int32)
        row += (step // across).to(tl.int64) * ROWS
        col = col.to(tl.int64) + (step % across).to(tl.int64) * COLS
        sample = _int64(channels) * length
        mask = (row < samples) & (col < length) & (step < end)
        return row * sample + tile * length + col, mask, mask


@triton.jit
def _values_of(step, samples, length, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many values of one channel a block holds."""
    if LAST:
        return tl.minimum(samples - _int64(step) * ROWS, ROWS)
    else:
        across = tl.cdiv(_int64(length), COLS).to(tl.int32)
        rows = tl.minimum(samples - (step // across).to(tl.int64) * ROWS, ROWS)
        return rows * tl.minimum(length - (step % across).to(tl.int64) * COLS, COLS)


@triton.jit
def _add_to_others(first, second, parts, place, count, ticket, WIDTH: tl.constexpr):
    """Leaves a program's sums with those of others. For the last of ``count`` programs: the sums
    over all of them and True."""
    column = tl.arange(0, WIDTH)
    mine = parts + place * (2 * WIDTH) + column
    tl.store(mine, first, cache_modifier=".cg")
    tl.store(mine + WIDTH, second, cache_modifier=".cg")
    # All threads' stores come before the ticket, which one thread draws.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if last:
        # Added up side by side, and over the threads once: else each turn would wait for its loads,
        # and for all threads.
        CHUNK: tl.constexpr = _chunk(WIDTH)
        firsts = tl.zeros([CHUNK, WIDTH], tl.float64)
        seconds = tl.zeros([CHUNK, WIDTH], tl.float64)
        for start in range(0, count, CHUNK):
            part = start + tl.arange(0, CHUNK).to(tl.int64)[:, None]
            theirs = parts + part * (2 * WIDTH) + column[None, :]
            read = part < count
            firsts += tl.load(theirs, mask=read, other=0.0, cache_modifier=".cg")
            seconds += tl.load(theirs + WIDTH, mask=read, other=0.0, cache_modifier=".cg")
        first = tl.sum(firsts, axis=0)
        second = tl.sum(seconds, axis=0)
        tl.store(ticket, 0)
    return first, second, last


@triton.jit
def _statistics_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    eps: tl.float64,
    batch_ptr,  # float64 [4, c], `batch_stride` elements between rows
    batch_stride: tl.int64,
    tickets_ptr,  # int32 [c], a tile's and its groups' from the number of its first channel on
    partial_ptr,  # float64 [tiles, splits + groups, 2, channels of a tile]
    coefficients_ptr,  # [3, c]: centre, scale, offset
    samples: tl.int64,
    channels,
    length,
    tiles: tl.int64,
    splits: tl.int64,
    groups: tl.int64,  # of a tile's programs
    group_size: tl.int64,
    steps: tl.int32,  # blocks of a channel or tile, of which any GPU holds fewer than 2^31
    steps_per_program: tl.int32,
    values: tl.int64,  # of a channel
    batch_samples: tl.int64,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,
    PIVOTS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    MATH: tl.constexpr = coefficients_ptr.dtype.element_ty
    WIDTH: tl.constexpr = COLS if LAST else 1
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    split = program // tiles
    channel = tile * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels

    # The channels' pivots: their first value, for fp64 the mean of the first ones. Either way exact
    # in the arithmetic type.
    if LAST:
        available = values
        stride = _int64(channels)
        origin = x_ptr + channel
    else:
        available = _int64(length)
        stride = tl.full([], 1, tl.int64)
        origin = x_ptr + channel * length
    pivot = tl.zeros([WIDTH], MATH)
    for place in tl.static_range(PIVOTS):
        valid = inside & (place < available)
        pivot += tl.load(origin + place * stride, mask=valid, other=0.0).to(MATH)
    pivot /= tl.minimum(available, PIVOTS).to(MATH)

    first = tl.zeros([WIDTH], tl.float64)
    second = tl.zeros([WIDTH], tl.float64)
    begin = split.to(tl.int32) * steps_per_program
    end = tl.minimum(begin + steps_per_program, steps)
    # The first group's pivot: the mean of the first block, which is read again with its group.
    offsets, mask, _ = _block(begin, end, tile, samples, channels, length, LAST, ROWS, COLS)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(MATH)
    count = _values_of(begin, samples, length, LAST, ROWS, COLS)
    group_pivot = _over_tile(x, LAST) / count.to(MATH)
    # The first group is one turn, the others are GROUP_TURNS.
    less = (GROUP_TURNS - 1) * UNROLL
    for group in range(begin - less, end, GROUP_TURNS * UNROLL):
        group_end = tl.minimum(group + GROUP_TURNS * UNROLL, end)
        s1 = tl.zeros([ROWS, COLS], MATH)
        s2 = tl.zeros([ROWS, COLS], MATH)
        count = tl.zeros([], tl.int64)
        for turn in range(tl.maximum(group, begin), group_end, UNROLL):
            # All loads of a turn before the first use, which the branch keeps the assembler to.
            blocks = ()
            kept = ()
            present = tl.zeros([], tl.int64)
            for u in tl.static_range(UNROLL):
                offsets, mask, counts = _block(
                    turn + u, group_end, tile, samples, channels, length, LAST, ROWS, COLS
                )
                blocks += (tl.load(x_ptr + offsets, mask=mask, other=0.0),)  # type: ignore[assignment]
                kept += (counts,)  # type: ignore[assignment]
                here = _values_of(turn + u, samples, length, LAST, ROWS, COLS)
                present += tl.where(turn + u < group_end, here, 0)
            count += present
            if present == UNROLL * ROWS * (COLS // WIDTH if LAST else COLS):
                for u in tl.static_range(UNROLL):
                    d = blocks[u].to(MATH) - group_pivot[None, :]
                    s1 += d
                    s2 += d * d
            else:
                for u in tl.static_range(UNROLL):
                    d = tl.where(kept[u], blocks[u].to(MATH) - group_pivot[None, :], 0.0)
                    s1 += d
                    s2 += d * d
        sum1 = _over_tile(s1, LAST)
        q = group_pivot.to(tl.float64) - pivot.to(tl.float64)
        kq = count.to(tl.float64) * q
        first += kq + sum1.to(tl.float64)
        second += _over_tile(s2, LAST).to(tl.float64) + q * (kq + 2.0 * sum1.to(tl.float64))
        group_pivot += sum1 / count.to(MATH)

    last = splits == 1
    if splits > 1:
        parts = partial_ptr + tile * (splits + groups) * (2 * WIDTH)
        ticket = tickets_ptr + tile * WIDTH
        # With one group, its ticket is the tile's.
        start = split // group_size * group_size
        of_group = ticket + tl.where(groups > 1, 1 + split // group_size, 0)
        count = tl.minimum(group_size, splits - start)
        first, second, last = _add_to_others(
            first, second, parts + start * (2 * WIDTH), split - start, count, of_group, WIDTH
        )
        if last & (groups > 1):
            first, second, last = _add_to_others(
                first, second, parts + splits * (2 * WIDTH), start // group_size, groups, ticket,
                WIDTH,
            )  # fmt: skip
    if last:
        m = values.to(tl.float64)
        shift = first / m
        mean = pivot.to(tl.float64) + shift
        m2 = second - first * shift
        m2 = tl.where(m2 < 0.0, 0.0, m2)  # NaN stays
        column_ptr = batch_ptr + channel
        zero = tl.zeros([WIDTH], tl.float64)
        tl.store(column_ptr, zero + m, mask=inside)
        tl.store(column_ptr + batch_stride, zero + batch_samples.to(tl.float64), mask=inside)
        tl.store(column_ptr + 2 * batch_stride, mean, mask=inside)
        tl.store(column_ptr + 3 * batch_stride, m2, mask=inside)
        scale = 1.0 / tl.sqrt(m2 / m + eps)
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float64)
        # The offset makes up for rounding the mean, so a large one costs no digits.
        centre = mean.to(MATH)
        offset = -(mean - centre.to(tl.float64)) * scale
        if HAS_BIAS:
            offset += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float64)
        tl.store(coefficients_ptr + channel, centre, mask=inside)
        tl.store(coefficients_ptr + channels + channel, scale.to(MATH), mask=inside)
        tl.store(coefficients_ptr + 2 * channels + channel, offset.to(MATH), mask=inside)


@triton.jit
def _normalise_kernel(
    x_ptr,
    y_ptr,
    coefficients_ptr,
    relu,
    samples: tl.int64,
    channels,
    length,
    tiles: tl.int64,
    steps: tl.int32,
    steps_per_program: tl.int32,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    MATH: tl.constexpr = coefficients_ptr.dtype.element_ty
    WIDTH: tl.constexpr = COLS if LAST else 1
    # Backwards: what was read last may still be in the second-level cache.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    tile = program % tiles
    channel = tile * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels
    centre = tl.load(coefficients_ptr + channel, mask=inside, other=0.0)[None, :]
    scale = tl.load(coefficients_ptr + channels + channel, mask=inside, other=0.0)[None, :]
    offset = tl.load(coefficients_ptr + 2 * channels + channel, mask=inside, other=0.0)[None, :]
    begin = (program // tiles).to(tl.int32) * steps_per_program
    end = tl.minimum(begin + steps_per_program, steps)
    for step in range(begin, end):
        offsets, mask, _ = _block(step, end, tile, samples, channels, length, LAST, ROWS, COLS)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(MATH)
        d = x - centre
        y = tl.fma(d, tl.zeros_like(d) + scale, tl.zeros_like(d) + offset)
        if relu != 0:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_kernel(accumulators_ptr, batch_ptr, total: tl.int64, estimator, BLOCK: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < total
    column = batch_ptr + channel
    m = tl.load(column, mask=inside, other=0.0)
    used = m > 0.0
    b = tl.load(column + total, mask=used, other=1.0)
    mu = tl.load(column + 2 * total, mask=used, other=0.0)
    m2 = tl.load(column + 3 * total, mask=used, other=0.0)
    variance = m2 / tl.maximum(m - 1.0, 1.0)

    a = accumulators_ptr + channel
    total_m = tl.load(a, mask=used, other=1.0)
    n = tl.load(a + total, mask=used, other=1.0)
    uses = tl.load(a + 2 * total, mask=used, other=0.0) + 1.0
    mean = tl.load(a + 3 * total, mask=used, other=0.0)
    spread = tl.load(a + 4 * total, mask=used, other=0.0)
    delta = mu - mean
    if estimator == POOLED:
        share = m / (total_m + m)
        spread += m2 + delta * delta * total_m * share
    else:
        share = b / (n + b)
        if estimator == TORCH:
            share = 1.0 / uses
        spread += share * (variance - spread)
    tl.store(a, total_m + m, mask=used)
    tl.store(a + total, n + b, mask=used)
    tl.store(a + 2 * total, uses, mask=used)
    tl.store(a + 3 * total, mean + share * delta, mask=used)
    tl.store(a + 4 * total, spread, mask=used)
    for row in tl.static_range(5, 9, 2):
        value = mu if row == 5 else variance
        average = tl.load(a + row * total, mask=used, other=0.0)
        deviations = tl.load(a + (row + 1) * total, mask=used, other=0.0)
        off = value - average
        average += off / uses
        tl.store(a + row * total, average, mask=used)
        tl.store(a + (row + 1) * total, deviations + off * (value - average), mask=used)
    tl.store(column, tl.zeros([BLOCK], tl.float64), mask=used)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Geometry(NamedTuple):
    samples: int
    channels: int
    length: int
    tiles: int
    splits: int
    groups: int
    group_size: int
    steps: int
    steps_per_program: int
    last: bool
    rows: int
    cols: int


def _geometry(x: Tensor, line: int, block: int, unroll: int) -> _Geometry:
    """How the programs share ``x``, in blocks of ``block`` values of which a whole number of
    ``unroll`` go to each: depends on its shape and layout alone."""
    samples, channels = x.shape[:2]
    length = x.numel() // (samples * channels)
    last = length == 1 or not x.is_contiguous()
    if last:
        samples, length = samples * length, 1
        cols = min(triton.next_power_of_2(channels), line // x.element_size())
        tiles = triton.cdiv(channels, cols)
    else:
        cols = min(triton.next_power_of_2(length), block // 2)
        tiles = channels
    rows = block // cols
    steps = triton.cdiv(samples, rows) * triton.cdiv(length, cols)
    wanted = min(MAX_SPLITS, triton.cdiv(steps, LEAST // block), triton.cdiv(PROGRAMS, tiles))
    per_program = triton.cdiv(triton.cdiv(steps, wanted), unroll) * unroll
    splits = triton.cdiv(steps, per_program)
    # Each group has a ticket, and so has the tile: one of its channels' for each.
    width = cols if last else 1
    tickets = min(width, channels - (tiles - 1) * width)
    size = splits
    if splits > _chunk(width) and tickets > 2:
        size = triton.cdiv(splits, min(math.isqrt(splits - 1) + 1, tickets - 1))
    return _Geometry(
        samples, channels, length, tiles, splits, triton.cdiv(splits, size), size, steps,
        per_program, last, rows, cols,
    )  # fmt: skip


def batch_norm_collect(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    normalise: bool,
    batch: Tensor,
    tickets: Tensor | None,
) -> Tensor:
    """See :func:`swa_fast._ops.batch_norm_collect`."""
    unroll = IN_FLIGHT // (SUMMED // (32 * NUM_WARPS) * x.element_size())
    g = _geometry(x, LINE, SUMMED, unroll)
    math_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = g.cols if g.last else 1
    # One allocation: the programs' sums, then the coefficients in the arithmetic type.
    partials = 2 * g.tiles * (g.splits + g.groups) * width if g.splits > 1 else 0
    scratch = x.new_empty(partials + 3 * g.channels, dtype=torch.float64)
    coefficients = scratch[partials:].view(math_type)
    if tickets is None:
        tickets = x.new_zeros(g.channels, dtype=torch.int32)
    y = torch.empty_like(x) if normalise else x.new_empty(0)
    with _on(x.device):
        _statistics_kernel[(g.tiles * g.splits,)](
            x, x if weight is None else weight, x if bias is None else bias, eps, batch,
            batch.stride(0), tickets, scratch, coefficients, g.samples, g.channels, g.length,
            g.tiles, g.splits, g.groups, g.group_size, g.steps, g.steps_per_program,
            g.samples * g.length, x.shape[0], LAST=g.last, ROWS=g.rows, COLS=g.cols, UNROLL=unroll,
            PIVOTS=8 if math_type == torch.float64 else 1, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, num_warps=NUM_WARPS,
        )  # fmt: skip
        if normalise:
            g = _geometry(x, OUTPUT_LINE, BLOCK, 1)
            _normalise_kernel[(g.tiles * g.splits,)](
                x,
                y,
                coefficients,
                int(relu),
                g.samples,
                g.channels,
                g.length,
                g.tiles,
                g.steps,
                g.steps_per_program,
                LAST=g.last,
                ROWS=g.rows,
                COLS=g.cols,
                num_warps=NUM_WARPS,
            )
    return y


def batch_norm_merge_(accumulators: Tensor, batch: Tensor, estimator: int) -> None:
    """See :func:`swa_fast._ops.batch_norm_merge_`."""
    total = batch.shape[1]
    if total == 0:
        return
    with _on(batch.device):
        _merge_kernel[(triton.cdiv(total, MERGE_BLOCK),)](
            accumulators, batch, total, estimator, BLOCK=MERGE_BLOCK, num_warps=NUM_WARPS
        )
