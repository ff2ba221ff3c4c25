"""Weighted sums of checkpoints, a chunk at a time.

A block is as many elements as the buffers hold. While one block is summed up and written, the next
is read and hashed by other threads.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import _ops
from .entries import Checkpoint, bytes_of
from .output import Output

__all__ = ["ALIGNMENT", "Digest", "Stream", "anonymous_bytes"]

ALIGNMENT = 64  # of a tensor's part in a buffer
_CHUNK = 1 << 20  # bytes of a buffer where there is room: it stays in a core's cache
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64,
         torch.complex32: torch.float16}  # fmt: skip


def anonymous_bytes() -> int:
    """The memory of this process that no file backs (RssAnon); 0 where it cannot be told."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


class Digest:
    """SHA-256 of a file from what is read of it anyway. What was passed over is read again."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self._checkpoint, self._path = checkpoint, path
        self._hash = hashlib.sha256()
        self._done = 0

    def feed(self, offset: int, content: memoryview) -> None:
        """Bytes that were read at ``offset``."""
        end = offset + len(content)
        if end <= self._done:
            return
        self._read_to(offset)
        self._hash.update(content[self._done - offset :])
        self._done = end

    def _read_to(self, end: int) -> None:
        while self._done < end:
            piece = memoryview(bytearray(min(_CHUNK, end - self._done)))
            self._checkpoint.read_file(self._path, self._done, piece)
            self._hash.update(piece)
            self._done += len(piece)

    def finish(self) -> str:
        """The digest of the whole file."""
        self._read_to(os.path.getsize(self._path))
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Part:
    """Elements ``first`` to ``end`` of a tensor, the same in all checkpoints."""

    name: str
    first: int
    end: int
    at: int  # element of the buffers


@dataclass
class _Buffers:
    """One block of every checkpoint."""

    bytes: list[Tensor]
    views: list[memoryview] = field(init=False)

    def __post_init__(self) -> None:
        self.views = [bytes_of(buffer) for buffer in self.bytes]


@dataclass
class Stream:
    """Sums up checkpoints that have the same tensors, by name and shape.

    Attributes:
        checkpoints: r of them.
        names: of the floating-point and complex tensors to sum up, in the order to read them.
        coefficients: float64 [K, r].
        dtypes: of the outputs' tensors by name.
        double_precision: sum in float64.
        memory: most bytes of all buffers.
        chunk: bytes of a buffer, at least one element is read; None chooses by ``memory``.
        threads: that read and hash.
        checksums: hash all files.
        advance: called with bytes that were read.
    """

    checkpoints: Sequence[Checkpoint]
    names: Sequence[str]
    coefficients: Tensor
    dtypes: dict[str, torch.dtype]
    double_precision: bool = True
    memory: int = 32 << 20
    chunk: int | None = None
    threads: int | None = None
    checksums: bool = True
    advance: Callable[[int], object] = lambda count: None
    peak: int = 0

    def __post_init__(self) -> None:
        self._backend = _ops.combine_backend(torch.device("cpu"))
        r, k = len(self.checkpoints), len(self.coefficients)
        size = self.chunk
        if size is None:
            size = max(4096, min(_CHUNK, self.memory // (2 * r + k)))
        self.chunk = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        self._asked = max(size, 1)
        self._sampled = 0.0
        self._digests: dict[tuple[int, Path], Digest] = {}

    def blocks(self) -> Iterator[list[Part]]:
        """The tensors cut and grouped into what the buffers hold."""
        assert self.chunk is not None
        block: list[Part] = []
        used = 0  # bytes of a buffer, of the widest dtype that a tensor has anywhere
        for name in self.names:
            entry = self.checkpoints[0].entries[name]
            widest = max(c.entries[name].dtype.itemsize for c in self.checkpoints)
            widest = max(widest, self.dtypes[name].itemsize)
            first = 0
            while first < entry.numel:
                room = (min(self._asked, self.chunk) - used) // widest
                if room < 1 and block:
                    yield block
                    block, used = [], 0
                    continue
                count = min(max(room, 1), entry.numel - first)
                block.append(Part(name, first, first + count, used))
                used += -(-count * widest // ALIGNMENT) * ALIGNMENT
                first += count
        if block:
            yield block

    def run(self, outputs: Sequence[Output]) -> dict[Path, str]:
        """Reads all, writes K outputs, and gives the SHA-256 of every file that was read."""
        assert self.chunk is not None
        if self.checksums:
            for number, checkpoint in enumerate(self.checkpoints):
                for file in checkpoint.files:
                    self._digests[number, file] = Digest(checkpoint, file)
                checkpoint.watcher = self._watcher(number)
        # Room for an element of any type.
        size = self.chunk + ALIGNMENT
        sets = [
            _Buffers([torch.empty(size, dtype=torch.uint8) for _ in self.checkpoints])
            for _ in range(2)
        ]
        results = [torch.empty(size, dtype=torch.uint8) for _ in self.coefficients]
        views = [bytes_of(result) for result in results]
        # Hashing is what takes long: a task for each checkpoint. Reading alone is one task, since
        # threads that only copy wait for the interpreter's lock.
        numbers = range(len(self.checkpoints))
        tasks = [[n] for n in numbers] if self.checksums else [list(numbers)]
        threads = self.threads or min(len(tasks), len(os.sched_getaffinity(0)))
        pool = ThreadPoolExecutor(threads, "swa_fast-read")
        try:
            waiting: list[Future[None]] = []
            previous: list[Part] = []
            for number, block in enumerate(self.blocks()):
                for future in waiting:
                    future.result()
                buffers = sets[number % 2]
                waiting = [pool.submit(self._read, task, block, buffers) for task in tasks]
                if previous:
                    self._sum(previous, sets[1 - number % 2], results, views, outputs)
                previous = block
                last = buffers
            for future in waiting:
                future.result()
            if previous:
                self._sum(previous, last, results, views, outputs)
            digests = list(pool.map(lambda item: item[1].finish(), self._digests.items()))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for checkpoint in self.checkpoints:
                checkpoint.watcher = None
        return {path: digest for (_, path), digest in zip(self._digests, digests, strict=True)}

    def _watcher(self, number: int) -> Callable[[Path, int, memoryview], None]:
        def watch(path: Path, offset: int, content: memoryview) -> None:
            self._digests[number, path].feed(offset, content)

        return watch

    def _read(self, numbers: Sequence[int], block: Sequence[Part], buffers: _Buffers) -> None:
        for number in numbers:
            checkpoint, view = self.checkpoints[number], buffers.views[number]
            for part in block:
                size = checkpoint.entries[part.name].dtype.itemsize
                length = (part.end - part.first) * size
                checkpoint.read_into(part.name, part.first, view[part.at : part.at + length])

    def _sum(
        self,
        block: Sequence[Part],
        buffers: _Buffers,
        results: Sequence[Tensor],
        views: Sequence[memoryview],
        outputs: Sequence[Output],
    ) -> None:
        combine = getattr(torch.ops.swa_fast.combine_, self._backend)
        done = 0
        for part in block:
            count = part.end - part.first
            sources = []
            for checkpoint, buffer in zip(self.checkpoints, buffers.bytes, strict=True):
                sources.append(
                    _numbers(buffer, part.at, count, checkpoint.entries[part.name].dtype)
                )
                done += sources[-1].nbytes
            dtype = self.dtypes[part.name]
            sums = [_numbers(result, part.at, count, dtype) for result in results]
            combine(sums, sources, self.coefficients, self.double_precision)
            length = count * dtype.itemsize
            for view, output in zip(views, outputs, strict=True):
                content = view[part.at : part.at + length]
                output.write(part.name, part.first * dtype.itemsize, content)
        self.advance(done)
        if (now := time.monotonic()) > self._sampled + 0.05:
            self._sampled = now
            self.peak = max(self.peak, anonymous_bytes())


def _numbers(buffer: Tensor, at: int, count: int, dtype: torch.dtype) -> Tensor:
    """Elements in a buffer; complex ones as twice as many reals."""
    return buffer[at : at + count * dtype.itemsize].view(_REAL.get(dtype, dtype))
