"""The values of tensors set aside while something else is in their place."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import _layout as layout
from . import _ops
from ._memory import distinct
from .engine import Plan, Table, cut

__all__ = ["Block", "Kept", "KeptTables", "all_or_nothing", "put"]

# Bytes from which on larger pages are asked for: malloc maps such memory anew at every call.
_HUGE = 1 << 25
# Bytes up to which memory of the CPU is kept for the next time, because fresh pages take longer
# than all copies. (That of a GPU is kept by torch's allocator, for everybody.)
_KEPT = 1 << 28


class Kept:
    """Tensors that are overwritten, and copies of what they held."""

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self.targets = list(targets)
        self.values = [target.detach().clone() for target in targets]
        # Asked once: for thousands of small tensors it takes longer than copying them.
        self._plain = all(_is_plain(target) and 0 not in target.stride() for target in targets)

    def fill(self, values: Sequence[Tensor]) -> None:
        """Overwrites the tensors, which have to be what they were."""
        if not self._plain:
            put(self.targets, values)
        elif self.targets:
            torch._foreach_copy_(self.targets, list(values))

    def restore(self) -> None:
        """The tensors get the copies' values."""
        self.fill(self.values)


@contextlib.contextmanager
def all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Where the block raises, the module has the same tensors with the same values again. A copy of
    all of them is kept meanwhile."""
    found: list[dict[str, Any]] = []
    for child in module.modules():
        found += [child._parameters, child._buffers]
    # Those of a scripted module only look like dictionaries, and nothing is assigned there.
    dictionaries = [(d, dict(d)) for d in found if isinstance(d, dict)]
    tensors = {id(t): t for d in found for t in d.values() if t is not None and not is_lazy(t)}
    kept = Kept(list(tensors.values()))
    try:
        yield
    except BaseException:
        for dictionary, items in dictionaries:
            dictionary.clear()
            dictionary.update(items)
        with torch.no_grad():
            kept.restore()
        raise


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return strided and not tensor.is_quantized and not tensor.is_inference()


def put(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into tensors, also expanded ones, and those made in inference mode."""
    plain: tuple[list[Tensor], list[Tensor]] = ([], [])
    for target, value in zip(targets, values, strict=True):
        if _is_plain(target):
            if 0 in target.stride():
                target, value = distinct(target, value)
            plain[0].append(target)
            plain[1].append(value)
        else:
            # Leaving inference mode alone would have gradients recorded.
            with torch.inference_mode(target.is_inference()), torch.no_grad():
                target.copy_(value)
    if plain[0]:
        torch._foreach_copy_(*plain)


def _allocate(size: int, device: torch.device) -> Tensor:
    """uint8 [size], not initialised. Fresh memory of a large model comes in pages of 4 KiB, which
    take longer than all copies into it; Linux has larger ones for who asks."""
    large = device.type == "cpu" and size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    if not large:
        return torch.empty(size, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel that was built without them has the small ones.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass
class KeptTables:
    """What three launches read: the sources' values go to memory at ``address``, an average comes
    in their place, and they come back."""

    memory: Tensor | None  # where it is kept for the next time
    address: int
    row: int
    keep: Table
    fill: Table
    restore: Table


class Block:
    """Values of all sources that a plan's swap serves, in one block of memory: one launch sets them
    aside, one puts an average in their place, and one puts them back. Of 24 bytes per fp32 element.

    A launch that is interrupted may be repeated, because none writes what it reads.

    Args:
        plan: of a backend with kernels.
        averages: the average's tensors, one for each slot of the plan.
        row: which average they are.
    """

    def __init__(self, plan: Plan, averages: Sequence[Tensor], row: int) -> None:
        self._plan = plan
        device = plan.marks.device
        sizes = [source.numel() * source.element_size() for source in plan.in_place]
        steps = [-(-size // layout.ROW_ALIGNMENT) * layout.ROW_ALIGNMENT for size in sizes]
        self._starts = [0, *np.cumsum(steps, dtype=np.int64).tolist()]
        size = self._starts[-1] + layout.ROW_ALIGNMENT
        kept = None if plan.kept is None else plan.kept.memory
        memory = _allocate(size, device) if kept is None else kept
        self._memory = memory[-memory.data_ptr() % layout.ROW_ALIGNMENT :]
        address = self._memory.data_ptr()
        if plan.kept is None or (plan.kept.address, plan.kept.row) != (address, row):
            own = [source.data_ptr() for source in plan.in_place]
            others = [averages[i].data_ptr() for i in plan.swapped]
            there = [address + start for start in self._starts[:-1]]
            plan.kept = KeptTables(
                memory if device.type == "cpu" and size <= _KEPT else None,
                address,
                row,
                self._table(own, there, sizes),
                self._table(others, own, sizes),
                self._table(there, own, sizes),
            )
        self._tables = plan.kept
        self._nothing = torch.zeros(1, dtype=torch.int64, device=device)
        where = device if plan.backend == "triton" else "cpu"
        self._rules = torch.zeros(1, layout.RULE_COLUMNS, dtype=torch.float64, device=where)
        self._launch(self._tables.keep)

    def _table(self, sources: list[int], targets: list[int], sizes: list[int]) -> Table:
        """Copies bytes between addresses."""
        rows = np.zeros((len(sizes), layout.SEGMENT_HEADER + 1 + 3), dtype=np.int64)
        rows[:, layout.SOURCE], rows[:, layout.SEGMENT_HEADER] = sources, targets
        packed = layout.BYTES << layout.AVERAGE_TYPE | layout.BYTES << layout.SOURCE_TYPE
        rows[:, layout.PACKED] = packed | 1 << layout.COPIED
        rows[:, -3:] = np.array([sizes, [1] * len(sizes), [1] * len(sizes)]).T
        cut_rows, short = cut(rows[rows[:, -3] > 0], self._plan.backend)
        words = torch.from_numpy(cut_rows)
        if self._plan.marks.is_cuda:
            # Nobody waits for a copy out of pinned memory.
            words = words.pin_memory().to(self._plan.marks.device, non_blocking=True)
        return Table(words, 0, short)

    def _launch(self, table: Table) -> None:
        if len(table) > 0:
            _ops.update_(
                self._plan.backend, [], [], self._nothing, None, self._rules, table.words,
                table.pairs, None, False, table.short,
            )  # fmt: skip

    def fill(self) -> None:
        """The sources get the average's values."""
        self._launch(self._tables.fill)
        torch.autograd.graph.increment_version(self._plan.in_place)

    def restore(self) -> None:
        """The sources get the values that were set aside."""
        self._launch(self._tables.restore)
        torch.autograd.graph.increment_version(self._plan.in_place)

    def values(self) -> list[Tensor]:
        """What was set aside, for each of ``plan.swapped``."""
        return [
            self._memory[start : start + source.numel() * source.element_size()]
            .view(source.dtype)
            .as_strided(source.shape, source.stride())
            for start, source in zip(self._starts[:-1], self._plan.in_place, strict=True)
        ]
