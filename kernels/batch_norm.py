"""Triton kernels of ``swa_fast::batch_norm_collect`` and ``swa_fast::batch_norm_merge_``.

Formula: csrc/batch_norm.h, with groups of eight blocks whose pivot is the mean of the first one.
Layout: [n, c, s], or [n s, c] with channels-last; a program reads blocks of ``ROWS`` samples by
``COLS`` values of one channel, or of ``ROWS`` rows by ``COLS`` channels. Bytes per element: 3
sizeof(x), 12 for fp32: a read for the statistics, a read and a write for the output; bound by
memory bandwidth. Plus 16 bytes for a program and channel of its tile.

Two launches, one without the output. The last program of a tile to finish adds up the sums of all
of them in a fixed order; it knows that it is the last from a ticket, which it resets.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swa_fast import _layout as layout

__all__ = ["batch_norm_collect", "batch_norm_merge_"]

BLOCK = 2048  # values that a program has in flight
NUM_WARPS = 4  # with BLOCK: 16 values, or four 16-byte fp32 packs, per thread
GROUP = tl.constexpr(8)  # blocks of a group: the bound in csrc/batch_norm.h
# Bytes of a row that a tile of channels fills, for the statistics and for the output: lines that
# several programs write in parts are slow to write.
LINE, OUTPUT_LINE = 128, 512
PROGRAMS = 1024  # fills any GPU; not its own number, for the same bits on all
MAX_SPLITS = 512
MERGE_BLOCK = 256
POOLED, TORCH = tl.constexpr(layout.POOLED), tl.constexpr(layout.TORCH)


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
def _block(step, tile, samples, channels, length, LAST: tl.constexpr, ROWS: tl.constexpr,
           COLS: tl.constexpr):  # fmt: skip
    """Offsets and mask of a program's block. ``samples`` counts rows, with channels-last."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    col = tl.arange(0, COLS)[None, :]
    if LAST:
        row += step * ROWS
        col += (tile * COLS).to(tl.int32)
        return row * channels + col, (row < samples) & (col < channels)
    else:
        across = tl.cdiv(length, COLS)
        row += step // across * ROWS
        col = col.to(tl.int64) + step % across * COLS
        sample = _int64(channels) * length
        return row * sample + tile * length + col, (row < samples) & (col < length)


@triton.jit
def _values_of(step, samples, length, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many values of one channel a block holds."""
    if LAST:
        return tl.minimum(samples - step * ROWS, ROWS)
    else:
        across = tl.cdiv(length, COLS)
        rows = tl.minimum(samples - step // across * ROWS, ROWS)
        return rows * tl.minimum(length - step % across * COLS, COLS)


@triton.jit
def _statistics_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    eps: tl.float64,
    batch_ptr,  # float64 [4, c], `batch_stride` elements between rows
    batch_stride: tl.int64,
    tickets_ptr,  # int32 [c], one for a tile at the number of its first channel
    partial_ptr,  # float64 [tiles, splits, 2, channels of a tile]
    coefficients_ptr,  # [3, c]: centre, scale, offset
    samples: tl.int64,
    channels,
    length,
    tiles: tl.int64,
    splits: tl.int64,
    steps: tl.int64,  # blocks of a channel or tile
    steps_per_program: tl.int64,
    values: tl.int64,  # of a channel
    batch_samples: tl.int64,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIVOTS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    MATH: tl.constexpr = coefficients_ptr.dtype.element_ty
    WIDTH: tl.constexpr = COLS if LAST else 1
    CHUNK: tl.constexpr = 1024 // WIDTH
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    split = program // tiles
    column = tl.arange(0, WIDTH)
    channel = tile * WIDTH + column
    inside = channel < channels

    # The channels' pivots: their first value, for fp64 the mean of the first ones.
    if LAST:
        available = values
        stride = _int64(channels)
        origin = x_ptr + channel
    else:
        available = _int64(length)
        stride = tl.full([], 1, tl.int64)
        origin = x_ptr + channel * length
    pivot = tl.zeros([WIDTH], tl.float64)
    for place in tl.static_range(PIVOTS):
        valid = inside & (place < available)
        pivot += tl.load(origin + place * stride, mask=valid, other=0.0).to(tl.float64)
    pivot /= tl.minimum(available, PIVOTS).to(tl.float64)

    first = tl.zeros([WIDTH], tl.float64)
    second = tl.zeros([WIDTH], tl.float64)
    begin = split * steps_per_program
    end = tl.minimum(begin + steps_per_program, steps)
    for group in range(begin, end, GROUP):
        offsets, mask = _block(group, tile, samples, channels, length, LAST, ROWS, COLS)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(MATH)
        count = _values_of(group, samples, length, LAST, ROWS, COLS)
        group_pivot = (_over_tile(x.to(tl.float64), LAST) / count.to(tl.float64)).to(MATH)
        d = tl.where(mask, x - group_pivot[None, :], 0.0)
        s1 = d
        s2 = d * d
        for step in range(group + 1, tl.minimum(group + GROUP, end)):
            offsets, mask = _block(step, tile, samples, channels, length, LAST, ROWS, COLS)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(MATH)
            count += _values_of(step, samples, length, LAST, ROWS, COLS)
            d = tl.where(mask, x - group_pivot[None, :], 0.0)
            s1 += d
            s2 += d * d
        sum1 = _over_tile(s1.to(tl.float64), LAST)
        sum2 = _over_tile(s2.to(tl.float64), LAST)
        q = group_pivot.to(tl.float64) - pivot
        kq = count.to(tl.float64) * q
        first += kq + sum1
        second += sum2 + q * (kq + 2.0 * sum1)

    last = splits == 1
    if splits > 1:
        partial = partial_ptr + tile * splits * (2 * WIDTH)
        mine = partial + split * (2 * WIDTH) + column
        tl.store(mine, first, cache_modifier=".cg")
        tl.store(mine + WIDTH, second, cache_modifier=".cg")
        # All threads' stores come before the ticket, which one thread draws.
        tl.debug_barrier()
        last = tl.atomic_add(tickets_ptr + tile * WIDTH, 1, sem="acq_rel") == splits - 1
        if last:
            # Added up side by side, and over the threads once: else each turn would wait for its
            # loads, and for all threads.
            firsts = tl.zeros([CHUNK, WIDTH], tl.float64)
            seconds = tl.zeros([CHUNK, WIDTH], tl.float64)
            for start in tl.range(0, splits, CHUNK, loop_unroll_factor=4):
                part = start + tl.arange(0, CHUNK).to(tl.int64)[:, None]
                theirs = partial + part * (2 * WIDTH) + column[None, :]
                read = part < splits
                firsts += tl.load(theirs, mask=read, other=0.0, cache_modifier=".cg")
                seconds += tl.load(theirs + WIDTH, mask=read, other=0.0, cache_modifier=".cg")
            first = tl.sum(firsts, axis=0)
            second = tl.sum(seconds, axis=0)
            tl.store(tickets_ptr + tile * WIDTH, 0)
    if last:
        m = values.to(tl.float64)
        shift = first / m
        mean = pivot + shift
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
    steps: tl.int64,
    steps_per_program: tl.int64,
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
    begin = program // tiles * steps_per_program
    for step in range(begin, tl.minimum(begin + steps_per_program, steps)):
        offsets, mask = _block(step, tile, samples, channels, length, LAST, ROWS, COLS)
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
    steps: int
    steps_per_program: int
    last: bool
    rows: int
    cols: int


def _geometry(x: Tensor, line: int) -> _Geometry:
    """How the programs share ``x``: depends on its shape and layout alone."""
    samples, channels = x.shape[:2]
    length = x.numel() // (samples * channels)
    last = length == 1 or not x.is_contiguous()
    if last:
        samples, length = samples * length, 1
        cols = min(triton.next_power_of_2(channels), line // x.element_size())
        tiles = triton.cdiv(channels, cols)
    else:
        cols = min(triton.next_power_of_2(length), BLOCK // 2)
        tiles = channels
    rows = BLOCK // cols
    steps = triton.cdiv(samples, rows) * triton.cdiv(length, cols)
    group = GROUP.value
    wanted = min(MAX_SPLITS, triton.cdiv(steps, group), triton.cdiv(PROGRAMS, tiles))
    per_program = triton.cdiv(triton.cdiv(steps, wanted), group) * group
    splits = triton.cdiv(steps, per_program)
    return _Geometry(samples, channels, length, tiles, splits, steps, per_program, last, rows, cols)


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
    g = _geometry(x, LINE)
    math = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = g.cols if g.last else 1
    # One allocation: the programs' sums, then the coefficients in the arithmetic type.
    partials = 2 * g.tiles * g.splits * width if g.splits > 1 else 0
    scratch = x.new_empty(partials + 3 * g.channels, dtype=torch.float64)
    coefficients = scratch[partials:].view(math)
    if tickets is None:
        tickets = x.new_zeros(g.channels, dtype=torch.int32)
    y = torch.empty_like(x) if normalise else x.new_empty(0)
    with _on(x.device):
        _statistics_kernel[(g.tiles * g.splits,)](
            x,
            x if weight is None else weight,
            x if bias is None else bias,
            eps,
            batch,
            batch.stride(0),
            tickets,
            scratch,
            coefficients,
            g.samples,
            g.channels,
            g.length,
            g.tiles,
            g.splits,
            g.steps,
            g.steps_per_program,
            g.samples * g.length,
            x.shape[0],
            LAST=g.last,
            ROWS=g.rows,
            COLS=g.cols,
            PIVOTS=8 if math == torch.float64 else 1,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            num_warps=NUM_WARPS,
        )
        if normalise:
            g = _geometry(x, OUTPUT_LINE)
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
