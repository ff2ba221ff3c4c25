"""Averages in flat storage, updated by one launch per device. Knows tensors and rules, not modules.

Storage of one device: for each dtype one tensor of shape [averages, elements]. Every tensor of a
model has a segment at the same place in each row, aligned to 128 bytes.

Sources are read where they are, through a table of runs (csrc/update.h) that holds their addresses
and is rebuilt when a :class:`Watch` finds that one of them moved.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _backends, _ops
from .rules import AveragingFunction, Rule, rule_row

if TYPE_CHECKING:
    from ._gather import Gather

__all__ = ["MAX_AVERAGES", "FlatAverages", "Slot", "Watch", "bytes_of", "dense_strides"]

MAX_AVERAGES = 16  # kMaxAverages in csrc/update.h
ALIGNMENT = 128
STATE_SLOTS = 3  # behind the counters of the averages: ticket, non-finite, skipped updates

_TYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_BYTES = 4  # type code of a run that is copied unchanged
_COPIED = 1 << 48
_REAL = {
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
    torch.complex32: torch.float16,
}

# Most elements of a run; the CPU's threads cut runs by themselves. On a GPU a block or program
# takes a run, in CUDA of as many bytes of the larger type as its threads load at once.
_RUN_ELEMENTS = {"triton": 4096, "cpu": 1 << 30, "reference": 1 << 30}
_CUDA_RUN_BYTES = 16384
# Such a run is short: one warp loads it at once, and it comes last in the table.
_CUDA_SHORT_BYTES = 2048


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a gapless tensor with the shape and the order of dimensions of ``tensor``."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


@dataclass(frozen=True)
class Slot:
    """One tensor of an average."""

    name: str
    averaged: bool  # by the rule; else copied at every update
    dtype: torch.dtype  # of the average
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # dense

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Watch:
    """Notices when tensors move or change type, or module dictionaries change their contents.

    Args:
        tensors: held by reference, so that an assignment to ``.data`` is seen.
        dictionaries: such as the ``_parameters`` of modules.
    """

    def __init__(self, tensors: Sequence[Tensor], dictionaries: Iterable[dict[str, Any]]) -> None:
        self._dictionaries = tuple(
            (d, tuple(itertools.chain.from_iterable(d.items()))) for d in dictionaries
        )
        self._extension = _backends.cpu_library()
        if self._extension is not None:
            self._id = torch.ops.swa_fast.watch(list(tensors))
            self._contents = self._extension.contents(self._dictionaries)
            weakref.finalize(self, self._extension.forget, self._id)
        else:
            self._facts = [(t, self._look(t)) for t in tensors]

    @staticmethod
    def _look(tensor: Tensor) -> tuple[object, ...]:
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    def holds(self) -> bool:
        """True while nothing has changed."""
        if self._extension is not None:
            held: bool = self._extension.unchanged(self._id, self._contents)
            return held
        # By identity, because tensors compare elementwise.
        return all(self._look(t) == facts for t, facts in self._facts) and all(
            2 * len(d) == len(items)
            and all(
                a is b for a, b in zip(itertools.chain.from_iterable(d.items()), items, strict=True)
            )
            for d, items in self._dictionaries
        )

    @staticmethod
    def dictionaries_of(module: nn.Module) -> Iterator[dict[str, Any]]:
        """Where the modules of a tree keep their parameters, buffers and children."""
        for child in module.modules():
            yield from (child._parameters, child._buffers, child._modules)


def _places(slots: Sequence[Slot]) -> tuple[list[int], dict[torch.dtype, int]]:
    """The first element of each slot in a row of its dtype, and the length of each such row."""
    places = []
    ends: dict[torch.dtype, int] = {}
    for slot in slots:
        places.append(ends.get(slot.dtype, 0))
        step = ALIGNMENT // slot.dtype.itemsize
        ends[slot.dtype] = places[-1] + -(-slot.numel // step) * step
    # A row of nothing has an address all the same.
    return places, {t: max(end, ALIGNMENT // t.itemsize) for t, end in ends.items()}


def bytes_of(slots: Sequence[Slot]) -> int:
    """Of one average."""
    return sum(dtype.itemsize * end for dtype, end in _places(slots)[1].items())


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's memory as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _reals(tensor: Tensor) -> Tensor:
    """One-dimensional complex memory as twice as many reals."""
    return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor


class FlatAverages:
    """The averages of tensors that live on one device.

    Args:
        slots: the tensors of an average.
        rules: one for each average, at most :data:`MAX_AVERAGES`.
        device: where the averages live.
        backend: a name of ``BACKENDS``, or None to choose by device.
        seed: for stochastic rounding of bfloat16 averages; None rounds to nearest.
        guard: skip an update whose averaged sources hold an infinity or NaN.
        memory: uint8 [averages * :func:`bytes_of`], aligned to 128 bytes, that the averages are put
            into; None allocates.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        rules: Sequence[Rule],
        device: torch.device,
        *,
        backend: str | None = None,
        seed: int | None = None,
        guard: bool = False,
        memory: Tensor | None = None,
    ) -> None:
        self.slots = tuple(slots)
        self.device = device
        self._requested = backend
        self.seed = seed
        self.guard = guard
        self.functions: dict[int, AveragingFunction] = {
            row: rule for row, rule in enumerate(rules) if callable(rule)
        }

        self.places, ends = _places(self.slots)
        self.flats: dict[torch.dtype, Tensor] = {}
        for dtype, end in ends.items():
            size = len(rules) * end
            if memory is None:
                own = torch.zeros(size + ALIGNMENT // dtype.itemsize, dtype=dtype, device=device)
                own = own[-own.data_ptr() % ALIGNMENT // dtype.itemsize :]
            else:
                own = memory[: size * dtype.itemsize].view(dtype)
                memory = memory[size * dtype.itemsize :]
            self.flats[dtype] = own[:size].view(len(rules), -1)
        self.rows = list(self.flats.values())
        self.state = torch.zeros(len(rules) + STATE_SLOTS, dtype=torch.int64, device=device)
        self._host_rules = torch.tensor([rule_row(rule) for rule in rules], dtype=torch.float64)
        self._table = torch.empty((0, 4), dtype=torch.int64)
        self._exchange_table = self._table
        self._short_runs = self._exchange_short_runs = 0
        self._sources: list[Tensor] = []
        self._exchange_sources: list[Tensor] = []
        self._in_place: list[Tensor] = []
        self._others: list[int] = []
        self._staged: list[tuple[Tensor, Tensor]] = []
        self._gathers: list[Gather] = []
        self._captured: list[object] = []

    @property
    def n_averaged(self) -> Tensor:
        """int64 [averages], updates done, on the device; writing to it takes effect."""
        return self.state[:-STATE_SLOTS]

    @property
    def skipped(self) -> Tensor:
        """int64 scalar on the device: updates that the guard skipped."""
        return self.state[-1]

    def view(self, row: int, index: int) -> Tensor:
        """The tensor of slot ``index`` in average ``row``."""
        slot = self.slots[index]
        memory = self.flats[slot.dtype][row]
        place = memory.storage_offset() + self.places[index]
        return memory.as_strided(slot.shape, slot.stride, place)

    def _unsupported(self, slot: Slot, source: Tensor) -> str | None:
        for role, dtype in (("average", slot.dtype), ("source", source.dtype)):
            if _REAL.get(dtype, dtype) not in _TYPE_CODE:
                found = str(dtype).removeprefix("torch.")
                return (
                    f"{slot.name}: the {role} has dtype {found}, expected float32, float64, "
                    "bfloat16, float16 or complex"
                )
        if slot.dtype.is_complex != source.is_complex():
            return f"{slot.name}: {slot.dtype} in the average, {source.dtype} in the model"
        return None

    def _address(self, index: int) -> tuple[int, int]:
        """Where slot ``index`` of row 0 lies, and how far it is to the next row, in bytes. The
        reference, which has no addresses, counts from the start of the row."""
        flat, size = self.flats[self.slots[index].dtype], self.slots[index].dtype.itemsize
        start = 0 if self.backend == "reference" else flat.data_ptr()
        return start + self.places[index] * size, flat.stride(0) * size

    def bind(self, sources: Sequence[Tensor]) -> None:
        """Reads from ``sources`` from now on, one for each slot and of its shape.

        Raises:
            TypeError: a dtype or layout that is not averaged; nothing has changed then.
            RuntimeError: during the capture of a CUDA graph.
        """
        if self._capturing():
            raise RuntimeError(
                "swa_fast: run one update of these tensors before capturing a CUDA graph; the "
                "table of their addresses cannot be copied to the device during capture"
            )
        # Not earlier: an average may be built on one device, to be moved to another one.
        self.backend = _backends.choose_backend(self.device, self._requested)
        self.rules = self._host_rules.to(self.device if self.backend == "triton" else "cpu")
        runs, staged = [], []
        gathered: dict[int, Tensor] = {}
        self._gathers = []
        if self.device.type == "cpu" and any(s.device.type == "cuda" for s in sources):
            from ._gather import gather_from_gpus

            self._gathers, gathered = gather_from_gpus(self, sources)
        exchanged: list[tuple[int, Tensor]] = []
        in_place: set[int] = set()
        addresses: set[int] = set()
        for index, (slot, source) in enumerate(zip(self.slots, sources, strict=True)):
            source = source.detach()
            if source.layout != torch.strided:
                raise TypeError(
                    f"{slot.name}: the source has layout {source.layout}, expected torch.strided"
                )
            if slot.averaged and (problem := self._unsupported(slot, source)):
                raise TypeError(problem)
            same = slot.dtype == source.dtype
            convertible = slot.dtype in _TYPE_CODE and source.dtype in _TYPE_CODE
            dense = (
                source.device == self.device
                and not source.is_conj()
                and not source.is_neg()
                and _ops.same_dense_layout(self.view(0, index), source)
            )
            if index in gathered:
                source = gathered[index]
            elif not dense or not (same or slot.averaged or convertible):
                # Brought to the average's device and layout by torch before each update.
                staging = torch.empty_strided(
                    slot.shape,
                    slot.stride,
                    dtype=source.dtype if slot.averaged or convertible else slot.dtype,
                    device=self.device,
                )
                staged.append((staging, source))
                source = staging
            elif same:
                in_place.add(index)
                # Two parameters over the same memory must not be exchanged twice.
                if source.data_ptr() not in addresses:
                    exchanged.append((index, source))
                addresses.add(source.data_ptr())
            runs.append((index, source))
        self._table, self._sources, self._pairs, self._short_runs = self._build(runs)
        (self._exchange_table, self._exchange_sources, _, self._exchange_short_runs) = self._build(
            exchanged
        )
        self.exchanged = frozenset(index for index, _ in exchanged)
        self._staged = staged
        self._keep = [source for _, source in runs]
        self._bound = [source.detach() for source in sources]
        # Listed here, because a list of all tensors takes longer than the exchange of small ones.
        self._in_place = [self._bound[i] for i in sorted(in_place)]
        self._others = [i for i in range(len(self.slots)) if i not in in_place]

    def unbind(self) -> None:
        """Lets go of the sources; the next update needs others."""
        self._keep, self._bound, self._sources, self._exchange_sources = [], [], [], []
        self._in_place = []
        self._staged, self._gathers = [], []

    def _build(self, pairs: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, list[Tensor], int, int]:
        """The table of runs, for the reference backend the runs' sources, the bit mask of the type
        pairs, and how many runs at the table's end are short."""
        type_pairs = 0
        columns: list[tuple[int, ...]] = []
        flats: list[Tensor] = []
        for index, source in pairs:
            slot = self.slots[index]
            flat = _flat(source)
            bytes_copied = not slot.averaged and slot.dtype == source.dtype
            if bytes_copied:
                flat = flat.view(torch.uint8)
                average_code = source_code = _BYTES
                average_size = 1
            else:
                flat = _reals(flat)
                average_dtype = _REAL.get(slot.dtype, slot.dtype)
                average_code, source_code = _TYPE_CODE[average_dtype], _TYPE_CODE[flat.dtype]
                average_size = average_dtype.itemsize
                type_pairs |= 1 << (4 * average_code + source_code)
            if flat.numel() == 0:
                continue
            packed = average_code << 32 | source_code << 40 | (0 if slot.averaged else _COPIED)
            packed |= list(self.flats).index(slot.dtype) << 49
            columns.append(
                (
                    0 if self.backend == "reference" else flat.data_ptr(),
                    *self._address(index),
                    flat.numel(),
                    packed,
                    flat.element_size(),
                    average_size,
                )
            )
            flats.append(flat)
        address, target, row_bytes, count, packed_, source_size, average_size_ = (
            np.array(columns, dtype=np.int64).reshape(-1, 7).T
        )
        larger = np.maximum(source_size, average_size_)
        if self.backend == "cuda":
            limit = _CUDA_RUN_BYTES // larger
        else:
            limit = np.full_like(count, _RUN_ELEMENTS[self.backend])
        pieces = -(-count // limit)
        tensor = np.repeat(np.arange(len(count)), pieces)
        first = np.arange(len(tensor)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first *= limit[tensor]
        length = np.minimum(count[tensor] - first, limit[tensor])
        table = np.stack(
            [
                address[tensor] + first * source_size[tensor],
                target[tensor] + first * average_size_[tensor],
                row_bytes[tensor],
                packed_[tensor] | length,
            ],
            axis=1,
        )
        short_runs = 0
        if self.backend == "cuda":
            # Long runs first, so that short ones fill the gaps at the end; runs of one length stay
            # in the order of their memory.
            size = length * larger[tensor]
            table = table[np.argsort(-size, kind="stable")]
            short_runs = int((size <= _CUDA_SHORT_BYTES).sum())
        if self.backend != "reference":
            flats = []
        elif len(table) > len(flats):
            flats = [
                flats[t][a : a + n]
                for t, a, n in zip(tensor.tolist(), first.tolist(), length.tolist(), strict=True)
            ]
        on_device = "cpu" if self.backend == "reference" else self.device
        return torch.from_numpy(table).to(on_device), flats, type_pairs, short_runs

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def update(self) -> None:
        """Takes the bound sources into every average."""
        for gather in self._gathers:
            gather()
        for staging, source in self._staged:
            staging.copy_(source)
        for row, function in self.functions.items():
            self._call(row, function)
        if self._capturing():
            # A captured graph reads what it was captured with at every replay.
            self._captured.append((self._table, self._sources, self._staged, self.rules))
        if len(self._table) > 0:
            _ops.update_(
                self.backend,
                self.rows,
                self.state,
                self.rules,
                self._table,
                self._sources,
                self._pairs,
                self.seed,
                self.guard,
                self._short_runs,
            )
        else:
            self.n_averaged.add_(1)

    def update_with(self, rows: list[Tensor], state: Tensor, sources: Sequence[Tensor]) -> None:
        """:meth:`update` on given tensors, which a compiler may have put in the place of this
        object's own and of the bound sources."""
        ours, theirs = [*self.rows, self.state, *self._bound], [*rows, state, *sources]
        if all(a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True)):
            self.update()
            return
        other = copy.copy(self)
        other.rows = rows
        other.flats = dict(zip(self.flats, rows, strict=True))
        other.state = state
        other.bind(sources)
        other.update()

    def _call(self, row: int, function: AveragingFunction) -> None:
        groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for index, (slot, source) in enumerate(zip(self.slots, self._keep, strict=True)):
            if slot.averaged:
                group = groups.setdefault(slot.dtype, ([], []))
                group[0].append(self.view(row, index))
                group[1].append(source.to(slot.dtype))
        for averages, sources in groups.values():
            function(averages, sources, self.state[row])

    def exchange(self, row: int, sources: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Exchanges the bound sources with average ``row``, in place.

        Tensors that cannot be exchanged without a loss, because the average is of another dtype,
        layout or device, are left alone.

        Returns:
            Those tensors: slot index and source.
        """
        if len(self._exchange_table) > 0:
            _ops.exchange_(
                self.backend,
                self.rows,
                self._exchange_sources,
                self._exchange_table,
                row,
                self._exchange_short_runs,
            )
        torch.autograd.graph.increment_version(self._in_place)
        return [(i, sources[i]) for i in self._others]

    def averages(self, row: int) -> Mapping[str, Tensor]:
        """The tensors of average ``row`` by name."""
        return {slot.name: self.view(row, i) for i, slot in enumerate(self.slots)}
