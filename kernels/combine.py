"""Triton kernel of ``swa_fast::combine_``: K weighted sums of r rows.

Formula: :func:`swa_fast.reference.combine_`. Layout: every row is consecutive; a program serves
``BLOCK`` elements of all rows. Bytes per element: 4 r + 4 K for fp32, bound by memory bandwidth: a
program reads its part of the sources again for every output, from the first-level cache, where r
times 4 KiB lie.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .update import on_device
from .weights import INTERPRETED

__all__ = ["combine_"]

BLOCK = 1024
NUM_WARPS = 4
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _combine_kernel(
    addresses_ptr,  # int64 [sources + outputs]
    coefficients_ptr,  # fp64 [outputs, sources]
    sources,
    outputs,
    count,
    SOURCE: tl.constexpr,
    OUTPUT: tl.constexpr,
    MATH: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < count
    for k in range(outputs):
        # A product is a multiply-add to a zero that leaves its sign alone.
        total = tl.full([BLOCK], -0.0, MATH)
        for j in range(sources):
            source_ptr = tl.load(addresses_ptr + j).to(tl.pointer_type(SOURCE))
            if ALIGNED:
                source_ptr = tl.multiple_of(source_ptr, 16)
            x = tl.load(source_ptr + element, mask=mask, other=0).to(MATH)
            factor = tl.load(coefficients_ptr + k * sources + j).to(MATH)
            total = tl.fma(tl.zeros_like(x) + factor, x, total)
        output_ptr = tl.load(addresses_ptr + sources + k).to(tl.pointer_type(OUTPUT))
        if ALIGNED:
            output_ptr = tl.multiple_of(output_ptr, 16)
        if INTERPRETED and MATH == tl.float64 and OUTPUT == tl.bfloat16:  # noqa: SIM300
            # The interpreter makes no bfloat16 of fp64.
            tl.store(output_ptr + element, total.to(tl.float32).to(OUTPUT), mask=mask)
        else:
            tl.store(output_ptr + element, total.to(OUTPUT), mask=mask)


def _by_dtype(outputs: list[Tensor]) -> Iterator[tuple[torch.dtype, list[int]]]:
    for dtype in dict.fromkeys(output.dtype for output in outputs):
        yield dtype, [k for k, output in enumerate(outputs) if output.dtype == dtype]


def combine_(
    outputs: list[Tensor],
    sources: list[Tensor],
    coefficients: Tensor,
    double_precision: bool = False,
) -> None:
    """One launch, or one for each dtype of outputs. Sources of several dtypes are converted
    first."""
    device, count = outputs[0].device, outputs[0].numel()
    rows = [*outputs, *sources]
    wide = double_precision or any(row.dtype == torch.float64 for row in rows)
    math = torch.float64 if wide else torch.float32
    if len({source.dtype for source in sources}) > 1:
        sources = [source.to(math) for source in sources]
    if count == 0:
        return
    for dtype, chosen in _by_dtype(outputs):
        own = [*sources, *(outputs[k] for k in chosen)]
        words = torch.tensor([row.data_ptr() for row in own], dtype=torch.int64)
        # Addresses and coefficients travel together, and nobody waits for them.
        table = torch.cat((words, coefficients[chosen].reshape(-1).view(torch.int64)))
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        with on_device(device):
            _combine_kernel[(triton.cdiv(count, BLOCK),)](
                table,
                table[len(own) :].view(torch.float64),
                len(sources),
                len(chosen),
                count,
                _TYPES[sources[0].dtype],
                _TYPES[dtype],
                _TYPES[math],
                all(row.data_ptr() % 16 == 0 for row in own),
                BLOCK,
                num_warps=NUM_WARPS,
            )
