"""Averaging at the right moment: after an optimiser's step, if the gradient scaler let it be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._cadence import Cadence, Gate, is_count
from ._lent import Source
from ._modules import Filter, Selection
from .rules import Rule

if TYPE_CHECKING:
    from .storage import Storage

__all__ = ["Attachable", "Attachment", "Gate", "attach", "blend_"]

# Memory, counters and sources in the place of an averager's own.
Given = tuple[list[Tensor], list[Tensor], list[Tensor]]


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
        cadence: Cadence,
        tried: Callable[[], int] | None,
    ) -> None:
        self.every, self.start = cadence.every, cadence.start
        self._update, self._storage, self._tried = update, storage, tried
        self._cadence = cadence
        self._handles = [
            _inner(optimizer).register_step_pre_hook(self._before_step),
            _inner(optimizer).register_step_post_hook(self._after_step),
        ]

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        storage = self._storage()
        if storage is not None and storage.overlap is not None:
            storage.overlap.guard()

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # There while a fused optimiser steps for a gradient scaler, which has it skip a step by
        # itself. Other optimisers' steps are not called at all when they are to be skipped.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        self._cadence.call(self._storage(), self._update, self._tried, found_inf)

    @property
    def steps(self) -> int:
        """Steps of the optimiser since, but for those that the gradient scaler skipped. May wait
        for the device."""
        self._settle()
        return self._cadence.calls

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
        if not is_count(steps):
            raise ValueError(f"state_dict: expected the number of steps, found {steps!r}")
        self._settle()
        self._cadence.calls = steps

    def remove(self) -> None:
        """No update any more."""
        for handle in self._handles:
            handle.remove()
        self._settle()

    def _settle(self) -> None:
        storage = self._storage()
        if storage is not None:
            storage.settle()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(
    optimizer: object,
    update: Callable[[Gate | None], None],
    storage: Callable[[], Storage | None],
    cadence: Cadence,
    tried: Callable[[], int] | None = None,
) -> Attachment:
    """See :meth:`Attachable.attach`.

    Args:
        optimizer: whose steps are followed.
        update: takes the live tensors into the averages, if a gate lets it.
        storage: of the averages, or None before it was made.
        cadence: which steps.
        tried: see :meth:`Cadence.call`.
    """
    return Attachment(_inner(optimizer), update, storage, cadence, tried)


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
    _cadence: Cadence | None = None
    _calls: int | None

    def _update(
        self,
        given: Given | None = None,
        gate: Gate | None = None,
        decay: float | Mapping[str, float] | None = None,
        source: Source | None = None,
    ) -> None:
        raise NotImplementedError

    def _tried(self) -> int:
        raise NotImplementedError

    def _refresh(self) -> None:
        raise NotImplementedError

    def _refuse_if_applied(self, what: str) -> None:
        raise NotImplementedError

    @property
    def n_averaged(self) -> dict[str, int]:
        raise NotImplementedError

    def _call(
        self,
        given: Given | None = None,
        decay: float | Mapping[str, float] | None = None,
        source: Source | None = None,
    ) -> None:
        """An update, if the averager's own count of calls says so."""
        cadence = self._cadence
        if cadence is None:
            self._update(given, None, decay, source)
            return
        with self._storage.lock:
            self._refuse_if_applied("update")
            cadence.call(
                self._storage,
                lambda gate: self._update(given, gate, decay, source),
                self._tried,
            )

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
            start: steps before the first that counts, at least 0. Both stay as they are where the
                averager has ``update_every`` or ``start`` of its own: its steps are then calls of
                ``update``, counted in its own state.

        Returns:
            A handle with ``remove()``, and ``state_dict()`` for an exact continuation where
            ``every`` or ``start`` are given; also a context manager.

        Raises:
            TypeError: no optimiser.
            ValueError: an argument outside its range, or a schedule-free optimiser.
        """
        own, given = self._cadence, Cadence(every, start)
        if own is not None and (every, start) != (1, 0):
            raise ValueError(
                "every, start: expected 1 and 0 beside the averager's own update_every="
                f"{own.every} and start={own.start}, found {every} and {start}"
            )
        return attach(
            optimizer,
            self._after_step,
            lambda: self._storage,
            given if own is None else own,
            None if own is None else self._tried,
        )

    def _after_step(self, gate: Gate | None) -> None:
        """Takes what an attached optimiser's step has left."""
        storage = self._storage
        if storage.overlap is None:
            self._update(gate=gate)
            return
        with storage.lock:
            self._refuse_if_applied("update")
            if not storage.holds():
                self._refresh()
            if not storage.overlap.pays():
                self._update(gate=gate)
                return
            module = self._selection.module
            buffers = set() if module is None else {id(buffer) for buffer in module.buffers()}
            self._calls = None
            storage.overlap.take(gate, lambda tensor: id(tensor) not in buffers)

    def flush(self) -> None:
        """Waits until the averages have all updates, where ``overlap`` lets them come later.

        Raises:
            RuntimeError: weights were written while they were being copied, so that an average may
                hold a mixture.
            Exception: what an update raised that was on its way; it has changed nothing.
        """
        with self._storage.lock:
            self._storage.settle()

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
