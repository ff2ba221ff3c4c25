"""Notices tensors that moved, changed type or were replaced, before their addresses are used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends

__all__ = ["Watch"]


class Watch:
    """Notices when tensors move or change type, or module dictionaries change their contents.

    Args:
        tensors: held as Python objects, so that an assignment to ``.data`` is seen, and no other
            reference to them is taken, so that ``torch.utils.swap_tensors`` works.
        dictionaries: such as the ``_parameters`` of modules.
    """

    def __init__(self, tensors: Sequence[Tensor], dictionaries: Iterable[dict[str, Any]]) -> None:
        self._dictionaries = tuple(
            (d, tuple(itertools.chain.from_iterable(d.items()))) for d in dictionaries
        )
        self._tensors = tuple(tensors)
        self._extension = _backends.cpu_library()
        if self._extension is not None:
            self._contents = self._extension.contents(self._dictionaries)
            self._facts = self._extension.facts(self._tensors, ())
        else:
            self._facts = [self._look(tensor) for tensor in tensors]

    @staticmethod
    def _look(tensor: Tensor) -> tuple[object, ...]:
        if tensor.layout != torch.strided:
            return type(tensor), tensor.layout  # it has no address
        return type(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    def holds(self) -> bool:
        """True while nothing has changed."""
        if self._extension is not None:
            held: bool = self._extension.unchanged(self._contents, self._facts, self._tensors)
            return held
        # By identity, because tensors compare elementwise.
        looks = [self._look(tensor) for tensor in self._tensors]
        return looks == self._facts and all(
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
