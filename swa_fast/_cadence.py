"""Which of many calls are to do something, counted where it can be known: on the host or, in
captured graphs and where a gradient scaler may skip a step, on the devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .storage import Storage

__all__ = ["Cadence", "Gate", "Place", "is_count"]

# A device, and which of the engines there: each counts for itself.
Place = tuple[torch.device, int]


@dataclass(frozen=True)
class Gate:
    """Decides at each place whether an update happens, see
    :func:`swa_fast.reference.update_`."""

    found_inf: Tensor | None  # one number, 0 if the optimiser's step was not skipped
    steps: dict[Place, Tensor]  # int64 [1] for each place; written
    every: int
    offset: int

    def on(self, place: Place) -> tuple[Tensor | None, Tensor, int, int]:
        """The arguments of a place's update."""
        device, found = place[0], self.found_inf
        if found is not None:
            found = found.to(device, torch.float32, non_blocking=device.type == "cuda")
        if place not in self.steps:  # the averages have moved
            self.steps[place] = next(iter(self.steps.values())).to(device, copy=True)
        return found, self.steps[place], self.every, self.offset


def is_count(value: object) -> TypeGuard[int]:
    """Whether this is an integer of 0 or more that a counter of 64 bits counts on from."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


class Cadence:
    """The calls of numbers ``start + every``, ``start + 2 every``, ..., counted from 1.

    Args:
        every: calls from one that does something to the next, at least 1.
        start: calls before the first that counts, at least 0.
        name: of the argument that ``every`` was, for messages.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, every: int, start: int, name: str = "every") -> None:
        for argument, value, least in ((name, every, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{argument}: expected an integer of at least {least}, found {value}"
                )
        self.every, self.start = every, start
        # Calls are counted here until one may have to be undone for what only the device knows, and
        # there from then on: captured graphs read this number as it was.
        self._counted = 0
        self._counting = True
        self._steps: dict[Place, Tensor] = {}
        # A call that is on the way, and how many updates had been tried before it.
        self._pending: tuple[int, int] | None = None

    def call(
        self,
        storage: Storage | None,
        update: Callable[[Gate | None], None],
        tried: Callable[[], int] | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Counts a call, and updates if it is one of those.

        Args:
            storage: of the averages, or None before it was made.
            update: takes the live tensors into the averages, if a gate lets it.
            tried: how many updates were done or tried. With it a call counts only if its update did
                not raise; without it counts in any case.
            found_inf: what a gradient scaler may skip this call for, or None.

        Raises:
            RuntimeError: a CUDA graph is captured whose replays could not be counted.
        """
        self.settle(tried)
        on_device = storage is not None and storage.decides_on_device
        capturing = storage is not None and storage.capturing()
        if capturing and not on_device and (self.every, self.start) != (1, 0):
            raise RuntimeError(
                "every, start: updates with a user's function are counted on the host, which the "
                "replays of a CUDA graph do not reach"
            )
        if not on_device:
            # Before the first update of an averaged model, and with users' functions: waits.
            if found_inf is not None and bool(found_inf):
                return
        elif found_inf is not None or capturing:
            self._counting = False
        if on_device and not capturing:
            assert storage is not None
            for place in storage.places:
                if place not in self._steps:
                    self._steps[place] = torch.full(
                        (1,), self._on_device(), dtype=torch.int64, device=place[0]
                    )
        if not self._counting and on_device:
            offset = self._counted + 1 - self.start - self.every
            update(Gate(found_inf, self._steps, self.every, offset))
            return
        now = self._counted + 1
        passed = now - self.start + (0 if self._counting else self._on_device())
        due = passed > 0 and passed % self.every == 0
        if due and tried is not None:
            self._pending = now, tried()
        else:
            self._counted = now
        if due:
            update(None)
        if self._pending is not None:
            self._counted, self._pending = now, None

    def settle(self, tried: Callable[[], int] | None) -> None:
        """Finds out whether an update that was interrupted took place, and counts its call then."""
        if self._pending is not None and tried is not None:
            now, before = self._pending
            if tried() > before:
                self._counted = now
            self._pending = None

    def _on_device(self) -> int:
        return max((int(steps) for steps in self._steps.values()), default=0)

    @property
    def calls(self) -> int:
        """Calls so far. May wait for the device."""
        return self._counted + self._on_device()

    @calls.setter
    def calls(self, number: int) -> None:
        self._pending = None
        if self._counting:
            self._counted = number
        # What was counted here stays, because captured graphs know it.
        for counter in self._steps.values():
            counter.fill_(number - self._counted)

    def describe(self) -> dict[str, int]:
        """Plain values, for checkpoints."""
        return {"every": self.every, "start": self.start, "calls": self.calls}
