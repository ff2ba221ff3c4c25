"""Averaging at the right moment: after an optimiser's step, if the gradient scaler let it be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._modules import Filter, Selection
from .rules import Rule

if TYPE_CHECKING:
    from .storage import Storage

__all__ = ["Attachable", "Attachment", "Gate", "attach", "blend_"]


@dataclass(frozen=True)
class Gate:
    """Decides on each device whether an update takes place, see
    :func:`swa_fast.reference.update_`."""

    found_inf: Tensor | None  # one number, 0 if the optimiser's step was not skipped
    steps: dict[torch.device, Tensor]  # int64 [1] for each device; written
    every: int
    offset: int

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor, int, int]:
        """The arguments of a device's update."""
        found = self.found_inf
        if found is not None:
            found = found.to(device, torch.float32, non_blocking=device.type == "cuda")
        if device not in self.steps:  # the averages have moved
            self.steps[device] = next(iter(self.steps.values())).to(device)
        return found, self.steps[device], self.every, self.offset


def _inner(optimizer: object) -> Optimizer:
    """The optimiser whose ``step`` runs, inside of accelerate's wrapper and the like.

    Raises:
        TypeError: no optimiser.
        ValueError: one that averages by itself.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, found {type(optimizer).__name__}"
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if any("train_mode" in group for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: found the schedule-free {type(optimizer).__name__}, whose weights after a "
            "step are not those that it is evaluated with; it keeps an average by itself, so call "
            "its eval() and update() where an average of that is wanted"
        )
    return optimizer


class Attachment:
    """Updates averages after an optimiser's steps, until :meth:`remove` or the end of a ``with``
    block. Made by ``attach`` of an averager or averaged model.

    Attributes:
        every, start: what ``attach`` was given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: Callable[[Gate | None], None],
        storage: Callable[[], Storage | None],
        every: int,
        start: int,
    ) -> None:
        for name, value, least in (("every", every, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, found {value}")
        self.every, self.start = every, start
        self._update, self._storage = update, storage
        # Steps are counted here until one may have been skipped for what only the device knows,
        # and there from then on: captured graphs read this number as it was.
        self._counted = 0
        self._counting = True
        self._steps: dict[torch.device, Tensor] = {}
        self._handle = _inner(optimizer).register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # There while a fused optimiser steps for a gradient scaler, which has it skip a step by
        # itself. Other optimisers' steps are not called at all when they are to be skipped.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        storage = self._storage()
        on_device = storage is not None and storage.decides_on_device
        capturing = storage is not None and storage.capturing()
        if not on_device:
            # Before the first update of an averaged model, and with users' functions: waits.
            if found_inf is not None and bool(found_inf):
                return
        elif found_inf is not None or capturing:
            self._counting = False
        if on_device and not capturing:
            assert storage is not None
            for device in storage.devices:
                if device not in self._steps:
                    self._steps[device] = torch.full(
                        (1,), self._on_device(), dtype=torch.int64, device=device
                    )
        if self._counting or not on_device:
            self._counted += 1
            passed = self._counted - self.start + (0 if self._counting else self._on_device())
            if passed > 0 and passed % self.every == 0:
                self._update(None)
            return
        offset = self._counted + 1 - self.start - self.every
        self._update(Gate(found_inf, self._steps, self.every, offset))

    def _on_device(self) -> int:
        return max((int(steps) for steps in self._steps.values()), default=0)

    @property
    def steps(self) -> int:
        """Steps of the optimiser since, but for those that the gradient scaler skipped. May wait
        for the device."""
        return self._counted + self._on_device()

    def state_dict(self) -> dict[str, int]:
        """What an exact continuation needs beside the averages' own state: how many steps were
        taken, where ``every`` or ``start`` make that matter."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`.

        Raises:
            ValueError: it is none.
        """
        steps = state_dict.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state_dict: expected the number of steps, found {steps!r}")
        if self._counting:
            self._counted = steps
        # What was counted here stays, because captured graphs know it.
        for counter in self._steps.values():
            counter.fill_(steps - self._counted)

    def remove(self) -> None:
        """No update any more."""
        self._handle.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(
    optimizer: object,
    update: Callable[[Gate | None], None],
    storage: Callable[[], Storage | None],
    every: int,
    start: int,
) -> Attachment:
    """See :meth:`Attachable.attach`.

    Args:
        optimizer: whose steps are followed.
        update: takes the live tensors into the averages, if a gate lets it.
        storage: of the averages, or None before it was made.
        every: as there.
        start: as there.
    """
    return Attachment(_inner(optimizer), update, storage, every, start)


def blend_(storage: Storage, row: int, g: float, keep: Filter | None) -> None:
    """See :meth:`Attachable.blend_`. All live tensors are changed, or none.

    Raises:
        ValueError: ``g`` outside [0, 1], or no tensor is left by ``keep``.
    """
    if not 0.0 <= g <= 1.0:
        raise ValueError(f"g: expected a number in [0, 1], found {g}")
    if isinstance(keep, str | re.Pattern):
        pattern = re.compile(keep)
        chosen: Callable[[str, Tensor], object] = lambda name, _: pattern.search(name)  # noqa: E731
    else:
        chosen = keep or (lambda *_: True)
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    seen: set[tuple[object, ...]] = set()
    for slot, live, average in zip(storage.slots, storage.live, storage.averages[row], strict=True):
        # Two parameters over the same memory are blended once.
        place = live.device, live.data_ptr(), live.numel()
        if slot.averaged and chosen(slot.name, live) and place not in seen:
            seen.add(place)
            targets.append(live.detach())
            sources.append(average.to(live.device))
    if not targets:
        raise ValueError("filter: expected at least one averaged tensor, found none")
    # One launch is all or nothing.
    dense = all(tensor.is_contiguous() for tensor in targets)
    one_launch = dense and len({tensor.device for tensor in targets}) == 1
    kept = [] if one_launch else [tensor.clone() for tensor in targets]
    from .avg_fns import multi_average_

    try:
        multi_average_(targets, sources, torch.zeros((), dtype=torch.int64), 1.0 - g)
    except BaseException:
        for target, value in zip(targets, kept, strict=False):
            target.copy_(value)
        raise


class Attachable:
    """What an averager does at an optimiser's steps, and to the live tensors at the end."""

    _rules: dict[str, Rule]
    _storage: Storage
    _selection: Selection

    def _update(self, given: None = None, gate: Gate | None = None) -> None:
        raise NotImplementedError

    def _refresh(self) -> None:
        raise NotImplementedError

    def _refuse_if_applied(self, what: str) -> None:
        raise NotImplementedError

    @property
    def n_averaged(self) -> dict[str, int]:
        raise NotImplementedError

    def attach(self, optimizer: Optimizer, *, every: int = 1, start: int = 0) -> Attachment:
        """Updates after the optimiser's steps ``start + every``, ``start + 2 every``, ..., counted
        from now on.

        A step that a ``GradScaler`` skipped, for an infinity in the gradients, leaves averages and
        counters alone and is not counted. Optimisers with ``fused=True`` skip on the device, and so
        does the update: it reads the scaler's ``found_inf`` there, in its one launch, and the
        device is not waited for. (With a user's function among the rules it is.)

        Args:
            optimizer: any of torch's kind; accelerate's wrapper of one is looked into. Its pickles
                and copies do not know of this.
            every: steps between two updates, at least 1.
            start: steps before the first that counts, at least 0.

        Returns:
            A handle with ``remove()``, and ``state_dict()`` for an exact continuation where
            ``every`` or ``start`` are given; also a context manager.

        Raises:
            TypeError: no optimiser.
            ValueError: an argument outside its range, or a schedule-free optimiser.
        """
        return attach(
            optimizer,
            lambda gate: self._update(gate=gate),
            lambda: self._storage,
            every,
            start,
        )

    @torch.no_grad()
    def blend_(self, name: str, g: float, *, filter: Filter | None = None) -> None:
        r"""Moves the live weights towards an average, :math:`w \leftarrow (1 - g)\,w + g\,a`, in
        float32 (float64 where either is) and one launch for each device.

        Args:
            name: of an average.
            g: in [0, 1].
            filter: which of the averaged tensors: a predicate of name and tensor, or a regular
                expression to be found in the name. None blends all; buffers and integers that are
                copied and not averaged keep their values.

        Raises:
            KeyError: there is no average of that name.
            RuntimeError: it has not been updated yet, or an average is applied at the moment.
            ValueError: ``g`` outside its range, or ``filter`` leaves nothing.
        """
        if name not in self._rules:
            raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
        self._refuse_if_applied("blend_")
        if self.n_averaged[name] == 0:
            raise RuntimeError(f"blend_: the average {name!r} has not been updated yet")
        self._selection.reshard()
        self._refresh()
        try:
            blend_(self._storage, list(self._rules).index(name), g, filter)
        finally:
            self._selection.publish()
