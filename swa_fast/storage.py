"""What :class:`~swa_fast.Averager` and :class:`~swa_fast.AveragedModel` stand on: averages on all
devices, the live tensors that they are taken from, and the watch over both."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _backends
from ._cadence import Gate, Place
from ._graphs import keep_for_graph
from ._memory import FlatMemory, SeparateMemory, Slot, together
from ._modules import check_kind
from ._watch import Place as WatchedPlace
from ._watch import Watch
from .engine import Engine, Plan
from .rules import Member, Rule

if TYPE_CHECKING:
    from ._applied import Applied
    from ._lent import Lent
    from ._overlap import Overlap
    from ._pointers import Pointers

__all__ = ["Storage"]


@dataclass(frozen=True)
class Part:
    """What lives on one device and follows the same rules."""

    engine: Engine
    members: tuple[int, ...]  # indices of its slots among all

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.members]


def _never(storage: Storage) -> bool:
    return False


class Storage:
    """Averages of the same tensors, on any devices.

    Args:
        slots: the tensors of an average.
        memory: where the averages lie.
        rules: for each group of slots one for each average.
        counter: one int64, updates done, that every device's count follows; None: each device
            counts for itself.
        backend: a name of ``BACKENDS``, or None to choose by device.
        seed: for stochastic rounding; None rounds to nearest.
        skip_nonfinite: see :class:`~swa_fast.engine.Engine`.
        loose: for each average, tensors that are copied by torch at every update, because they have
            no memory that could be read by address: sparse, quantised and nested ones.
        lock: held while averages or live tensors are written; None makes one.
        engine: what updates the averages of a device.

    Attributes:
        averages: for each rule one tensor for each slot.
        live: the tensors bound last, one for each slot.
        loose_live: likewise for ``loose``.
        applied: what is in the live tensors' place at the moment, or None.
        pointers: by average, how one is lent to the tensors bound last.
        overlap: updates that are on their way, or None where none ever is.
        lock: held while averages or live tensors are written.
        given_away: whether somebody else may have moved or replaced an average.
        at_once: how ``swa_fast._C.update`` does all of an update that is one launch on the CPU, or
            None where there is more to do.
        update_at_once: called with this storage, looks whether everything is where it was, updates
            and returns True; False, with nothing done, where that cannot be done at once.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        memory: SeparateMemory | FlatMemory,
        rules: Sequence[Sequence[Rule | Member]],
        *,
        counter: Tensor | None = None,
        backend: str | None = None,
        seed: int | None = None,
        skip_nonfinite: bool = False,
        loose: Sequence[Sequence[Tensor]] = (),
        lock: threading.RLock | None = None,
        engine: type[Engine] = Engine,
    ) -> None:
        self.slots = tuple(slots)
        self.memory = memory
        self.given_away = isinstance(memory, SeparateMemory)
        self.averages = (
            memory.own() if isinstance(memory, FlatMemory) else memory.averages(memory.tensors)
        )
        self.live: list[Tensor] = []
        self.loose, self.loose_live = [list(row) for row in loose], list[Tensor]()
        self.applied: Applied | None = None
        self.pointers: dict[int, Pointers] = {}
        self.overlap: Overlap | None = None
        self.lock = threading.RLock() if lock is None else lock
        self.counter = counter
        self.parts: list[Part] = []
        devices = [average.device for average in self.averages[0]] if self.averages else []
        groups = [slot.group for slot in self.slots]
        for (device, group), members in together(zip(devices, groups, strict=False)).items():
            of_device = engine(
                [self.slots[i] for i in members],
                [[row[i] for i in members] for row in self.averages],
                rules[group],
                device,
                n_averaged=counter if self._counts(device) else None,
                backend=backend,
                seed=seed,
                skip_nonfinite=skip_nonfinite,
                group=group,
            )
            self.parts.append(Part(of_device, tuple(members)))
        self.plans: list[Plan] = []
        self._direct: tuple[Engine, Plan] | None = None
        self.at_once: tuple[object, ...] | None = None
        self._watch: Watch | None = None
        self._note_memory()
        library = _backends.cpu_library()
        self.update_at_once = _never if library is None else library.update

    def _note_memory(self) -> None:
        # Inference tensors have no version counters.
        self._versioned = [tensor for tensor in self.memory.tensors if not tensor.is_inference()]
        self._addresses = [tensor.data_ptr() for row in self.averages for tensor in row]

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
        return sorted({plan.backend for plan in self.plans})

    @property
    def devices(self) -> list[torch.device]:
        """Where averages live."""
        return [part.engine.device for part in self.parts]

    @property
    def places(self) -> list[Place]:
        """Likewise, and which engine there."""
        return [part.engine.place for part in self.parts]

    @property
    def decides_on_device(self) -> bool:
        """Whether an update may be left undone for what only the devices know."""
        counted = self.counter is None or any(self._counts(device) for device in self.devices)
        return counted and all(
            not part.engine.functions and len(plan.update) > 0
            for part, plan in zip(self.parts, self.plans, strict=False)
        )

    def settle(self) -> None:
        """See :meth:`Engine.settle`; and nothing is on its way any more."""
        if self.overlap is not None:
            self.overlap.flush()
        for part in self.parts:
            part.engine.settle()

    def capturing(self) -> bool:
        """True while a CUDA graph is captured on one of the devices."""
        return any(part.engine.capturing() for part in self.parts)

    @torch.no_grad()
    def bind(
        self,
        live: list[Tensor],
        places: Iterable[WatchedPlace],
        loose: Sequence[Tensor] = (),
        wrapped: Sequence[Tensor] = (),
    ) -> None:
        """Averages ``live`` from now on, one tensor for each slot.

        Args:
            live: of the slots' shapes.
            places: of dictionaries that must not change either, see :class:`Watch`.
            loose: what is copied by torch.
            wrapped: tensors whose inner ones are among ``live``.

        Raises:
            TypeError, ValueError, RuntimeError: see :meth:`Engine.plan`, or an average was changed
                to something else; nothing has changed then.
        """
        self.plans, self._watch = self.plans_for(live, places, wrapped)
        self.live, self.loose_live, self.pointers = live, list(loose), {}
        self._direct = self._find_direct()
        self.at_once = self._find_at_once()

    def plans_for(
        self, live: list[Tensor], places: Iterable[WatchedPlace], wrapped: Sequence[Tensor] = ()
    ) -> tuple[list[Plan], Watch]:
        """How to take ``live`` into the averages, and the watch over all that this stands on.

        Raises:
            TypeError, ValueError, RuntimeError: see :meth:`bind`.
        """
        for slot, tensor in zip(self.slots, live, strict=True):
            check_kind(slot.name, tensor)
        self.find_averages()
        plans = [part.engine.plan(part.of(live)) for part in self.parts]
        watched = list(live)
        if self.given_away:
            watched += (tensor for row in self.averages for tensor in row)
        watched += (
            [part.engine.n_averaged for part in self.parts]
            if self.counter is None
            else [self.counter]
        )
        watched += [part.engine.counters for part in self.parts if part.engine.counters is not None]
        return plans, Watch(watched, places, wrapped)

    def _find_direct(self) -> tuple[Engine, Plan] | None:
        """What one launch updates as a whole, on the CPU; None where more has to be done."""
        if len(self.parts) != 1 or any(self.loose):
            return None
        engine, plan = self.parts[0].engine, self.plans[0]
        counts = self.counter is None or self._counts(engine.device)
        alone = plan.direct and not plan.means and not engine.functions and len(plan.update) > 0
        return (engine, plan) if alone and counts and engine.device.type == "cpu" else None

    def _find_at_once(self) -> tuple[object, ...] | None:
        if self._direct is None or self._watch is None or self._watch.looks is None:
            return None
        engine, plan = self._direct
        if type(engine) is not Engine or plan.backend != "cpu" or self.overlap is not None:
            return None
        # Averages with a version counter each are watched after the live tensors.
        each = self.given_away and len(self._versioned) == len(self.averages) * len(self.slots)
        first = len(self.live) if each else -1
        # What the rest only borrows, for as long as an update takes.
        kept = self._watch, plan
        return kept, *self._watch.looks, engine.direct(plan), first, self._versioned

    def find_averages(self) -> None:
        """Looks where the averages lie now, if they may have been moved.

        Raises:
            TypeError, ValueError: one of them is no longer what it was.
        """
        if not self.given_away:
            return
        devices = {i: part.engine.device for part in self.parts for i in part.members}
        for row in self.averages:
            for i, (slot, tensor) in enumerate(zip(self.slots, row, strict=True)):
                check_kind(f"the average of {slot.name}", tensor)
                found = (tuple(tensor.shape), tensor.dtype, tensor.device)
                if found != (slot.shape, slot.dtype, devices[i]):
                    raise ValueError(
                        f"the average of {slot.name}: expected shape {slot.shape}, {slot.dtype} on "
                        f"{devices[i]}, found {found[0]}, {found[1]} on {found[2]}"
                    )
        addresses = [tensor.data_ptr() for row in self.averages for tensor in row]
        if addresses != self._addresses:
            self.memory = SeparateMemory(self.averages)
            for part in self.parts:
                part.engine.put([part.of(row) for row in self.averages])
            self._note_memory()

    def give_away(self) -> None:
        """Somebody else gets to see the averages, and may move them: they are watched from now
        on."""
        if not self.given_away:
            self.given_away = True
            self._watch = self.at_once = None

    def unbind(self) -> None:
        """Lets go of the live tensors."""
        self.plans, self.live, self._watch, self.loose_live = [], [], None, []
        self._direct, self.at_once, self.pointers = None, None, {}

    def holds(self) -> bool:
        """True while everything is where it was when it was bound."""
        return self._watch is not None and self._watch.holds()

    def set_rule(self, row: int, rule: Rule) -> None:
        """Average ``row`` follows this rule, which is of the same kind, from now on."""
        for part in self.parts:
            part.engine.set_rule(row, rule)
        for part, plan in zip(self.parts, self.plans, strict=False):
            if plan.rules is not part.engine.rules:
                plan.rules.copy_(part.engine.rules)

    def values_of(self, row: int) -> list[Tensor]:
        """Average ``row``: the tensors themselves or, where it is applied and the live values lie
        there, copies of what it is."""
        tensors = list(self.averages[row])
        if self.applied is not None and self.applied.row == row:
            for i, value in self.applied.values().items():
                tensors[i] = value
        return tensors

    def update(self, gate: Gate | None = None) -> None:
        """Takes the live tensors into every average, if the gate lets it."""
        if self._direct is not None:
            self._direct[0].launch(self._direct[1], gate)
            self.note_written()
        else:
            self._update_all(gate, self.plans, self.loose_live)

    def update_from(self, lent: Lent, gate: Gate | None) -> None:
        """:meth:`update` from other tensors than those bound last."""
        lent.follow(self)
        self._update_all(gate, lent.plans, lent.loose)

    @torch.no_grad()
    def update_by(self, plans: Sequence[Plan], gate: Gate | None) -> None:
        """:meth:`update` by plans of copies of the live tensors."""
        for part, plan in zip(self.parts, plans, strict=True):
            if plan.rules is not part.engine.rules:
                plan.rules.copy_(part.engine.rules)
        self._update(self.parts, plans, gate=gate)
        self.note_written()

    # Only here: to enter and leave it takes a tenth of a small model's update.
    @torch.no_grad()
    def _update_all(
        self, gate: Gate | None, plans: Sequence[Plan], loose_live: Sequence[Tensor]
    ) -> None:
        for part, plan in zip(self.parts, plans, strict=True):
            if part.engine.capturing():
                keep_for_graph(part.engine, plan, self.memory, self.counter, gate)
        # Before the rest, because torch may find that it cannot.
        for row in self.loose:
            for own, live in zip(row, loose_live, strict=True):
                own.copy_(live)
        self._update(self.parts, plans, gate=gate)
        self.note_written()

    def note_written(self) -> None:
        """The kernels write to addresses: without this, autograd would not notice that a tensor it
        saved for backward has changed."""
        increment_version(self._versioned)

    def versions(self) -> list[int]:
        """How often the averages were written."""
        return [tensor._version for tensor in self._versioned]

    def _update(
        self,
        parts: Sequence[Part],
        plans: Sequence[Plan],
        counter: Tensor | None = None,
        gate: Gate | None = None,
    ) -> None:
        counter = self.counter if counter is None else counter
        if counter is not None:
            for part in parts:
                if not self._counts(part.engine.device):
                    part.engine.n_averaged.copy_(counter, non_blocking=True)
        apart = counter is not None and not any(self._counts(p.engine.device) for p in parts)
        if len(parts) == 1 and not apart:
            parts[0].engine.update(plans[0], gate)
            return
        before = [part.engine.progress() for part in parts]
        try:
            for part, plan in zip(parts, plans, strict=True):
                part.engine.update(plan, gate)
        except BaseException:
            # All devices or none: what the first one has taken in, the others take in too.
            left = [torch.equal(p.engine.progress(), b) for p, b in zip(parts, before, strict=True)]
            if not all(left):
                for part, plan, missing in zip(parts, plans, left, strict=True):
                    if missing:
                        part.engine.update(plan, gate)
                if apart and counter is not None:
                    counter.add_(1)
            raise
        if apart and counter is not None:
            counter.add_(1)

    @torch.no_grad()
    def update_with(
        self,
        memory: list[Tensor],
        counts: list[Tensor],
        live: Sequence[Tensor],
        gate: Gate | None = None,
    ) -> None:
        """:meth:`update` on given tensors, which a compiler may have put in the place of the
        averages' memory, the counters and the live tensors."""
        if self.is_own(memory, counts, live):
            self.update(gate)
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
            parts.append(Part(part.engine.with_memory(rows, n), part.members))
        plans = [part.engine.plan(part.of(live)) for part in parts]
        self._update(parts, plans, None if self.counter is None else counts[0], gate)

    def is_own(
        self, memory: Sequence[Tensor], counts: Sequence[Tensor], live: Sequence[Tensor]
    ) -> bool:
        """Whether these tensors are the averages' memory, the counters and the live tensors."""
        ours = [*self.memory.tensors, *self.counts, *self.live]
        theirs = [*memory, *counts, *live]
        return len(ours) == len(theirs) and all(
            a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True)
        )
