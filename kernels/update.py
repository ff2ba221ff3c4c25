"""Triton kernels of ``swa_fast::update_`` and ``swa_fast::swap_``.

Formula: csrc/update.h; rules and the table of segments: swa_fast/_layout.py. Layout: every
segment is consecutive in the source and in each average; a program serves one of at most ``BLOCK``
elements. Bytes per element: sizeof(source) + 2 k sizeof(average), 4 + 8 k for k averages in fp32,
plus 24 + 64 k for each program's row of the table, rules and counters; bound by memory bandwidth.

One launch serves any number of tensors of any types and the counters too: the last program to
finish advances them, when every other program has read them.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from swa_fast import _layout as layout

from .weights import INTERPRETED, LANES, gate, load_scalar, weight_of

__all__ = ["on_device", "swap_", "update_"]

BLOCK = layout.TRITON_SEGMENT
NUM_WARPS = 4  # with BLOCK: 32 elements, or eight 16-byte fp32 packs, per thread
# Most registers of a thread, for three programs on a multiprocessor; left to itself, the compiler
# spills for one more. Where 128 suffice, as on most architectures, four fit.
REGISTERS = 168
TYPES = tl.constexpr((tl.float32, tl.float64, tl.bfloat16, tl.float16))  # by type code

FLOAT, DOUBLE = tl.constexpr(layout.FLOAT), tl.constexpr(layout.DOUBLE)
BFLOAT16, HALF = tl.constexpr(layout.BFLOAT16), tl.constexpr(layout.HALF)
BYTES = tl.constexpr(layout.BYTES)
SOURCE_WORD, PACKED_WORD = tl.constexpr(layout.SOURCE), tl.constexpr(layout.PACKED)
PLACE_WORD, HEADER = tl.constexpr(layout.PLACE), tl.constexpr(layout.SEGMENT_HEADER)
AVERAGE_TYPE = tl.constexpr(layout.AVERAGE_TYPE)
SOURCE_TYPE = tl.constexpr(layout.SOURCE_TYPE)
COPIED, ALIGNMENT = tl.constexpr(layout.COPIED), tl.constexpr(layout.ALIGNMENT)
RULE_COLUMNS = tl.constexpr(layout.RULE_COLUMNS)
TICKET, NON_FINITE = tl.constexpr(layout.TICKET), tl.constexpr(layout.NON_FINITE)
SKIPPED = tl.constexpr(layout.SKIPPED)


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _load_row(table_ptr, averages):
    """This program's row of the table, a word in each of the first lanes."""
    width = averages + HEADER
    lane = tl.arange(0, LANES)
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * width
    return tl.load(row_ptr + lane, mask=lane < width, other=0)


@triton.jit
def _segment(words, average):
    """The words source, packed and place of a row, and the address of an average."""
    lane = tl.arange(0, LANES)
    zero = tl.zeros_like(words)
    source = tl.where(lane == SOURCE_WORD, words, zero)
    packed = tl.where(lane == PACKED_WORD, words, zero)
    place = tl.where(lane == PLACE_WORD, words, zero)
    address = tl.where(lane == average + HEADER, words, zero)
    if INTERPRETED:
        return tl.sum(source), tl.sum(packed), tl.sum(place), tl.sum(address)
    else:
        # All at once, because the threads of a program wait for each other at every reduction.
        return tl.reduce((source, packed, place, address), 0, _add4)


@triton.jit
def _average(words, average):
    lane = tl.arange(0, LANES)
    return tl.sum(tl.where(lane == average + HEADER, words, tl.zeros_like(words)))


@triton.jit
def _random16(seed, first, n, row, BLOCK: tl.constexpr):
    """16 random bits for each of BLOCK elements from ``first``, a multiple of eight, on."""
    group = first // 8 + tl.arange(0, BLOCK // 8).to(tl.int64)
    zero = tl.zeros([BLOCK // 8], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        group.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        zero + n.to(tl.uint32),
        (zero + row).to(tl.uint32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # in memory order w0, w1, w2, w3
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])


@triton.jit
def _rows(
    words,
    average_address,
    start,
    rows,
    source_address,
    place,
    count,
    copied,
    n_averaged_ptr,
    rules_ptr,
    seed,
    AVERAGE: tl.constexpr,
    SOURCE: tl.constexpr,
    MATH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a segment has from ``start`` on, in every average, of types AVERAGE and SOURCE. VECTOR:
    source and averages are aligned to 16 bytes, and ``count`` is a multiple of 16."""
    element = tl.arange(0, BLOCK)
    # The wider type fills 16 bytes, so that neighbouring threads touch neighbouring bytes in both.
    SOURCE_WIDTH: tl.constexpr = SOURCE.primitive_bitwidth
    AVERAGE_WIDTH: tl.constexpr = AVERAGE.primitive_bitwidth
    WIDER: tl.constexpr = SOURCE_WIDTH if SOURCE_WIDTH > AVERAGE_WIDTH else AVERAGE_WIDTH
    SOURCE_BYTES: tl.constexpr = 16 * SOURCE_WIDTH // WIDER
    AVERAGE_BYTES: tl.constexpr = 16 * AVERAGE_WIDTH // WIDER
    # Hints last only on what the function itself computes: those on its arguments, or on what
    # another function returns, are lost when it is inlined, and with them the 16-byte accesses.
    source_ptr = (source_address + start * (SOURCE_WIDTH // 8)).to(tl.pointer_type(SOURCE))
    place += start
    count -= start
    if VECTOR:
        source_ptr = tl.multiple_of(source_ptr, SOURCE_BYTES)
        count = count // 16 * 16
    mask = element < count
    source = tl.load(source_ptr + element, mask=mask).to(MATH)
    for row in range(rows):
        n = load_scalar(n_averaged_ptr + row)
        weight64 = tl.full([], 1.0, tl.float64)
        if copied == 0:
            weight64 = weight_of(rules_ptr + row * RULE_COLUMNS, n)
        weight = weight64.to(MATH)
        average_ptr = average_address + start * (AVERAGE_WIDTH // 8)
        average_ptr = average_ptr.to(tl.pointer_type(AVERAGE))
        if VECTOR:
            average_ptr = tl.multiple_of(average_ptr, AVERAGE_BYTES)
        if weight64 == 1.0:
            updated = source
        else:
            average = tl.load(average_ptr + element, mask=mask).to(MATH)
            # As torch.lerp: the form with the smaller error on each side of 1/2.
            near = tl.fma(tl.zeros_like(source) + weight, source - average, average)
            far = tl.fma(tl.zeros_like(source) + (weight - 1.0), source - average, source)
            updated = tl.where(weight < 0.5, near, far)
        # Loads and stores of an average are skipped where nothing moves.
        if weight64 != 0.0:
            if STOCHASTIC:
                if copied == 0:
                    bits = updated.to(tl.uint32, bitcast=True)
                    random = _random16(seed, place, n, row, BLOCK)
                    rounded = ((bits + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
                    special = (bits & 0x7F800000) == 0x7F800000
                    nearest = updated.to(tl.bfloat16)
                    tl.store(average_ptr + element, tl.where(special, nearest, rounded), mask=mask)
                else:
                    tl.store(average_ptr + element, updated.to(tl.bfloat16), mask=mask)
            else:
                tl.store(average_ptr + element, updated.to(AVERAGE), mask=mask)
        average_address = _average(words, row + 1)


@triton.jit
def _copy_bytes(target_address, source_address, count, wide, BLOCK: tl.constexpr):
    """At most BLOCK bytes; ``wide``: all of them are multiples of 16 bytes."""
    if wide:
        words = tl.arange(0, BLOCK // 8)
        wide_source = tl.multiple_of(source_address.to(tl.pointer_type(tl.int64)), 16)
        wide_target = tl.multiple_of(target_address.to(tl.pointer_type(tl.int64)), 16)
        inside = words < count // 16 * 2
        tl.store(wide_target + words, tl.load(wide_source + words, mask=inside), mask=inside)
    else:
        single = tl.arange(0, BLOCK // 4)  # of another shape, see the caller
        for start in range(0, count, BLOCK // 4):
            source_ptr = (source_address + start).to(tl.pointer_type(tl.uint8))
            target_ptr = (target_address + start).to(tl.pointer_type(tl.uint8))
            mask = single < count - start
            tl.store(target_ptr + single, tl.load(source_ptr + single, mask=mask), mask=mask)


@triton.jit
def _update_kernel(
    rows,
    table_ptr,  # int64 [segments, HEADER + rows]
    n_averaged_ptr,  # int64 [rows]
    counters_ptr,  # int64 [3], or None: nothing is counted
    rules_ptr,  # float64 [rows, RULE_COLUMNS]
    found_inf_ptr,  # float32, or None: the gradient scaler skipped no step
    steps_ptr,  # int64, or None: every update is due
    every,
    offset,
    seed: tl.int64,
    PAIRS: tl.constexpr,  # bit 4 a + s: the table holds averages of type a with sources of type s
    STOCHASTIC: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    words = _load_row(table_ptr, rows)
    source, packed, place, average = _segment(words, 0)
    count = packed & 0xFFFFFFFF
    pair = ((packed >> AVERAGE_TYPE) & 0xFF) * 4 + ((packed >> SOURCE_TYPE) & 0xFF)
    copied = (packed >> COPIED) & 1
    wide = ((source | count) % 16 == 0) & ((packed >> ALIGNMENT) & 7 == 4)
    skip = tl.full([], 0, tl.int64)
    if SKIP_NONFINITE:
        skip = load_scalar(counters_ptr + NON_FINITE)
    counted, due = gate(found_inf_ptr, steps_ptr, every, offset)

    if (skip == 0) & (due != 0):
        if pair == BYTES * 4 + BYTES:
            for row in range(rows):
                _copy_bytes(average, source, count, wide, BLOCK)
                average = _average(words, row + 1)
        for candidate in tl.static_range(16):
            # Nested, because the outer one is decided at compile time.
            if (PAIRS >> candidate) & 1:  # noqa: SIM102
                if pair == candidate:
                    AVERAGE: tl.constexpr = TYPES[candidate // 4]
                    SOURCE: tl.constexpr = TYPES[candidate % 4]
                    MATH: tl.constexpr = (
                        tl.float64
                        if candidate // 4 == DOUBLE or candidate % 4 == DOUBLE
                        else tl.float32
                    )
                    ROUND: tl.constexpr = (
                        STOCHASTIC and candidate // 4 == BFLOAT16 and candidate % 4 != DOUBLE
                    )
                    if wide:
                        _rows(
                            words, average, 0, rows, source, place, count, copied,
                            n_averaged_ptr, rules_ptr, seed, AVERAGE, SOURCE, MATH, ROUND, True,
                            BLOCK,
                        )  # fmt: skip
                    else:
                        # In pieces of another shape: the compiler gives tensors of one shape one
                        # layout, and that of the 16-byte accesses would not coalesce here.
                        for start in range(0, count, BLOCK // 2):
                            _rows(
                                words, average, start, rows, source, place, count, copied,
                                n_averaged_ptr, rules_ptr, seed, AVERAGE, SOURCE, MATH, ROUND,
                                False, BLOCK // 2,
                            )  # fmt: skip

    if counters_ptr is not None:
        # All threads have read the counters, so this program may draw its ticket.
        tl.debug_barrier()
        drawn = tl.atomic_add(counters_ptr + TICKET, 1)
        if drawn == tl.num_programs(0) - 1:
            tl.store(counters_ptr + TICKET, 0)
            # Again, because what is kept takes registers all the while.
            counted, due = gate(found_inf_ptr, steps_ptr, every, offset)
            if steps_ptr is not None:
                tl.store(steps_ptr, tl.load(steps_ptr) + counted)
            if skip != 0:
                tl.store(counters_ptr + NON_FINITE, 0)
                tl.store(counters_ptr + SKIPPED, tl.load(counters_ptr + SKIPPED) + due)
            elif due != 0:
                for row in range(rows):
                    tl.store(n_averaged_ptr + row, tl.load(n_averaged_ptr + row) + 1)


@triton.jit
def _nonfinite_kernel(table_ptr, rows, counters_ptr, BLOCK: tl.constexpr):
    """Sets a counter if an averaged source holds an infinity or NaN."""
    address, packed, _, _ = _segment(_load_row(table_ptr, rows), 0)
    code = (packed >> SOURCE_TYPE) & 0xFF
    element = tl.arange(0, BLOCK)
    mask = element < (packed & 0xFFFFFFFF)
    found = tl.full([], 0, tl.int32)
    if ((packed >> COPIED) & 1) == 0:
        # The exponent's bits are all set for infinities and NaN, and only for them.
        if code == FLOAT:
            bits = tl.load(address.to(tl.pointer_type(tl.int32)) + element, mask=mask, other=0)
            found = tl.max(((bits & 0x7F800000) == 0x7F800000).to(tl.int32))
        elif code == DOUBLE:
            exponent = 0x7FF0000000000000
            wide = tl.load(address.to(tl.pointer_type(tl.int64)) + element, mask=mask, other=0)
            found = tl.max(((wide & exponent) == exponent).to(tl.int32))
        elif code == BFLOAT16:
            half = tl.load(address.to(tl.pointer_type(tl.int16)) + element, mask=mask, other=0)
            found = tl.max(((half & 0x7F80) == 0x7F80).to(tl.int32))
        elif code == HALF:
            half = tl.load(address.to(tl.pointer_type(tl.int16)) + element, mask=mask, other=0)
            found = tl.max(((half & 0x7C00) == 0x7C00).to(tl.int32))
    if found != 0:
        tl.atomic_xchg(counters_ptr + NON_FINITE, 1)


@triton.jit
def _swap_kernel(table_ptr, rows, row, BLOCK: tl.constexpr):
    address, packed, _, average = _segment(_load_row(table_ptr, rows), row)
    code = (packed >> SOURCE_TYPE) & 0xFF
    size = tl.where(code == DOUBLE, 8, tl.where(code == FLOAT, 4, tl.where(code == BYTES, 1, 2)))
    count = (packed & 0xFFFFFFFF) * size
    source_ptr = address.to(tl.pointer_type(tl.uint8))
    average_ptr = average.to(tl.pointer_type(tl.uint8))
    # All of a segment of 4096 floats at once, as the update reads them. In four steps, each of
    # which waits for its loads, a swap reached two fifths of an H100's bandwidth.
    whole = tl.where((address | average) % 16 == 0, count // 16 * 16, 0)
    words = tl.arange(0, BLOCK // 2)
    for start in range(0, whole, 4 * BLOCK):
        left = (average_ptr + start).to(tl.pointer_type(tl.int64))
        right = (source_ptr + start).to(tl.pointer_type(tl.int64))
        wide_left = tl.multiple_of(left, 16) + words
        wide_right = tl.multiple_of(right, 16) + words
        mask = words < tl.multiple_of((whole - start) // 8, 2)
        kept = tl.load(wide_left, mask=mask)
        tl.store(wide_left, tl.load(wide_right, mask=mask), mask=mask)
        tl.store(wide_right, kept, mask=mask)
    # Byte by byte, few at a time: one a lane of a whole block takes more registers than there are.
    bytes_ = tl.arange(0, BLOCK // 8)
    for start in range(whole, count, BLOCK // 8):
        single = start + bytes_
        mask = single < count
        narrow = tl.load(average_ptr + single, mask=mask)
        tl.store(average_ptr + single, tl.load(source_ptr + single, mask=mask), mask=mask)
        tl.store(source_ptr + single, narrow, mask=mask)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def update_(
    averages: list[Tensor],
    sources: list[Tensor],
    n_averaged: Tensor,
    counters: Tensor | None,
    rules: Tensor,
    table: Tensor,
    pairs: int,
    seed: int | None,
    skip_nonfinite: bool,
    short_segments: int = 0,
    found_inf: Tensor | None = None,
    steps: Tensor | None = None,
    every: int = 1,
    offset: int = 0,
) -> None:
    """See :func:`swa_fast.reference.update_`."""
    rows = n_averaged.numel()
    with on_device(table.device):
        if skip_nonfinite:
            _nonfinite_kernel[(len(table),)](table, rows, counters, BLOCK, num_warps=NUM_WARPS)
        _update_kernel[(len(table),)](
            rows,
            table,
            n_averaged,
            counters,
            rules,
            found_inf,
            steps,
            every,
            offset,
            0 if seed is None else seed,
            PAIRS=pairs,
            STOCHASTIC=seed is not None,
            SKIP_NONFINITE=skip_nonfinite,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            maxnreg=REGISTERS,
        )


def swap_(
    averages: list[Tensor],
    sources: list[Tensor],
    table: Tensor,
    row: int,
    short_segments: int = 0,
) -> None:
    """See :func:`swa_fast.reference.swap_`."""
    rows = table.shape[1] - layout.SEGMENT_HEADER
    with on_device(table.device):
        _swap_kernel[(len(table),)](table, rows, row, BLOCK, num_warps=NUM_WARPS)
