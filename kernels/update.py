"""Triton kernels of ``swa_fast::update_`` and ``swa_fast::exchange_``.

Formula, rules and the table of runs: csrc/update.h. Layout: every run is consecutive in the source
and in each average; a program serves one run of at most ``BLOCK`` elements. Bytes per element:
sizeof(source) + 2 k sizeof(average), 4 + 8 k for k averages in fp32, plus 32 + 56 k for each
program's entry, rules and counters; bound by memory bandwidth.

One launch serves any number of tensors of any types and the counters too: the last program to
finish advances them, when every other program has read them.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["exchange_", "update_"]

BLOCK = 4096  # most elements of a run, as in swa_fast/engine.py
NUM_WARPS = 4  # with BLOCK: 32 elements, or eight 16-byte fp32 packs, per thread
# Most registers of a thread, for four and three programs on a multiprocessor. Left to itself, the
# compiler spills for one more.
REGISTERS, STOCHASTIC_REGISTERS = 128, 168
TYPES = tl.constexpr((tl.float32, tl.float64, tl.bfloat16, tl.float16))  # by type code
BYTES = tl.constexpr(4)  # type code of a run that is copied unchanged
LANES = tl.constexpr(128)  # threads of a program: what is loaded by LANES is loaded once
WARP = tl.constexpr(32)  # what is loaded by WARP every warp has a copy of, without a barrier


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _load_run(table_ptr):
    """This program's row of the table: source, average, bytes between averages, packed."""
    lane = tl.arange(0, LANES)
    entry = tl.load(table_ptr + tl.program_id(0).to(tl.int64) * 4 + lane, mask=lane < 4, other=0)
    zero = tl.zeros_like(entry)
    # All four at once, because the threads of a program wait for each other at every reduction.
    return tl.reduce(
        (
            tl.where(lane == 0, entry, zero),
            tl.where(lane == 1, entry, zero),
            tl.where(lane == 2, entry, zero),
            tl.where(lane == 3, entry, zero),
        ),
        0,
        _add4,
    )


@triton.jit
def _load_scalar(pointer):
    lane = tl.arange(0, WARP)
    return tl.sum(tl.load(pointer + lane, mask=lane == 0, other=0))


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _weight(rule_ptr, n):
    """The source's weight in fp64; kinds and columns as in csrc/update.h."""
    kind = _load_scalar(rule_ptr)
    one = tl.full([], 1.0, tl.float64)
    weight = one / (n + 1).to(tl.float64)
    if kind == 4.0:
        weight = tl.where(n == 0, one, 0.0 * one)
    elif kind > 0.0:
        column = tl.arange(0, LANES)
        rule = tl.load(rule_ptr + column, mask=(column > 0) & (column < 6), other=0.0)
        zero = tl.zeros_like(rule)
        decay, min_decay, gamma, power, after = tl.reduce(
            (
                tl.where(column == 1, rule, zero),
                tl.where(column == 2, rule, zero),
                tl.where(column == 3, rule, zero),
                tl.where(column == 4, rule, zero),
                tl.where(column == 5, rule, zero),
            ),
            0,
            _add5,
        )
        s = n.to(tl.float64) - after
        d = decay
        if kind == 2.0:
            d = 1.0 - tl.exp(-power * tl.log(1.0 + tl.maximum(s, one) / gamma))
        elif kind == 3.0:
            d = (1.0 + s) / (10.0 + s)
        if kind >= 2.0:
            d = tl.maximum(tl.minimum(d, decay), min_decay)
        weight = tl.where(s <= 0.0, one, 1.0 - d)
    return weight


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
    average_address,
    row_bytes,
    rows,
    source_address,
    place,
    count,
    copied,
    state_ptr,
    rules_ptr,
    seed,
    AVERAGE: tl.constexpr,
    SOURCE: tl.constexpr,
    MATH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One run in every average, of types AVERAGE and SOURCE. VECTOR: the source is aligned to 16
    bytes, and ``count`` is a multiple of 16; the averages always are aligned."""
    element = tl.arange(0, BLOCK)
    # The wider type fills 16 bytes, so that neighbouring threads touch neighbouring bytes in both.
    SOURCE_WIDTH: tl.constexpr = SOURCE.primitive_bitwidth
    AVERAGE_WIDTH: tl.constexpr = AVERAGE.primitive_bitwidth
    WIDER: tl.constexpr = SOURCE_WIDTH if SOURCE_WIDTH > AVERAGE_WIDTH else AVERAGE_WIDTH
    SOURCE_BYTES: tl.constexpr = 16 * SOURCE_WIDTH // WIDER
    AVERAGE_BYTES: tl.constexpr = 16 * AVERAGE_WIDTH // WIDER
    # Hints last only on what the function itself computes: those on its arguments, or on what
    # another function returns, are lost when it is inlined, and with them the 16-byte accesses.
    source_ptr = source_address.to(tl.pointer_type(SOURCE))
    if VECTOR:
        source_ptr = tl.multiple_of(source_ptr, SOURCE_BYTES)
        count = count // 16 * 16
    mask = element < count
    source = tl.load(source_ptr + element, mask=mask).to(MATH)
    for row in range(rows):
        n = _load_scalar(state_ptr + row)
        weight64 = tl.full([], 1.0, tl.float64)
        if copied == 0:
            weight64 = _weight(rules_ptr + row * 8, n)
        weight = weight64.to(MATH)
        average_ptr = (average_address + row * row_bytes).to(tl.pointer_type(AVERAGE))
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


@triton.jit
def _copy_bytes(target_address, source_address, count, BLOCK: tl.constexpr):
    """At most BLOCK bytes; the target is aligned to 16."""
    if (source_address | count) % 16 == 0:
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
    bfloat16_ptr,  # the bfloat16 averages, from which places for the random bits are counted
    rows,
    table_ptr,  # int64 [runs, 4]
    state_ptr,  # int64 [rows + 3]
    rules_ptr,  # float64 [rows, 8]
    seed: tl.int64,
    PAIRS: tl.constexpr,  # bit 4 a + s: the table holds averages of type a with sources of type s
    STOCHASTIC: tl.constexpr,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    address, average, row_bytes, packed = _load_run(table_ptr)
    place = (average - bfloat16_ptr.to(tl.int64)) // 2
    count = packed & 0xFFFFFFFF
    pair = ((packed >> 32) & 0xFF) * 4 + ((packed >> 40) & 0xFF)
    copied = (packed >> 48) & 1
    skip = tl.full([], 0, tl.int64)
    if GUARD:
        skip = _load_scalar(state_ptr + rows + 1)

    if skip == 0:
        if pair == BYTES * 4 + BYTES:
            for row in range(rows):
                _copy_bytes(average + row * row_bytes, address, count, BLOCK)
        for candidate in tl.static_range(16):
            # Nested, because the outer one is decided at compile time.
            if (PAIRS >> candidate) & 1:  # noqa: SIM102
                if pair == candidate:
                    AVERAGE: tl.constexpr = TYPES[candidate // 4]
                    SOURCE: tl.constexpr = TYPES[candidate % 4]
                    MATH: tl.constexpr = (
                        tl.float64 if candidate // 4 == 1 or candidate % 4 == 1 else tl.float32
                    )
                    ROUND: tl.constexpr = STOCHASTIC and candidate // 4 == 2 and candidate % 4 != 1
                    if (address | count) % 16 == 0:
                        _rows(
                            average, row_bytes, rows, address, place, count, copied, state_ptr,
                            rules_ptr, seed, AVERAGE, SOURCE, MATH, ROUND, True, BLOCK,
                        )  # fmt: skip
                    else:
                        # In pieces of another shape: the compiler gives tensors of one shape one
                        # layout, and that of the 16-byte accesses would not coalesce here.
                        for start in range(0, count, BLOCK // 2):
                            _rows(
                                average + start * (AVERAGE.primitive_bitwidth // 8), row_bytes,
                                rows, address + start * (SOURCE.primitive_bitwidth // 8),
                                place + start, count - start, copied, state_ptr, rules_ptr, seed,
                                AVERAGE, SOURCE, MATH, ROUND, False, BLOCK // 2,
                            )  # fmt: skip

    # All threads have read the counters, so this program may draw its ticket.
    tl.debug_barrier()
    drawn = tl.atomic_add(state_ptr + rows, 1)
    if drawn == tl.num_programs(0) - 1:
        tl.store(state_ptr + rows, 0)
        if skip != 0:
            tl.store(state_ptr + rows + 1, 0)
            tl.store(state_ptr + rows + 2, tl.load(state_ptr + rows + 2) + 1)
        else:
            for row in range(rows):
                tl.store(state_ptr + row, tl.load(state_ptr + row) + 1)


@triton.jit
def _guard_kernel(table_ptr, flag_ptr, BLOCK: tl.constexpr):
    """Sets the flag if an averaged source holds an infinity or NaN."""
    address, _, _, packed = _load_run(table_ptr)
    code = (packed >> 40) & 0xFF
    element = tl.arange(0, BLOCK)
    mask = element < (packed & 0xFFFFFFFF)
    found = tl.full([], 0, tl.int32)
    if ((packed >> 48) & 1) == 0:
        # The exponent's bits are all set for infinities and NaN, and only for them.
        if code == 0:
            bits = tl.load(address.to(tl.pointer_type(tl.int32)) + element, mask=mask, other=0)
            found = tl.max(((bits & 0x7F800000) == 0x7F800000).to(tl.int32))
        elif code == 1:
            exponent = 0x7FF0000000000000
            wide = tl.load(address.to(tl.pointer_type(tl.int64)) + element, mask=mask, other=0)
            found = tl.max(((wide & exponent) == exponent).to(tl.int32))
        elif code == 2:
            half = tl.load(address.to(tl.pointer_type(tl.int16)) + element, mask=mask, other=0)
            found = tl.max(((half & 0x7F80) == 0x7F80).to(tl.int32))
        elif code == 3:
            half = tl.load(address.to(tl.pointer_type(tl.int16)) + element, mask=mask, other=0)
            found = tl.max(((half & 0x7C00) == 0x7C00).to(tl.int32))
    if found != 0:
        tl.atomic_xchg(flag_ptr, 1)


@triton.jit
def _exchange_kernel(table_ptr, row: tl.int64, BLOCK: tl.constexpr):
    address, average, row_bytes, packed = _load_run(table_ptr)
    average += row * row_bytes
    code = (packed >> 40) & 0xFF
    size = tl.where(code == 1, 8, tl.where(code == 0, 4, tl.where(code == BYTES, 1, 2)))
    count = (packed & 0xFFFFFFFF) * size
    source_ptr = address.to(tl.pointer_type(tl.uint8))
    average_ptr = average.to(tl.pointer_type(tl.uint8))
    # All of a run of 4096 floats at once, as the update reads them. In four steps, each of which
    # waits for its loads, a swap reached two fifths of an H100's bandwidth.
    whole = tl.where(address % 16 == 0, count // 16 * 16, 0)
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


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def update_(
    averages: list[Tensor],
    state: Tensor,
    rules: Tensor,
    table: Tensor,
    pairs: int,
    seed: int | None,
    guard: bool,
) -> None:
    """See :func:`swa_fast._ops.update_`."""
    rows = averages[0].shape[0]
    bfloat16 = next((a for a in averages if a.dtype == torch.bfloat16), averages[0])
    with _on(table.device):
        if guard:
            _guard_kernel[(len(table),)](table, state[rows + 1 :], BLOCK, num_warps=NUM_WARPS)
        _update_kernel[(len(table),)](
            bfloat16,
            rows,
            table,
            state,
            rules,
            0 if seed is None else seed,
            PAIRS=pairs,
            STOCHASTIC=seed is not None,
            GUARD=guard,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            maxnreg=REGISTERS if seed is None else STOCHASTIC_REGISTERS,
        )


def exchange_(table: Tensor, row: int) -> None:
    """See :func:`swa_fast._ops.exchange_`."""
    with _on(table.device):
        _exchange_kernel[(len(table),)](table, row, BLOCK, num_warps=NUM_WARPS)
