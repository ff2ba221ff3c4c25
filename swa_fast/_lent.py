"""Another model's tensors in the place of the bound ones for an update."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._watch import Watch

if TYPE_CHECKING:
    from ._modules import Selection
    from .storage import Storage

__all__ = ["Lent", "Source"]

Source = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Lent:
    """How averages are taken from tensors other than those that their storage is bound to.

    Args:
        storage: of the averages.
        selection: of the tensors.
        live: the tensors, one for each slot.
        loose: what is copied by torch.

    Raises:
        TypeError, ValueError, RuntimeError: see :meth:`Storage.plans_for`.
    """

    def __init__(
        self, storage: Storage, selection: Selection, live: list[Tensor], loose: list[Tensor]
    ) -> None:
        module = selection.module
        places = () if module is None else Watch.places_of(module)
        self.live, self.loose = live, loose
        self.plans, self._watch = storage.plans_for(live, places, selection.sharded)
        self._given_away = storage.given_away
        # Tensors are held no longer than the model itself.
        self._module = None if module is None else weakref.ref(module, lambda _: self._drop())

    def _drop(self) -> None:
        self.live, self.loose, self.plans, self._module = [], [], [], None

    def serves(self, storage: Storage, module: nn.Module | None) -> bool:
        """Whether this is of that module, and everything is where it was. (Lists are not known
        again.)"""
        return (
            module is not None
            and self._module is not None
            and self._module() is module
            and self._given_away == storage.given_away
            and self._watch.holds()
        )

    @torch.no_grad()
    def follow(self, storage: Storage) -> None:
        """Goes by the rules as they are now."""
        for part, plan in zip(storage.parts, self.plans, strict=True):
            if plan.rules is not part.engine.rules:
                plan.rules.copy_(part.engine.rules)
