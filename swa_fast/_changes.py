"""An averager that is changed while it lives: moved, converted, with more averages or fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _backends
from ._arguments import check_averages, check_settings
from ._cadence import Cadence
from ._memory import FlatMemory, SeparateMemory, Slot, average_dtype
from .by_name import check_patterns
from .rules import Rule, row_names

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._modules import Selection
    from .storage import Storage

__all__ = ["Changes"]


class Changes:
    """What changes an averager as a whole. Averages, counters and settings are those before or
    those after, whatever happens on the way."""

    _rules: dict[str, Rule]
    _storage: Storage
    _selection: Selection
    _dtype: torch.dtype | None
    _device: torch.device | None
    _backend: str | None
    _rounding: str
    _on_nonfinite: str | None
    _initial: bool = False
    _overlaps: bool = False
    _calls: int | None
    _seen: list[Tensor]
    _handle: str

    def _build(
        self, slots: list[Slot], memory: FlatMemory | SeparateMemory, loose: list[list[Tensor]]
    ) -> None:
        raise NotImplementedError

    def _check_that_all_move(self, rules: Mapping[str, Rule], slots: Sequence[Slot]) -> None:
        raise NotImplementedError

    def _current(self, selection: Selection | None = None) -> tuple[list[Tensor], list[Tensor]]:
        raise NotImplementedError

    def _refuse_if_applied(self, what: str) -> None:
        raise NotImplementedError

    def _raise_if_nonfinite(self, wait: bool = False) -> None:
        raise NotImplementedError

    def _settled_cadence(self) -> Cadence | None:
        raise NotImplementedError

    def to(
        self,
        device: int | str | torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Moves the averages, or converts them. Their counters go with them, and so do attached
        optimisers. The next update reads the model wherever it is then.

        Args:
            device: where the averages live from now on, as the constructor's ``device``; None
                leaves them where they are.
            dtype: of the averages of floating-point tensors, as the constructor's; None leaves it.

        Returns:
            The averager. What was taken from ``averages`` before is no longer part of it, and CUDA
            graphs that were captured before go on with the memory that it had.

        Raises:
            TypeError: such tensors cannot be averaged.
            ValueError: an average that would stand still in ``dtype``; a device without memory.
            RuntimeError: an average is applied at the moment, or the averager's backend cannot
                serve the device.
        """
        with self._storage.lock:
            self._refuse_if_applied("to")
            where, kind = self._device, self._dtype
            if device is not None:
                where = torch.empty(0, device=device).device
                if where.type == "meta":
                    raise ValueError("device: expected one with memory, found meta")
                if self._overlaps and where.type != "cpu":
                    raise ValueError(f"device: expected cpu, because of overlap, found {where}")
                _backends.choose_backend(where, self._backend)
            slots = list(self._storage.slots)
            if dtype is not None:
                check_settings(dtype, None, "copy", self._rounding, self._on_nonfinite, "skip")
                kind = dtype
                slots = self._converted(slots, dtype)
                self._check_that_all_move(self._rules, slots)
            self._change(self._rules, slots, where, kind, None)
        return self

    def _converted(self, slots: Sequence[Slot], dtype: torch.dtype) -> list[Slot]:
        names, tensors, _ = self._selection.collect()
        missing = [slot.name for slot in slots if slot.name not in names]
        if missing:
            raise ValueError(f"{', '.join(missing)}: in the average, not in the model")
        live = {name: tensors[at] for name, at in names.items()}
        return [replace(slot, dtype=average_dtype(live[slot.name], dtype)) for slot in slots]

    def add(self, name: str, rule: Rule) -> None:
        """One more average, beside those that there are. It starts as those of the constructor do:
        it holds the weights as they are now, which its first update (or ``count_initial``) counts.

        Args:
            name: of the average.
            rule: as for the constructor.

        Raises:
            TypeError: no rule.
            ValueError: there is an average of that name, there would be more than 16, it would
                stand still, or the model does not fit the averages.
            RuntimeError: an average is applied at the moment.

        As after :meth:`to`, tensors taken before are no longer part of the averager.
        """
        with self._storage.lock:
            self._refuse_if_applied("add")
            if name in self._rules:
                raise ValueError(
                    f"name: expected another than {', '.join(self._rules)}, found {name!r}"
                )
            rules = {**self._rules, name: rule}
            check_averages(rules, self._on_nonfinite)
            slots = list(self._storage.slots)
            check_patterns({name: rule}, slots)
            self._check_that_all_move({name: rule}, slots)
            self._change(rules, slots, self._device, self._dtype, self._current())

    def remove(self, name: str) -> None:
        """One average less; the memory of the others is allocated anew.

        Args:
            name: of the average.

        Raises:
            KeyError: there is no average of that name.
            ValueError: it is the only one.
            RuntimeError: an average is applied at the moment.

        As after :meth:`to`, tensors taken before are no longer part of the averager.
        """
        with self._storage.lock:
            self._refuse_if_applied("remove")
            if name not in self._rules:
                raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
            if len(self._rules) == 1:
                raise ValueError(f"name: expected one of several averages, found the only {name!r}")
            rules = {each: rule for each, rule in self._rules.items() if each != name}
            slots = list(self._storage.slots)
            self._change(rules, slots, self._device, self._dtype, None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _change(
        self,
        rules: dict[str, Rule],
        slots: list[Slot],
        device: torch.device | None,
        dtype: torch.dtype | None,
        live: tuple[list[Tensor], list[Tensor]] | None,
    ) -> None:
        """Makes another averager of this one's averages, and becomes it in one step. ``live`` is
        what averages that are new begin with."""
        self._raise_if_nonfinite(wait=True)
        self._settled_cadence()
        old = self._storage
        old.settle()
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._rules, new._device, new._dtype = rules, device, dtype
        before = {name: row for row, name in enumerate(row_names(self._rules))}
        names = row_names(rules)
        loose = []
        for name in names:
            source = old.loose[before[name]] if name in before else live[1] if live else []
            loose.append([tensor.detach().clone() for tensor in source])
        moved = self._device != device
        devices = [
            device if moved and device is not None else own.device for own in old.averages[0]
        ]
        new._build(slots, FlatMemory(slots, devices, len(names)), loose)
        for name, row in zip(names, new._storage.averages, strict=True):
            values = old.averages[before[name]] if name in before else live[0] if live else []
            for own, value in zip(row, values, strict=True):
                own.copy_(value)
        parts = {i: part for part in old.parts for i in part.members}
        first = 1 if self._initial else 0
        for part, seen in zip(new._storage.parts, new._seen, strict=True):
            engine = parts[part.members[0]].engine
            counts = engine.n_averaged.tolist()
            part.engine.n_averaged.copy_(
                torch.tensor(
                    [counts[before[name]] if name in before else first for name in names],
                    dtype=torch.int64,
                    device="cpu",
                )
            )
            part.engine.skipped.copy_(engine.skipped)
            seen.copy_(engine.skipped)
        new._calls, new._handle = None, self._handle
        new._storage.lock = old.lock
        self.__dict__.update(new.__dict__)
