"""The update of one device: a table of addresses, read by one launch. Knows tensors and rules, not
modules.

Sources and averages are read and written where they are, through a table of segments
(:mod:`swa_fast._layout`) that holds their addresses. Whoever binds sources watches them and the
averages (:mod:`swa_fast._watch`), and asks for a new plan when one of them moved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _backends, _ops
from . import _layout as layout
from ._memory import Slot, distinct, flat_of, is_plain, overlapping, places_in, reals
from .rules import AveragingFunction, Filled, Member, Rule, rule_row

if TYPE_CHECKING:
    from ._gather import Gather
    from ._kept import KeptTables
    from .hooks import Gate

__all__ = ["Engine", "Plan", "Table", "cut"]

_REAL = {
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
    torch.complex32: torch.float16,
}


@dataclass
class Table:
    """What one launch reads."""

    words: Tensor  # int64 [segments, SEGMENT_HEADER + averages], on the device
    pairs: int = 0  # which pairs of types there are, a bit each
    short: int = 0  # how many segments, at the end, are short
    # The same memory as tensors, for the reference, which has no addresses.
    averages: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.words)


@dataclass
class Plan:
    """How given sources are read and swapped, until they or the averages move."""

    backend: str
    rules: Tensor  # where the backend reads them
    sources: list[Tensor]  # one for each slot
    read: list[Tensor]  # the same, or what stands for them
    update: Table
    swap: Table
    # Slots that the swap's table serves, and those that it does not: of another dtype, layout or
    # device, or over memory that belongs to several.
    swapped: list[int]
    others: list[int]
    in_place: list[Tensor]  # sources that a swap writes, to tell autograd
    # uint8 [1 + averages, 16], whose first line trades places as the sources do: what tells whether
    # a swap that was interrupted took place.
    marks: Tensor
    # What torch brings to the averages' device, dtype and layout before each update, and into what.
    staged: list[tuple[Tensor, Tensor]]
    gathers: list[Gather]
    direct: bool  # nothing but the table is needed for an update
    means: list[tuple[Engine, Plan]]  # what forms the means of windows after it
    kept: KeptTables | None = None  # of the last time that the sources' values were set aside


def cut(rows: np.ndarray[Any, Any], backend: str) -> tuple[np.ndarray[Any, Any], int]:
    """Segments that a backend's kernels take.

    Args:
        rows: int64 [tensors, SEGMENT_HEADER + averages + 3], words of a segment for a whole tensor,
            without count and alignment, and then its number of elements and the bytes of one in the
            source and in the averages; written.
        backend: a name of ``BACKENDS``.

    Returns:
        The table's words, and how many segments, at the end, are short.
    """
    words, (count, source_size, average_size) = rows[:, :-3], rows[:, -3:].T
    common = np.bitwise_or.reduce(words[:, layout.SEGMENT_HEADER :], axis=1) | 16
    words[:, layout.PACKED] |= np.log2(common & -common).astype(np.int64) << layout.ALIGNMENT
    larger = np.maximum(source_size, average_size)
    short = 0
    if backend != "reference":
        limit = {
            "cuda": layout.CUDA_SEGMENT_BYTES // larger,
            "triton": np.full_like(count, layout.TRITON_SEGMENT),
            "cpu": np.full_like(count, layout.CPU_SEGMENT),
        }[backend]
        pieces = -(-count // limit)
        tensor = np.repeat(np.arange(len(count)), pieces)
        first = np.arange(len(tensor)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first *= limit[tensor]
        length = np.minimum(count[tensor] - first, limit[tensor])
        words = words[tensor]
        words[:, layout.SOURCE] += first * source_size[tensor]
        words[:, layout.PACKED] |= length
        words[:, layout.PLACE] += first
        words[:, layout.SEGMENT_HEADER :] += (first * average_size[tensor])[:, None]
        if backend == "cuda":
            # Long segments first, so that short ones fill the gaps at the end; those of one
            # length stay in the order of their memory.
            size = length * larger[tensor]
            words = words[np.argsort(-size, kind="stable")]
            short = int((size <= layout.CUDA_SHORT_BYTES).sum())
    return np.ascontiguousarray(words), short


class Engine:
    """The averages of tensors that live on one device.

    Args:
        slots: the tensors of an average.
        averages: for each rule one tensor for each slot, wherever they lie on the device; written.
        rules: one for each average, at most 16.
        device: where the averages live.
        n_averaged: int64 with one element for each average, updates done, on the device; written
            and read by every update. None makes one.
        counted: False leaves ``n_averaged`` to its owner.
        backend: a name of ``BACKENDS``, or None to choose by device.
        seed: for stochastic rounding of bfloat16 averages; None rounds to nearest.
        skip_nonfinite: skip an update whose averaged sources hold an infinity or NaN.
        group: which of the engines of the device.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        averages: Sequence[Sequence[Tensor]],
        rules: Sequence[Rule | Member | Filled],
        device: torch.device,
        *,
        n_averaged: Tensor | None = None,
        counted: bool = True,
        backend: str | None = None,
        seed: int | None = None,
        skip_nonfinite: bool = False,
        group: int = 0,
    ) -> None:
        self.slots = tuple(slots)
        self.device = device
        self.place = device, group
        self.requested = backend
        self.seed = seed
        self.skip_nonfinite = skip_nonfinite
        self.functions: dict[int, AveragingFunction] = {
            row: rule for row, rule in enumerate(rules) if callable(rule)
        }
        # On the CPU whatever torch's default device is.
        self.rules = torch.tensor(
            [rule_row(rule) for rule in rules], dtype=torch.float64, device="cpu"
        )
        self._rules = self.rules.numpy()  # the same memory, written faster
        self.members = [(row, m) for row, m in enumerate(rules) if isinstance(m, Member)]
        if n_averaged is None:
            n_averaged = torch.zeros(len(rules), dtype=torch.int64, device=device)
        self.n_averaged = n_averaged
        self.counters = (
            torch.zeros(layout.COUNTERS, dtype=torch.int64, device=device) if counted else None
        )
        self._unsettled: Plan | None = None
        self._places, _ = places_in(self.slots)
        self.put(averages)

    def put(self, averages: Sequence[Sequence[Tensor]]) -> None:
        """The averages lie there from now on; plans made before no longer serve."""
        self.averages = [list(row) for row in averages]
        # Averages with gaps are updated in gapless memory and copied back.
        self._gapless: list[tuple[Tensor, Tensor]] = []
        self.written: list[list[Tensor]] = []  # what kernels write to
        for row in self.averages:
            written = []
            for slot, average in zip(self.slots, row, strict=True):
                if not is_plain(average):
                    gapless = torch.empty_strided(
                        slot.shape, slot.stride, dtype=slot.dtype, device=self.device
                    )
                    self._gapless.append((gapless, average))
                    average = gapless
                written.append(average.detach())
            self.written.append(written)

    def with_memory(self, averages: Sequence[Sequence[Tensor]], n_averaged: Tensor) -> Engine:
        """The same engine on other memory, such as a compiler puts in the place of its own."""
        other = copy.copy(self)
        other.n_averaged = n_averaged
        other.put(averages)
        return other

    @property
    def skipped(self) -> Tensor:
        """int64 scalar on the device: updates that ``skip_nonfinite`` skipped."""
        assert self.counters is not None
        return self.counters[layout.SKIPPED]

    def progress(self) -> Tensor:
        """A copy of all counters: what an update changes in any case."""
        counts = self.n_averaged.view(-1)
        return counts.clone() if self.counters is None else torch.cat((counts, self.counters))

    def _unsupported(self, slot: Slot, source: Tensor) -> str | None:
        for role, dtype in (("average", slot.dtype), ("source", source.dtype)):
            if _REAL.get(dtype, dtype) not in layout.TYPE_CODES:
                found = str(dtype).removeprefix("torch.")
                return (
                    f"{slot.name}: the {role} has dtype {found}, expected float32, float64, "
                    "bfloat16, float16 or complex"
                )
        if slot.dtype.is_complex != source.is_complex():
            return f"{slot.name}: {slot.dtype} in the average, {source.dtype} in the model"
        return None

    def plan(self, sources: Sequence[Tensor]) -> Plan:
        """How to read ``sources``, one for each slot and of its shape, from now on.

        Raises:
            TypeError: a dtype or layout that is not averaged.
            RuntimeError: during the capture of a CUDA graph.
        """
        if self.capturing():
            raise RuntimeError(
                "swa_fast: run one update of these tensors before capturing a CUDA graph; the "
                "table of their addresses cannot be copied to the device during capture"
            )
        # Not earlier: an average may be built on one device, to be moved to another one.
        from .windows import means_of

        backend = _backends.choose_backend(self.device, self.requested)
        gathers: list[Gather] = []
        gathered: dict[int, Tensor] = {}
        if self.device.type == "cpu" and any(s.device.type == "cuda" for s in sources):
            from ._gather import gather_from_gpus

            gathers, gathered = gather_from_gpus(self, sources)
        read: list[Tensor] = []
        staged: list[tuple[Tensor, Tensor]] = []
        swapped: list[int] = []
        shared = overlapping(sources)
        gaps = {id(gapless) for gapless, _ in self._gapless}
        for index, (slot, source) in enumerate(zip(self.slots, sources, strict=True)):
            source = source.detach()
            if source.layout != torch.strided:
                raise TypeError(
                    f"{slot.name}: the source has layout {source.layout}, expected torch.strided"
                )
            if slot.averaged and (problem := self._unsupported(slot, source)):
                raise TypeError(problem)
            average = self.written[0][index]
            same = slot.dtype == source.dtype
            convertible = slot.dtype in layout.TYPE_CODES and source.dtype in layout.TYPE_CODES
            dense = (
                source.device == self.device
                and not source.is_conj()
                and not source.is_neg()
                and _ops.same_dense_layout(average, source)
            )
            if index in gathered:
                source = gathered[index]
            elif not dense or not (same or slot.averaged or convertible):
                staging = torch.empty_strided(
                    slot.shape,
                    slot.stride,
                    dtype=source.dtype if slot.averaged or convertible else slot.dtype,
                    device=self.device,
                )
                staged.append((staging, source))
                source = staging
            elif same and index not in shared and id(average) not in gaps:
                swapped.append(index)
            read.append(source)
        bound = [source.detach() for source in sources]
        served = set(swapped)
        marks = torch.zeros(1 + len(self.averages), 16, dtype=torch.uint8, device=self.device)
        marks[1:] = 1
        return Plan(
            backend,
            self.rules.to(self.device if backend == "triton" else "cpu"),
            bound,
            read,
            self._table(range(len(read)), read, backend),
            self._table(
                swapped,
                [read[i] for i in swapped],
                backend,
                None if backend == "reference" else marks,
            ),
            swapped,
            # Listed here, because a list of all tensors takes longer than the swap of small ones.
            [i for i in range(len(bound)) if i not in served],
            [bound[i] for i in swapped],
            marks,
            staged,
            gathers,
            not (staged or gathers or self._gapless or backend == "reference"),
            means_of(self),
        )

    def _table(
        self,
        slots: Sequence[int],
        sources: Sequence[Tensor],
        backend: str,
        marks: Tensor | None = None,
    ) -> Table:
        """The table of ``sources``, which belong to the slots of these indices, and of marks."""
        k = len(self.averages)
        pairs = 0
        columns: list[tuple[int, ...]] = []
        flats: list[Tensor] = []
        targets: list[list[Tensor]] = [[] for _ in range(k)]
        for index, source in zip(slots, sources, strict=True):
            slot = self.slots[index]
            flat = flat_of(source)
            if flat.numel() == 0:
                continue
            if bytes_copied := not slot.averaged and slot.dtype == source.dtype:
                flat = flat.view(torch.uint8)
                average_code = source_code = layout.BYTES
                average_size = 1
            else:
                flat = reals(flat)
                average_dtype = _REAL.get(slot.dtype, slot.dtype)
                average_code = layout.TYPE_CODES[average_dtype]
                source_code = layout.TYPE_CODES[flat.dtype]
                average_size = average_dtype.itemsize
                pairs |= 1 << (4 * average_code + source_code)
            packed = average_code << layout.AVERAGE_TYPE | source_code << layout.SOURCE_TYPE
            packed |= (not slot.averaged) << layout.COPIED
            averages = [row[index] for row in self.written]
            if backend == "reference":
                flats.append(flat)
                for target, average in zip(targets, averages, strict=True):
                    own = flat_of(average)
                    target.append(own.view(torch.uint8) if bytes_copied else reals(own))
            sizes = flat.numel(), flat.element_size(), average_size
            addresses = (average.data_ptr() for average in averages)
            columns.append((flat.data_ptr(), packed, self._places[index], *addresses, *sizes))
        if marks is not None and columns:
            packed = layout.BYTES << layout.AVERAGE_TYPE | layout.BYTES << layout.SOURCE_TYPE
            places = (mark.data_ptr() for mark in marks)
            columns.append((next(places), packed | 1 << layout.COPIED, 0, *places, 16, 1, 1))
        rows = np.array(columns, dtype=np.int64).reshape(
            len(columns), layout.SEGMENT_HEADER + k + 3
        )
        words, short = cut(rows, backend)
        on_device = "cpu" if backend == "reference" else self.device
        return Table(
            torch.from_numpy(words).to(on_device),
            pairs,
            short,
            [average for row in targets for average in row],
            flats,
        )

    def capturing(self) -> bool:
        """True while a CUDA graph is captured on this engine's device."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def set_rule(self, row: int, rule: Rule) -> None:
        """Average ``row`` follows this rule, which is of the same kind, from now on."""
        self._rules[row] = rule_row(rule)

    def update(self, plan: Plan, gate: Gate | None = None) -> None:
        """Takes the plan's sources into every average, if the gate lets it: into all of them or,
        where it raises or is interrupted before the launch, into none."""
        self._unsettled = plan if plan.means else None
        for gather in plan.gathers:
            gather()
        for staging, source in plan.staged:
            staging.copy_(source)
        if self._gapless or self.functions:
            self._update_in_steps(plan, gate)
        else:
            self._start(plan, gate)
        self.settle()

    def _start(self, plan: Plan, gate: Gate | None) -> None:
        if len(plan.update) > 0:
            self.launch(plan, gate)
        elif self.counters is not None:
            self.n_averaged.add_(1)

    def launch(self, plan: Plan, gate: Gate | None) -> None:
        """:meth:`update` by a plan for which its table is all that is needed."""
        table = plan.update
        gated = () if gate is None else gate.on(self.place)
        _ops.update_(
            plan.backend, table.averages, table.sources, self.n_averaged, self.counters, plan.rules,
            table.words, table.pairs, self.seed, self.skip_nonfinite, table.short, *gated,
        )  # fmt: skip

    def direct(self, plan: Plan) -> object:
        """:meth:`launch` without torch's dispatcher, which takes longer than a small model's
        update: for ``swa_fast._C.update``, while the plan is kept."""
        table, counters = plan.update, self.counters
        return _backends.cpu_library().direct(
            self.n_averaged.data_ptr(), 0 if counters is None else counters.data_ptr(),
            plan.rules.data_ptr(), table.words.data_ptr(), len(table), len(self.rules), self.seed,
            self.skip_nonfinite,
        )  # fmt: skip

    def settle(self) -> None:
        """Forms the means of windows, which an update that was interrupted may have left undone."""
        if self._unsettled is not None:
            for engine, members in self._unsettled.means:
                engine.update(members)
            self._unsettled = None

    def _update_in_steps(self, plan: Plan, gate: Gate | None) -> None:
        # What functions return is kept apart: nothing is written if one of them raises.
        results = {row: self._call(row, function, plan) for row, function in self.functions.items()}
        for gapless, average in self._gapless:
            gapless.copy_(average)
        before = self.n_averaged.clone()

        def finish() -> None:
            for row, pairs in results.items():
                # The first update copies the sources, which the launch has done.
                first = before.view(-1)[row] == 0
                for average, result in pairs:
                    average.copy_(torch.where(first, average, result))
            for gapless, average in self._gapless:
                target, value = distinct(average, gapless)
                target.copy_(value)

        try:
            self._start(plan, gate)
            finish()
        except BaseException:
            if not torch.equal(before, self.n_averaged):
                finish()
            raise

    def _call(
        self, row: int, function: AveragingFunction, plan: Plan
    ) -> list[tuple[Tensor, Tensor]]:
        """Averages, and what the function makes of copies of them."""
        pairs: list[tuple[Tensor, Tensor]] = []
        groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for slot, average, written, source in zip(
            self.slots, self.averages[row], self.written[row], plan.read, strict=True
        ):
            if slot.averaged:
                group = groups.setdefault(slot.dtype, ([], []))
                group[0].append(average.detach().clone())
                group[1].append(source.to(slot.dtype))
                pairs.append((written, group[0][-1]))
        for averages, sources in groups.values():
            function(averages, sources, self.n_averaged.view(-1)[row])
        return pairs

    def swap(self, plan: Plan, row: int) -> None:
        """The plan's sources and average ``row`` trade places, but for ``plan.others``."""
        table = plan.swap
        if len(table) > 0:
            _ops.swap_(plan.backend, table.averages, table.sources, table.words, row, table.short)
        torch.autograd.graph.increment_version(plan.in_place)
