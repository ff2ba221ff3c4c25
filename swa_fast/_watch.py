"""Notices tensors that moved, changed type or were replaced, before their addresses are used."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends

__all__ = ["Watch"]


# Where modules keep their parameters, buffers and children.
_PLACES = ("_parameters", "_buffers", "_modules")

Place = tuple[dict[str, Any], str]

# The piece of a DTensor.
_inner = operator.attrgetter("_local_tensor")


class Watch:
    """Notices when tensors move or change type, or module dictionaries change their contents or are
    replaced.

    Args:
        tensors: held as Python objects, so that an assignment to ``.data`` is seen, and no other
            reference to them is taken, so that ``torch.utils.swap_tensors`` works.
        places: of dictionaries, such as the ``_parameters`` of modules: each the value of a key of
            another dictionary.
        wrapped: tensors of which some of ``tensors`` are the inner ones.

    Raises:
        TypeError, RuntimeError, ValueError: a tensor has no address.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        places: Iterable[Place],
        wrapped: Sequence[Tensor] = (),
    ) -> None:
        self._wrapped, self._inner = wrapped, [_inner(tensor) for tensor in wrapped]
        found = [(owner, key, owner[key], _flat_items(owner[key])) for owner, key in places]
        self._dictionaries = tuple(each for each in found if isinstance(each[2], dict))
        # A scripted module's are no dictionaries, but look like ones.
        self._others = [each for each in found if not isinstance(each[2], dict)]
        self._tensors = tuple(tensors)  # the extension borrows them
        # Those whose values may come to be lazily conjugated or negated where they lie.
        self._lazy = [tensor for tensor in tensors if _may_be_lazy(tensor)]
        self._bits = [_bits(tensor) for tensor in self._lazy]
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

    @property
    def looks(self) -> tuple[Callable[[], bool] | None, object, object] | None:
        """For ``swa_fast._C.update``: what tells of the rest that the extension does not look at,
        if there is any, and what it looks at."""
        if self._extension is None:
            return None
        rest = self.rest_holds if self._lazy or self._wrapped or self._others else None
        return rest, self._contents, self._facts

    def rest_holds(self) -> bool:
        """True while nothing has changed that the extension does not look at."""
        if self._lazy and self._bits != [_bits(tensor) for tensor in self._lazy]:
            return False
        if self._wrapped and not all(map(operator.is_, map(_inner, self._wrapped), self._inner)):
            return False
        return not self._others or all(map(_same, self._others))

    def holds(self) -> bool:
        """True while nothing has changed."""
        if not self.rest_holds():
            return False
        if self._extension is not None:
            held: bool = self._extension.unchanged(self._contents, self._facts)
            return held
        try:
            looks = [self._look(tensor) for tensor in self._tensors]
        except RuntimeError:  # such as one that has become sparse
            return False
        return looks == self._facts and all(map(_same, self._dictionaries))

    @staticmethod
    def places_of(module: nn.Module) -> Iterator[Place]:
        """Where the modules of a tree keep their parameters, buffers and children."""
        for child in module.modules():
            for key in _PLACES:
                if key in child.__dict__:
                    yield child.__dict__, key


def _flat_items(dictionary: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(itertools.chain.from_iterable(dictionary.items()))


def _same(expected: tuple[dict[str, Any], str, Mapping[str, Any], tuple[object, ...]]) -> bool:
    owner, key, dictionary, items = expected
    if owner.get(key) is not dictionary:
        return False
    now = _flat_items(dictionary)
    # By identity, because tensors compare elementwise; names come anew from a scripted module.
    return len(now) == len(items) and all(
        a is b or (isinstance(a, str) and a == b) for a, b in zip(now, items, strict=True)
    )


def _may_be_lazy(tensor: Tensor) -> bool:
    """Complex, or as every second real of something complex lies."""
    if tensor.is_complex():
        return True
    strides = (s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    return tensor.is_floating_point() and all(s % 2 == 0 for s in strides)


def _bits(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_conj(), tensor.is_neg()
