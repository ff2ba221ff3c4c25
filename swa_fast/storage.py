"""What :class:`~swa_fast.Averager` and :class:`~swa_fast.AveragedModel` stand on: averages on all
devices, the live tensors that they are taken from, the watch over both, and the swap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._watch import Watch
from .engine import Engine, Plan, Slot, allocate, averages_in
from .hooks import Gate
from .rules import Member, Rule

__all__ = ["Averages", "FlatMemory", "SeparateMemory", "Storage"]


class SeparateMemory:
    """One average, in tensors that somebody else allocated: the memory is the average.

    Attributes:
        tensors: what version counters, compilers and the watch know of.
        private: False, because the tensors may be moved or replaced by their owner.
    """

    private = False

    def __init__(self, average: Sequence[Tensor]) -> None:
        self.tensors = list(average)

    def averages(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The averages in these tensors, or in others that stand for them."""
        return [list(tensors)]


class FlatMemory:
    """Several averages, in one tensor of shape [averages, elements] for each device and dtype.

    Args:
        slots: the tensors of an average.
        devices: where each of them lives.
        rows: how many averages.
    """

    private = True

    def __init__(self, slots: Sequence[Slot], devices: Sequence[torch.device], rows: int) -> None:
        self._slots = slots
        self._members = _by_device(devices)
        self.tensors: list[Tensor] = []
        self._parts: list[int] = []  # how many of the tensors are a device's
        for device, members in self._members.items():
            memory = allocate([slots[i] for i in members], rows, device)
            self.tensors += memory
            self._parts.append(len(memory))

    def averages(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The averages in these tensors, or in others that stand for them, as views."""
        rest = iter(tensors)
        result: list[list[Tensor]] = []
        for members, count in zip(self._members.values(), self._parts, strict=True):
            memory = [next(rest) for _ in range(count)]
            rows = averages_in([self._slots[i] for i in members], memory)
            if not result:
                result = [[rows[0][0]] * len(self._slots) for _ in rows]
            for row, views in zip(result, rows, strict=True):
                for i, view in zip(members, views, strict=True):
                    row[i] = view
        return result


Averages = SeparateMemory | FlatMemory


def _by_device(devices: Sequence[torch.device]) -> dict[torch.device, list[int]]:
    members: dict[torch.device, list[int]] = {}
    for i, device in enumerate(devices):
        members.setdefault(device, []).append(i)
    return members


@dataclass(frozen=True)
class _Part:
    """What lives on one device."""

    engine: Engine
    members: tuple[int, ...]  # indices of its slots among all

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.members]


class Storage:
    """Averages of the same tensors, on any devices.

    Args:
        slots: the tensors of an average.
        memory: where the averages lie.
        rules: one for each average.
        counter: one int64, updates done, that every device's count follows; None: each device
            counts for itself.
        backend: a name of ``BACKENDS``, or None to choose by device.
        seed: for stochastic rounding; None rounds to nearest.
        skip_nonfinite: see :class:`~swa_fast.engine.Engine`.
        captured: what captured graphs of a predecessor read at replay.
        engine: what updates the averages of a device.

    Attributes:
        averages: for each rule one tensor for each slot.
        live: the tensors bound last, one for each slot.
        swapped: which average is in the live tensors' place at the moment, or None.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        memory: Averages,
        rules: Sequence[Rule | Member],
        *,
        counter: Tensor | None = None,
        backend: str | None = None,
        seed: int | None = None,
        skip_nonfinite: bool = False,
        captured: list[object] | None = None,
        engine: type[Engine] = Engine,
    ) -> None:
        self.slots = tuple(slots)
        self.memory = memory
        self.averages = memory.averages(memory.tensors)
        self.live: list[Tensor] = []
        self.swapped: int | None = None
        self.captured: list[object] = [] if captured is None else captured
        self.counter = counter
        self.parts: list[_Part] = []
        devices = [average.device for average in self.averages[0]] if self.averages else []
        for device, members in _by_device(devices).items():
            of_device = engine(
                [self.slots[i] for i in members],
                [[row[i] for i in members] for row in self.averages],
                rules,
                device,
                n_averaged=counter if self._counts(device) else None,
                backend=backend,
                seed=seed,
                skip_nonfinite=skip_nonfinite,
            )
            self.parts.append(_Part(of_device, tuple(members)))
        self._plans: list[Plan] = []
        self._watch: Watch | None = None
        # Inference tensors have no version counters.
        self._versioned = [tensor for tensor in memory.tensors if not tensor.is_inference()]

    def _counts(self, device: torch.device) -> bool:
        """Whether the update of this device advances the common counter."""
        return self.counter is not None and self.counter.device == device

    @property
    def counts(self) -> list[Tensor]:
        """The counters that an update advances."""
        return [p.engine.n_averaged for p in self.parts] if self.counter is None else [self.counter]

    @property
    def backends(self) -> list[str]:
        """Which backends serve the tensors bound last."""
        return sorted({plan.backend for plan in self._plans})

    @property
    def devices(self) -> list[torch.device]:
        """Where averages live."""
        return [part.engine.device for part in self.parts]

    @property
    def decides_on_device(self) -> bool:
        """Whether an update may be left undone for what only the devices know."""
        counted = self.counter is None or any(self._counts(device) for device in self.devices)
        return counted and all(
            not part.engine.functions and len(plan.update) > 0
            for part, plan in zip(self.parts, self._plans, strict=False)
        )

    def settle(self) -> None:
        """See :meth:`Engine.settle`."""
        for part in self.parts:
            part.engine.settle()

    def capturing(self) -> bool:
        """True while a CUDA graph is captured on one of the devices."""
        return any(part.engine.capturing() for part in self.parts)

    def bind(self, live: list[Tensor], dictionaries: Iterable[dict[str, Any]]) -> None:
        """Averages ``live`` from now on, one tensor for each slot.

        Args:
            live: of the slots' shapes.
            dictionaries: whose contents must not change either, see :class:`Watch`.

        Raises:
            TypeError, RuntimeError: see :meth:`Engine.plan`; nothing has changed then.
        """
        plans = [part.engine.plan(part.of(live)) for part in self.parts]
        watched = list(live)
        if not self.memory.private:
            watched += self.memory.tensors
        if self.counter is not None:
            watched.append(self.counter)
        watch = Watch(watched, dictionaries)
        self._plans, self.live, self._watch = plans, live, watch

    def unbind(self) -> None:
        """Lets go of the live tensors."""
        self._plans, self.live, self._watch = [], [], None

    def holds(self) -> bool:
        """True while everything is where it was when it was bound."""
        return self._watch is not None and self._watch.holds()

    def update(self, gate: Gate | None = None) -> None:
        """Takes the live tensors into every average, if the gate lets it."""
        for part, plan in zip(self.parts, self._plans, strict=True):
            if part.engine.capturing():
                # A captured graph reads what it was captured with at every replay.
                self.captured.append((part.engine, plan))
        self._update(self.parts, self._plans, gate=gate)
        # The kernels write to addresses: without this, autograd would not notice that a tensor it
        # saved for backward has changed.
        torch.autograd.graph.increment_version(self._versioned)

    def _update(
        self,
        parts: Sequence[_Part],
        plans: Sequence[Plan],
        counter: Tensor | None = None,
        gate: Gate | None = None,
    ) -> None:
        counter = self.counter if counter is None else counter
        if counter is not None:
            for part in parts:
                if not self._counts(part.engine.device):
                    part.engine.n_averaged.copy_(counter, non_blocking=True)
        for part, plan in zip(parts, plans, strict=True):
            part.engine.update(plan, gate)
        if counter is not None and not any(self._counts(p.engine.device) for p in parts):
            counter += 1

    def update_with(
        self, memory: list[Tensor], counts: list[Tensor], live: Sequence[Tensor]
    ) -> None:
        """:meth:`update` on given tensors, which a compiler may have put in the place of the
        averages' memory, the counters and the live tensors."""
        ours = [*self.memory.tensors, *self.counts, *self.live]
        theirs = [*memory, *counts, *live]
        if all(a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True)):
            self.update()
            return
        averages = self.memory.averages(memory)
        parts = []
        for at, part in enumerate(self.parts):
            n = part.engine.n_averaged
            if self.counter is None:
                n = counts[at]
            elif self._counts(part.engine.device):
                n = counts[0]
            rows = [part.of(row) for row in averages]
            parts.append(_Part(part.engine.with_memory(rows, n), part.members))
        plans = [part.engine.plan(part.of(live)) for part in parts]
        self._update(parts, plans, None if self.counter is None else counts[0])

    @contextlib.contextmanager
    def applied(self, row: int, current: Callable[[], list[Tensor]]) -> Iterator[None]:
        """Average ``row`` and the live tensors trade places for the time of a ``with`` block.

        In place where dtype, layout and device agree, through a copy of the live tensor elsewhere.

        Args:
            row: which average.
            current: the live tensors where they are now, asked for if one of them moved within the
                block.

        Raises:
            RuntimeError: an average was written within the block.
        """
        swap = _Swap(self, row)
        swap.do()
        self.swapped = row
        versions = [tensor._version for tensor in self._versioned]
        try:
            yield
        finally:
            written = versions != [tensor._version for tensor in self._versioned]
            self.swapped = None
            if self.holds():
                swap.undo()
            else:
                live = self.live
                try:
                    live = current()
                finally:
                    # A model that no longer fits gets its weights back all the same.
                    swap.undo_into(live)
                    self.unbind()
        if written:
            raise RuntimeError(
                "applied: an average was written while one was applied; if that one was written, "
                "the live weights now hold what was written"
            )


class _Swap:
    """The live tensors of a storage and one average trade places, and back."""

    def __init__(self, storage: Storage, row: int) -> None:
        self._storage = storage
        self._row = row
        self._parts = list(zip(storage.parts, storage._plans, strict=True))
        self._live = list(storage.live)
        # Live values whose dtype, layout or device is not the average's. They are kept in a copy,
        # because one side could not hold the other's without a loss.
        self._kept: dict[int, Tensor] = {}

    def _trade(self) -> None:
        for part, plan in self._parts:
            part.engine.swap(plan, self._row)
        torch.autograd.graph.increment_version(self._storage._versioned)

    @torch.no_grad()
    def do(self) -> None:
        average = self._storage.averages[self._row]
        others = [part.members[i] for part, plan in self._parts for i in plan.others]
        self._kept = {i: self._live[i].clone() for i in others}
        self._trade()
        for i in others:
            self._live[i].copy_(average[i])

    @torch.no_grad()
    def undo(self) -> None:
        """Between the same tensors."""
        self._trade()
        for i, live in self._kept.items():
            self._live[i].copy_(live)

    @torch.no_grad()
    def undo_into(self, live: Sequence[Tensor]) -> None:
        """Tensor by tensor: the averages come back from the tensors that got them, wherever these
        lie now, and the live values go into ``live``."""
        average = self._storage.averages[self._row]
        for part, plan in self._parts:
            for at in plan.swapped:
                i = part.members[at]
                value = average[i].clone()
                average[i].copy_(self._live[i])
                live[i].copy_(value)
        for i, value in self._kept.items():
            live[i].copy_(value)
