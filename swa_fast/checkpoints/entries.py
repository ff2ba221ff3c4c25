"""Tensors in files: where their elements lie, and how they are read without a copy of the whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

__all__ = ["Boxes", "Checkpoint", "Contiguous", "Entry", "InMemory", "Run", "bytes_of"]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


# (file, byte offset, bytes): consecutive in the tensor and in the file.
Run = tuple[Path, int, int]


@dataclass(frozen=True)
class Contiguous:
    """A tensor whose elements follow each other in one file."""

    file: Path
    offset: int

    def runs(self, first: int, end: int) -> Iterator[Run]:
        yield self.file, self.offset + first, end - first


@dataclass(frozen=True)
class Boxes:
    """A tensor in rectangular parts, each with its elements one after the other, as sharded saves
    leave it. ``parts``: (file, byte offset, first index, sizes)."""

    shape: tuple[int, ...]
    itemsize: int
    parts: Sequence[tuple[Path, int, tuple[int, ...], tuple[int, ...]]]

    def runs(self, first: int, end: int) -> Iterator[Run]:
        """Of the bytes from ``first`` to ``end``, in their order."""
        found = [run for part in self.parts for run in self._of_part(part, first, end)]
        at = first
        for begin, file, offset, size in sorted(found, key=lambda run: run[0]):
            if begin != at:
                raise CheckpointError(f"{file}: parts of a tensor overlap or leave a hole")
            at += size
            yield file, offset, size

    def _of_part(
        self,
        part: tuple[Path, int, tuple[int, ...], tuple[int, ...]],
        first: int,
        end: int,
    ) -> Iterator[tuple[int, Path, int, int]]:
        file, offset, origin, sizes = part
        # The innermost dimensions that the part holds whole, and one more, lie together.
        inner = len(self.shape)
        while inner > 0 and sizes[inner - 1] == self.shape[inner - 1]:
            inner -= 1
        outer = max(inner - 1, 0)
        length = math.prod(sizes[outer:]) * self.itemsize
        strides = [math.prod(self.shape[d + 1 :]) * self.itemsize for d in range(len(self.shape))]
        base = sum(o * s for o, s in zip(origin, strides, strict=True))

        def start(number: int) -> int:
            place = base
            for d in range(outer - 1, -1, -1):
                number, index = divmod(number, sizes[d])
                place += index * strides[d]
            return place

        count = math.prod(sizes[:outer]) if length else 0
        # Starts grow with the number: the first run that ends after `first`.
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if start(middle) + length > first else (middle + 1, high)
        for number in range(low, count):
            begin = start(number)
            if begin >= end:
                return
            cut, stop = max(begin, first), min(begin + length, end)
            yield cut, file, offset + number * length + cut - begin, stop - cut


@dataclass
class InMemory:
    """A tensor that has to be made as a whole: ``make`` gives it, contiguous."""

    make: Callable[[], Tensor]
    _kept: Tensor | None = None

    def read(self, first: int, out: memoryview) -> None:
        if self._kept is None:
            self._kept = self.make().contiguous()
        out[:] = bytes_of(self._kept)[first : first + len(out)]

    def forget(self) -> None:
        self._kept = None


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    ``shares``: equal for tensors that are one in the file; None where it cannot be told.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Contiguous | Boxes | InMemory
    shares: object = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Files:
    """Open files by path, read without moving a position, so by several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        descriptor, done = self.descriptor(path), 0
        while done < len(out):
            count = os.preadv(descriptor, [out[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{path}: expected {offset + len(out)} bytes or more, found {offset + done}: "
                    "the file is truncated"
                )
            done += count

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


@dataclass
class Checkpoint:
    """The tensors of a checkpoint on disk; a context manager that closes its files.

    Attributes:
        path: what was opened.
        kind: ``safetensors``, ``torch`` or ``dcp``.
        entries: tensors by name, in the order of the files.
        files: everything that it consists of.
        metadata: text beside the tensors (``__metadata__`` of safetensors).
        left_out: names of what was not a tensor.
    """

    path: Path
    kind: str
    entries: dict[str, Entry]
    files: list[Path]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    # Called with (file, offset, bytes) for everything that is read.
    watcher: Callable[[Path, int, memoryview], None] | None = None
    _files: _Files = field(default_factory=_Files)

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self.entries)

    def read_into(self, name: str, offset: int, buffer: Any) -> None:
        """Reads consecutive elements of a tensor, in row-major order.

        Args:
            name: of the tensor.
            offset: number of the first element.
            buffer: writable and contiguous: filled with as many elements as it has room for.

        Raises:
            CheckpointError: the file ends before, or the tensor does.
            KeyError: there is no tensor of that name.
        """
        entry = self.entries[name]
        out = memoryview(buffer).cast("B")
        first = offset * entry.dtype.itemsize
        if first < 0 or first + len(out) > entry.nbytes:
            raise CheckpointError(
                f"{self.path}: {name} has {entry.numel} elements, asked for {offset} to "
                f"{offset + len(out) // entry.dtype.itemsize}"
            )
        if isinstance(entry.place, InMemory):
            entry.place.read(first, out)
            if first + len(out) == entry.nbytes:
                entry.place.forget()
            return
        done = 0
        for file, at, size in entry.place.runs(first, first + len(out)):
            piece = out[done : done + size]
            self._files.read(file, at, piece)
            if self.watcher is not None:
                self.watcher(file, at, piece)
            done += size
        if done != len(out):
            raise CheckpointError(
                f"{self.path}: {name} is incomplete, {len(out) - done} bytes are in none of its "
                "parts"
            )

    def read_file(self, path: Path, offset: int, out: memoryview) -> None:
        """Reads bytes of one of the checkpoint's files as they are."""
        self._files.read(path, offset, out)

    def read(self, name: str) -> Tensor:
        """A tensor as a whole."""
        entry = self.entries[name]
        result = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            self.read_into(name, 0, bytes_of(result))
        return result

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
