"""A model on an average, without a copy and without touching the model's own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

if TYPE_CHECKING:
    from ._modules import Selection
    from .rules import Rule
    from .storage import Storage

__all__ = ["View", "Views"]


class View:
    """The model of an averager, computing with one of its averages: called as the model is called.
    Made by :meth:`swa_fast.Averager.module`."""

    def __init__(self, averager: Views, name: str) -> None:
        self._averager, self._name = averager, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on the average as it is now.

        Raises:
            RuntimeError: the average has not been updated yet.
            KeyError: it was removed.
        """
        return self._averager._forward(self._name, args, kwargs)

    def __repr__(self) -> str:
        model = self._averager._selection.module
        return f"{type(model).__name__} on the average {self._name!r}"


class Views:
    """Models on the averages."""

    _rules: dict[str, Rule]
    _storage: Storage
    _selection: Selection

    @property
    def n_averaged(self) -> dict[str, int]:
        raise NotImplementedError

    def _named(self, tensors: list[Tensor], row: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def module(self, name: str) -> View:
        """The averager's model, computing with an average: ``averager.module("ema")(x)``.

        It stands for ``torch.func.functional_call(model, averager.averages["ema"], (x,))``: the
        live weights stay where they are, training may go on between two calls, and what the average
        leaves out (by ``filter``, or buffers with ``skip``) is the model's own. A forward computes
        in the model's dtypes and on its devices: where an average has another, it is converted at
        every call, which takes as much memory meanwhile. The modes are the model's: call
        ``model.eval()`` before evaluation. What a forward in training mode writes to buffers, such
        as BatchNorm statistics, is lost: neither average nor model change. Gradients reach the
        inputs alone. Of DistributedDataParallel, DataParallel and torch.compile it is the model
        inside that is called.

        Where the model is called many times between two updates, :meth:`applied` saves what a call
        costs here, some microseconds for each tensor.

        Args:
            name: of an average.

        Raises:
            KeyError: there is no average of that name.
            TypeError: the averager is one of tensors, not of a module, or of sharded parameters.
        """
        if name not in self._rules:
            raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
        if self._selection.module is None:
            raise TypeError("module: expected an averager of a module, found one of tensors")
        if self._selection.shards:
            raise TypeError("module: expected whole parameters, found sharded ones; use applied()")
        return View(self, name)

    def _forward(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self._rules:
            raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
        if not self._updated(name):
            raise RuntimeError(f"module: the average {name!r} has not been updated yet")
        model = self._selection.module
        assert model is not None
        with self._storage.lock, torch.no_grad():
            self._storage.settle()
            row = list(self._rules).index(name)
            tensors = self._named(self._storage.values_of(row), row)
            live = dict(model.named_parameters(remove_duplicate=False))
            buffers = dict(model.named_buffers(remove_duplicate=False))
            # Tied tensors stay one.
            converted: dict[int, Tensor] = {}
            for key, tensor in tensors.items():
                own = live.get(key, buffers.get(key))
                if own is None:
                    raise ValueError(f"{key}: in the average, not in the model")
                if id(tensor) not in converted:
                    now = tensor.detach().to(own.device, own.dtype)
                    # A forward may write to buffers.
                    converted[id(tensor)] = now.clone() if key in buffers else now
                tensors[key] = converted[id(tensor)]
            for key, own in live.items():
                tensors.setdefault(key, own.detach())
            for key, own in buffers.items():
                tensors.setdefault(key, own.detach().clone())
        return functional_call(model, tensors, args, kwargs)

    def _updated(self, name: str) -> bool:
        raise NotImplementedError
