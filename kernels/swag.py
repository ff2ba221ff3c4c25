"""Triton kernel of ``swa_fast::swag_``.

Formula: :func:`swa_fast.reference.swag_`. Layout: as for the update, whose table of segments it
reads (kernels/update.py). Bytes per element: 4 + 8 + 8 + 4 for fp32, bound by memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .update import (
    BLOCK,
    DOUBLE,
    HEADER,
    NUM_WARPS,
    REGISTERS,
    SOURCE_TYPE,
    TICKET,
    TYPES,
    _load_row,
    _segment,
    on_device,
)
from .weights import LANES, gate, load_scalar

__all__ = ["swag_"]


@triton.jit
def _address(words, row):
    lane = tl.arange(0, LANES)
    return tl.sum(tl.where(lane == row + HEADER, words, tl.zeros_like(words)))


@triton.jit
def _part(
    source_address,
    mean_address,
    squares_address,
    column_address,
    start,
    count,
    n,
    AVERAGE: tl.constexpr,
    SOURCE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a segment has from ``start`` on. VECTOR: all are aligned to 16 bytes, and ``count`` is a
    multiple of 16."""
    element = tl.arange(0, BLOCK)
    SOURCE_BYTES: tl.constexpr = SOURCE.primitive_bitwidth // 8
    AVERAGE_BYTES: tl.constexpr = AVERAGE.primitive_bitwidth // 8
    shift = start * AVERAGE_BYTES
    source_ptr = (source_address + start * SOURCE_BYTES).to(tl.pointer_type(SOURCE))
    mean_ptr = (mean_address + shift).to(tl.pointer_type(AVERAGE))
    squares_ptr = (squares_address + shift).to(tl.pointer_type(AVERAGE))
    column_ptr = (column_address + shift).to(tl.pointer_type(AVERAGE))
    count -= start
    if VECTOR:
        source_ptr = tl.multiple_of(source_ptr, 16)
        mean_ptr = tl.multiple_of(mean_ptr, 16)
        squares_ptr = tl.multiple_of(squares_ptr, 16)
        column_ptr = tl.multiple_of(column_ptr, 16)
        count = count // 16 * 16
    mask = element < count
    x = tl.load(source_ptr + element, mask=mask).to(AVERAGE)
    zero = tl.zeros_like(x)
    now, grown = x, zero
    if n > 0:
        weight = (tl.full([], 1.0, tl.float64) / (n + 1).to(tl.float64)).to(AVERAGE)
        old = tl.load(mean_ptr + element, mask=mask)
        # As torch.lerp: the form with the smaller error on each side of 1/2.
        near = tl.fma(zero + weight, x - old, old)
        far = tl.fma(zero + (weight - 1.0), x - old, x)
        now = tl.where(weight < 0.5, near, far)
        squares = tl.load(squares_ptr + element, mask=mask)
        grown = tl.fma(x - old, x - now, squares)
    tl.store(mean_ptr + element, now, mask=mask)
    tl.store(squares_ptr + element, grown, mask=mask)
    tl.store(column_ptr + element, x - now, mask=mask)


@triton.jit
def _swag_kernel(
    table_ptr,  # int64 [segments, HEADER + rows]
    rows,
    columns,
    n_averaged_ptr,  # int64 [1]
    counters_ptr,  # int64 [3]
    found_inf_ptr,  # float32, or None: the gradient scaler skipped no step
    steps_ptr,  # int64, or None: every update is due
    every,
    offset,
    PAIRS: tl.constexpr,  # bit 4 a + s: the table holds averages of type a with sources of type s
    BLOCK: tl.constexpr,
):
    words = _load_row(table_ptr, rows)
    source, packed, _, mean = _segment(words, 0)
    squares = _address(words, 1)
    n = load_scalar(n_averaged_ptr)
    column = _address(words, 2 + (n % columns).to(tl.int32))
    count = packed & 0xFFFFFFFF
    code = (packed >> SOURCE_TYPE) & 0xFF
    wide = (source | count | mean | squares | column) % 16 == 0
    counted, due = gate(found_inf_ptr, steps_ptr, every, offset)
    if due != 0:
        for candidate in tl.static_range(4):
            # Averages of fp64 come from sources of fp64. Nested, because the outer condition is
            # decided at compile time.
            if (PAIRS >> (5 if candidate == DOUBLE else candidate)) & 1:  # noqa: SIM102
                if code == candidate:
                    AVERAGE: tl.constexpr = tl.float64 if candidate == DOUBLE else tl.float32
                    SOURCE: tl.constexpr = TYPES[candidate]
                    if wide:
                        for start in range(0, count, BLOCK):
                            _part(
                                source, mean, squares, column, start, count, n, AVERAGE, SOURCE,
                                True, BLOCK,
                            )  # fmt: skip
                    else:
                        for start in range(0, count, BLOCK // 2):
                            _part(
                                source, mean, squares, column, start, count, n, AVERAGE, SOURCE,
                                False, BLOCK // 2,
                            )  # fmt: skip
    tl.debug_barrier()
    drawn = tl.atomic_add(counters_ptr + TICKET, 1)
    if drawn == tl.num_programs(0) - 1:
        tl.store(counters_ptr + TICKET, 0)
        counted, due = gate(found_inf_ptr, steps_ptr, every, offset)
        if steps_ptr is not None:
            tl.store(steps_ptr, tl.load(steps_ptr) + counted)
        tl.store(n_averaged_ptr, tl.load(n_averaged_ptr) + due)


def swag_(
    averages: list[Tensor],
    sources: list[Tensor],
    n_averaged: Tensor,
    counters: Tensor,
    table: Tensor,
    pairs: int,
    columns: int,
    short_segments: int = 0,
    found_inf: Tensor | None = None,
    steps: Tensor | None = None,
    every: int = 1,
    offset: int = 0,
) -> None:
    """See :func:`swa_fast.reference.swag_`."""
    rows = table.shape[1] - HEADER.value
    if rows + HEADER.value > LANES.value:
        raise ValueError(f"swag_.triton: expected at most {LANES.value - 6} columns")
    torch._check(columns >= 1)
    with on_device(table.device):
        _swag_kernel[(len(table),)](
            table,
            rows,
            columns,
            n_averaged,
            counters,
            found_inf,
            steps,
            every,
            offset,
            PAIRS=pairs,
            BLOCK=BLOCK // 2,
            num_warps=NUM_WARPS,
            maxnreg=REGISTERS,
        )
