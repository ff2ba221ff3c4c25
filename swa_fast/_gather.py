"""Tensors of a GPU, brought to the CPU together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ops
from ._memory import Slot, allocate, averages_in, bytes_of
from .engine import Engine, Plan
from .rules import SWA

__all__ = ["CHUNK", "Gather", "gather_from_gpus"]

#: Bytes of the buffer on the GPU, unless one tensor alone is larger.
CHUNK = 256 << 20


class Gather:
    """Copies of a GPU's tensors in pinned memory of the CPU.

    One launch collects them in a buffer beside them, and one copy takes the buffer's contents over;
    so do two for every further :data:`CHUNK` bytes. The host waits once, at the end. Tensor by
    tensor it would wait as often as there are tensors.

    Args:
        tensors: dense ones on one CUDA device, read where they lie now.

    Attributes:
        copies: one for each tensor, of its shape, dtype and strides.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device
        self.copies: list[Tensor] = []
        chunks: list[list[Tensor]] = [[]]
        filled = 0
        for tensor in tensors:
            size = bytes_of([self._slot(tensor)])
            if chunks[-1] and filled + size > CHUNK:
                chunks.append([])
                filled = 0
            chunks[-1].append(tensor)
            filled += size
        slots = [[self._slot(tensor) for tensor in chunk] for chunk in chunks]
        # By chunk: each type's elements lie together, which fills up to a line at their ends.
        sizes = [bytes_of(of_chunk) for of_chunk in slots]
        buffer = torch.empty(max(sizes), dtype=torch.uint8, device=self.device)
        try:
            memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # more than may be pinned: the copies are slower then
            memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        self._chunks: list[tuple[Engine, Plan, Tensor, Tensor]] = []
        for chunk, of_chunk, size, target in zip(
            chunks, slots, sizes, memory.split(sizes), strict=True
        ):
            views = averages_in(of_chunk, allocate(of_chunk, 1, self.device, buffer[:size]))
            engine = Engine(of_chunk, views, [SWA()], self.device)
            self._chunks.append((engine, engine.plan(chunk), buffer[:size], target))
            for slot, view in zip(of_chunk, views[0], strict=True):
                start = view.data_ptr() - buffer.data_ptr()
                there = target[start : start + slot.numel * slot.dtype.itemsize]
                self.copies.append(there.view(slot.dtype).as_strided(slot.shape, slot.stride))

    @staticmethod
    def _slot(tensor: Tensor) -> Slot:
        return Slot("", False, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def __call__(self) -> None:
        """Copies the tensors' present values."""
        for engine, plan, gathered, target in self._chunks:
            engine.update(plan)
            target.copy_(gathered, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()


def gather_from_gpus(
    averages: Engine, sources: Sequence[Tensor]
) -> tuple[list[Gather], dict[int, Tensor]]:
    """For averages on the CPU: what brings their sources from each GPU, and by slot the copies.
    Sources that the averages could not read as they are, for their layout, are in neither."""
    by_device: dict[torch.device, list[int]] = {}
    for index, (slot, source) in enumerate(zip(averages.slots, sources, strict=True)):
        if (
            source.device.type == "cuda"
            and source.layout == torch.strided
            and (slot.averaged or slot.dtype == source.dtype)
            and not source.is_conj()
            and not source.is_neg()
            and _ops.same_dense_layout(averages.averages[0][index], source)
        ):
            by_device.setdefault(source.device, []).append(index)
    gathers: list[Gather] = []
    copies: dict[int, Tensor] = {}
    for members in by_device.values():
        try:
            gather = Gather([sources[i].detach() for i in members])
        except torch.cuda.OutOfMemoryError:  # no room for the buffer: tensor by tensor
            continue
        gathers.append(gather)
        copies.update(zip(members, gather.copies, strict=True))
    return gathers, copies
