"""Triton kernel of ``swa_fast::average_``.

Formula: :func:`swa_fast.reference.average_`. Layout: every pair is two runs of ``numel`` elements
in the same order (the caller hands over dense tensors only). Bytes per element:
sizeof(source) + 2 sizeof(average), 12 for fp32, plus 44 bytes of tables per program of
``BLOCK`` elements and 8 of counter; bound by memory bandwidth.

One launch serves all pairs of one (average, source) type combination: programs look their chunk up
in tables of pointers on the device.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["average_"]

BLOCK = 4096  # elements per program
NUM_WARPS = 8  # with BLOCK: 16 elements, or four 16-byte fp32 packs, per thread
PACK_BYTES = 16

_TRITON_TYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _blend(average, source, n, weight):
    """As torch.lerp: the form with the smaller error on each side of weight = 1/2."""
    near = average + weight * (source - average)
    far = source - (1.0 - weight) * (source - average)
    return tl.where(n == 0, source, tl.where(weight < 0.5, near, far))


@triton.jit
def _average_chunk(average_ptr, source_ptr, offsets, mask, n, weight, MATH: tl.constexpr):
    source = tl.load(source_ptr + offsets, mask=mask).to(MATH)
    average = tl.load(average_ptr + offsets, mask=mask).to(MATH)
    updated = _blend(average, source, n, weight)
    tl.store(average_ptr + offsets, updated.to(average_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _average_kernel(
    average_table_ptr,  # int64 [tensors], addresses
    source_table_ptr,  # int64 [tensors], addresses
    numel_table_ptr,  # int64 [tensors]
    aligned_table_ptr,  # int32 [tensors], 1 if both addresses are multiples of ALIGN bytes
    tensor_of_program_ptr,  # int32 [programs]
    chunk_of_program_ptr,  # int64 [programs], first element
    n_averaged_ptr,  # int64 [1]
    one_minus_decay: tl.float64,  # used for EXPONENTIAL only; unannotated it would become fp32
    AVERAGE: tl.constexpr,
    SOURCE: tl.constexpr,
    MATH: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tensor_of_program_ptr + program)
    chunk = tl.load(chunk_of_program_ptr + program)
    numel = tl.load(numel_table_ptr + tensor)
    average_ptr = tl.load(average_table_ptr + tensor).to(tl.pointer_type(AVERAGE))
    source_ptr = tl.load(source_table_ptr + tensor).to(tl.pointer_type(SOURCE))

    n = tl.load(n_averaged_ptr)
    if EXPONENTIAL:
        weight = tl.full([], one_minus_decay, MATH)
    else:
        weight = (1.0 / (n + 1).to(tl.float64)).to(MATH)

    offsets = chunk + tl.arange(0, BLOCK).to(tl.int64)
    if tl.load(aligned_table_ptr + tensor) != 0 and chunk + BLOCK <= numel:
        # Only here may the compiler use 16-byte accesses: addresses from a table carry no
        # alignment, so it has to be told.
        average_ptr = tl.multiple_of(average_ptr, PACK)
        source_ptr = tl.multiple_of(source_ptr, PACK)
        chunk = tl.multiple_of(chunk, BLOCK)
        offsets = chunk + tl.arange(0, BLOCK).to(tl.int64)
        _average_chunk(average_ptr, source_ptr, offsets, None, n, weight, MATH)
    else:
        _average_chunk(average_ptr, source_ptr, offsets, offsets < numel, n, weight, MATH)


@dataclass(frozen=True)
class _Tables:
    """Device tables of one (average, source) type combination."""

    average: Tensor
    source: Tensor
    numel: Tensor
    aligned: Tensor
    tensor_of_program: Tensor
    chunk_of_program: Tensor


def _build_tables(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> _Tables:
    tensor_of_program: list[int] = []
    chunk_of_program: list[int] = []
    for index, (average, _) in enumerate(pairs):
        chunks = range(0, average.numel(), BLOCK)
        tensor_of_program += [index] * len(chunks)
        chunk_of_program += chunks
    aligned = [int((a.data_ptr() | s.data_ptr()) % PACK_BYTES == 0) for a, s in pairs]

    def table(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return _Tables(
        table([a.data_ptr() for a, _ in pairs]),
        table([s.data_ptr() for _, s in pairs]),
        table([a.numel() for a, _ in pairs]),
        table(aligned, torch.int32),
        table(tensor_of_program, torch.int32),
        table(chunk_of_program),
    )


# Tables hold nothing but addresses and sizes, so equal keys mean equal tables, whoever owns the
# memory now. A captured graph reads its tables at every replay: those are kept for good.
_CACHE_SIZE = 64
_cache: OrderedDict[object, _Tables] = OrderedDict()
_captured: dict[object, _Tables] = {}


def _tables(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> _Tables:
    key = (device, tuple((a.data_ptr(), s.data_ptr(), a.numel()) for a, s in pairs))
    found = _captured.get(key) or _cache.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is None:
        if capturing:
            raise RuntimeError(
                "swa_fast triton backend: run one update of these tensors before capturing a CUDA "
                "graph; its tables cannot be copied to the device during capture"
            )
        found = _build_tables(pairs, device)
    _cache[key] = found
    _cache.move_to_end(key)
    while len(_cache) > _CACHE_SIZE:
        _cache.popitem(last=False)
    if capturing:
        _captured[key] = found
    return found


def average_(
    averages: list[Tensor], sources: list[Tensor], n_averaged: Tensor, decay: float | None
) -> None:
    """See :func:`swa_fast.reference.average_`. All tensors dense, pairwise of equal strides."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for average, source in zip(averages, sources, strict=True):
        if average.numel() > 0:
            groups.setdefault((average.dtype, source.dtype), []).append((average, source))
    if not groups:
        return
    device = averages[0].device
    n_averaged = n_averaged.to(device)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        for (average_dtype, source_dtype), pairs in groups.items():
            double = torch.float64 in (average_dtype, source_dtype)
            tables = _tables(pairs, device)
            _average_kernel[(tables.tensor_of_program.numel(),)](
                tables.average,
                tables.source,
                tables.numel,
                tables.aligned,
                tables.tensor_of_program,
                tables.chunk_of_program,
                n_averaged,
                0.0 if decay is None else 1.0 - decay,
                AVERAGE=_TRITON_TYPE[average_dtype],
                SOURCE=_TRITON_TYPE[source_dtype],
                MATH=tl.float64 if double else tl.float32,
                EXPONENTIAL=decay is not None,
                PACK=PACK_BYTES,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
