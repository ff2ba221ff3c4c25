"""Where averages lie: tensors of an average, the memory that they share, and what is asked of
memory before it is read by address."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import _layout as layout
from . import _ops

__all__ = [
    "FlatMemory",
    "SeparateMemory",
    "Slot",
    "allocate",
    "average_dtype",
    "averages_in",
    "bytes_of",
    "dense_strides",
    "distinct",
    "flat_of",
    "is_plain",
    "overlapping",
    "places_in",
    "reals",
    "tensors_in",
    "together",
]


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a gapless tensor with the shape and the order of dimensions of ``tensor``."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


def average_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Of the average of ``tensor`` where ``dtype`` is asked for; None: the tensor's own."""
    converts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return dtype if converts and dtype is not None else tensor.dtype


@dataclass(frozen=True)
class Slot:
    """One tensor of an average."""

    name: str
    averaged: bool  # by the rule; else copied at every update
    dtype: torch.dtype  # of the average
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # dense
    group: int = 0  # of those that follow the same rules

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def places_in(slots: Sequence[Slot]) -> tuple[list[int], dict[torch.dtype, int]]:
    """The first element of each slot in a row of its dtype, and the length of each such row."""
    places = []
    ends: dict[torch.dtype, int] = {}
    for slot in slots:
        places.append(ends.get(slot.dtype, 0))
        step = layout.ROW_ALIGNMENT // slot.dtype.itemsize
        ends[slot.dtype] = places[-1] + -(-slot.numel // step) * step
    # A row of nothing has an address all the same.
    return places, {t: max(end, layout.ROW_ALIGNMENT // t.itemsize) for t, end in ends.items()}


def bytes_of(slots: Sequence[Slot]) -> int:
    """The size of one average's memory as :func:`allocate` lays it out."""
    return sum(dtype.itemsize * end for dtype, end in places_in(slots)[1].items())


def allocate(
    slots: Sequence[Slot], rows: int, device: torch.device, buffer: Tensor | None = None
) -> list[Tensor]:
    """Memory that the averages of many tensors share.

    Args:
        slots: the tensors of an average.
        rows: how many averages.
        device: where.
        buffer: uint8 [rows * :func:`bytes_of`], aligned to 128 bytes, to be cut; None allocates.

    Returns:
        For each dtype one tensor of shape [rows, elements], its rows aligned to 128 bytes; zeros
        without ``buffer``.
    """
    memory = []
    for dtype, end in places_in(slots)[1].items():
        size, spare = rows * end, layout.ROW_ALIGNMENT // dtype.itemsize
        if buffer is None:
            own = torch.zeros(size + spare, dtype=dtype, device=device)
            own = own[-own.data_ptr() % layout.ROW_ALIGNMENT // dtype.itemsize :]
        else:
            own = buffer[: size * dtype.itemsize].view(dtype)
            buffer = buffer[size * dtype.itemsize :]
        memory.append(own[:size].view(rows, -1))
    return memory


def averages_in(slots: Sequence[Slot], memory: Sequence[Tensor]) -> list[list[Tensor]]:
    """The averages in memory laid out by :func:`allocate`: a list for each row, of views with the
    shapes and strides of the slots."""
    return [
        [
            base.as_strided(slot.shape, slot.stride, base.storage_offset() + start)
            for slot, base, start in row
        ]
        for row in _rows(slots, memory)
    ]


def _rows(
    slots: Sequence[Slot], memory: Sequence[Tensor]
) -> Iterator[Iterator[tuple[Slot, Tensor, int]]]:
    """For each row and slot, the memory of its dtype and the slot's first element there."""
    places, _ = places_in(slots)
    by_dtype = {tensor.dtype: tensor for tensor in memory}
    for row in range(len(memory[0]) if memory else 0):
        yield (
            (slot, by_dtype[slot.dtype], row * by_dtype[slot.dtype].shape[1] + place)
            for slot, place in zip(slots, places, strict=True)
        )


def tensors_in(slots: Sequence[Slot], memory: Sequence[Tensor]) -> list[list[Tensor]]:
    """As :func:`averages_in`, in tensors with storages of their own, each as long as its tensor: so
    they are saved, copied and shared as what they are. They share the memory's version counter."""
    result: list[list[Tensor]] = []
    for row in _rows(slots, memory):
        tensors = []
        for slot, base, start in row:
            size = slot.dtype.itemsize
            first = (base.storage_offset() + start) * size
            storage = base.untyped_storage()[first : first + slot.numel * size]
            tensors.append(base.detach().set_(storage, 0, slot.shape, slot.stride))
        result.append(tensors)
    return result


def flat_of(tensor: Tensor) -> Tensor:
    """A dense tensor's memory as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def reals(tensor: Tensor) -> Tensor:
    """One-dimensional complex memory as twice as many reals."""
    return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Indices of tensors whose stretches of memory meet another one's, or their own."""
    extents = []
    found = set()
    for i, tensor in enumerate(tensors):
        if tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        extents.append((start, start + (last + 1) * tensor.element_size(), i))
        if last + 1 < tensor.numel():
            found.add(i)
    extents.sort()
    furthest, of = 0, -1
    for start, end, i in extents:
        if start < furthest:
            found |= {i, of}
        if end > furthest:
            furthest, of = end, i
    return found


def distinct(target: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both without what is repeated in the memory of ``target`` because it was expanded."""
    for dim, (step, size) in enumerate(zip(target.stride(), target.shape, strict=True)):
        if step == 0 and size > 1:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    return target, value


def is_plain(tensor: Tensor) -> bool:
    """Gapless, and holding the values that its memory holds."""
    plain = tensor.is_contiguous() or _ops.same_dense_layout(tensor, tensor)
    return plain and not tensor.is_conj() and not tensor.is_neg()


_Where = TypeVar("_Where", bound=Hashable)


def together(places: Iterable[_Where]) -> dict[_Where, list[int]]:
    """The indices of equal places."""
    members: dict[_Where, list[int]] = {}
    for i, place in enumerate(places):
        members.setdefault(place, []).append(i)
    return members


class SeparateMemory:
    """Averages in tensors that somebody else may move or replace: the memory is the averages.

    Attributes:
        tensors: what version counters and compilers know of.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]]) -> None:
        self._slots = len(averages[0]) if averages else 0
        self.tensors = [tensor for row in averages for tensor in row]

    def averages(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The averages in these tensors, or in others that stand for them."""
        n = self._slots
        return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)] if n else []


class FlatMemory:
    """Several averages, in one tensor of shape [averages, elements] for each device and dtype: one
    allocation and one version counter for all of them.

    Args:
        slots: the tensors of an average.
        devices: where each of them lives.
        rows: how many averages.
    """

    def __init__(self, slots: Sequence[Slot], devices: Sequence[torch.device], rows: int) -> None:
        self._slots = slots
        self._members = together(devices)
        self._rows = rows
        self.tensors: list[Tensor] = []
        self._parts: list[int] = []  # how many of the tensors are a device's
        for device, members in self._members.items():
            memory = allocate([slots[i] for i in members], rows, device)
            self.tensors += memory
            self._parts.append(len(memory))

    def averages(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The averages in these tensors, or in others that stand for them, as views."""
        return self._collect(tensors, averages_in)

    def own(self) -> list[list[Tensor]]:
        """The averages, each tensor with a storage of its own length."""
        return self._collect(self.tensors, tensors_in)

    def _collect(self, tensors: Sequence[Tensor], cut: Any) -> list[list[Tensor]]:
        rest = iter(tensors)
        result: list[list[Tensor]] = [
            [torch.empty(0)] * len(self._slots) for _ in range(self._rows)
        ]
        for members, count in zip(self._members.values(), self._parts, strict=True):
            memory = [next(rest) for _ in range(count)]
            rows = cut([self._slots[i] for i in members], memory)
            for row, views in zip(result, rows, strict=True):
                for i, view in zip(members, views, strict=True):
                    row[i] = view
        return result
