"""An average in the live tensors' place by pointer: they are set to its memory, no byte is moved.

Each of them is set to an alias of the average that has a storage object of its own, as long as the
tensor. So what a block does to storages, as ``share_memory_`` does, happens to the alias, never to
the average, and no copy or file mistakes model and average for one tensor. The live values stay
where they are, in memory that the plan of the bound tensors refers to.

To take the average out, every tensor that still lies in it gets its own memory back. That may be
done again at any time, so nothing has to be noted of how far an interrupted change went.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops
from ._applied import Applied, Pieces
from ._memory import overlapping
from .storage import Storage

__all__ = ["Pointed", "Pointers", "kind_of"]

_NAMED = 5  # of what does not fit, in a message


def kind_of(by: str, odd: str | None = None) -> type[Applied]:
    """How an average is put in place.

    Args:
        by: ``value`` or ``pointer``.
        odd: a tensor that torch alone can average, and what it is.

    Raises:
        ValueError: ``by`` is none of the names.
        TypeError: by pointer, where torch averages.
    """
    if by not in ("value", "pointer"):
        raise ValueError(f"by: expected 'value' or 'pointer', found {by!r}")
    if by == "pointer" and odd is not None:
        raise TypeError(f"applied: by='pointer' expected plain tensors, found that {odd}")
    return Pointed if by == "pointer" else Applied


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # such as one that has become sparse
        return -1


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return [_address(tensor) for tensor in tensors]


def _storage_address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # it has none
        return -1


def _alias(average: Tensor) -> Tensor:
    """The memory of a dense tensor in a storage of its own length."""
    size = average.element_size()
    first = average.storage_offset() * size
    memory = average.untyped_storage()[first : first + average.numel() * size]
    own = torch.empty(0, dtype=average.dtype, device=average.device)
    return own.set_(memory, 0, average.shape, average.stride())


def _misfits(storage: Storage, row: int) -> list[str]:
    """Which of the bound tensors cannot be set to the average's memory, and why."""
    found = []
    for part, plan in zip(storage.parts, storage.plans, strict=True):
        shared = overlapping(plan.sources)
        for at, i in enumerate(part.members):
            average, live, own = storage.averages[row][i], storage.live[i], plan.sources[at]
            problem = None
            if live.numel() == 0:
                continue
            if (average.dtype, average.device) != (live.dtype, live.device):
                problem = (
                    f"{average.dtype} on {average.device} in the average, {live.dtype} on "
                    f"{live.device} in the model"
                )
            elif at in shared:
                problem = "it shares memory with others, or with itself"
            elif own.is_conj() or own.is_neg() or not _ops.same_dense_layout(average, own):
                problem = f"strides {average.stride()} in the average, {live.stride()} in the model"
            elif live.is_inference() or average.is_inference():
                problem = "it was made in inference mode"
            elif own.untyped_storage().nbytes() != own.nbytes:
                problem = f"it is a part of a storage of {own.untyped_storage().nbytes()} bytes"
            elif live.device.type == "cpu" and live.is_shared():
                problem = "it is in shared memory, whose other processes would see the live values"
            if problem is not None:
                found.append(f"{storage.slots[i].name}: {problem}")
    if storage.loose_live:
        found.append(f"{len(storage.loose_live)} sparse, quantised or nested tensors")
    return found


def _refuse(found: Sequence[str]) -> None:
    if found:
        more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        raise ValueError(
            "applied: by='pointer' cannot set these tensors to the average's memory; use "
            "by='value'\n  " + "\n  ".join([*found[:_NAMED], *more])
        )


@dataclass
class Pointers:
    """What is set where, for one average and the tensors bound last.

    Attributes:
        at: the slots, without empty ones.
        homes: for each of them the live tensor's own memory.
        aliases: and the average's.
        addresses: of the aliases.
        own: addresses of the live tensors' storages.
        beside: the model's other tensors.
    """

    at: list[int]
    homes: list[Tensor]
    aliases: list[Tensor]
    addresses: list[int]
    own: frozenset[int]
    beside: list[tuple[str, Tensor]]

    @classmethod
    def of(cls, storage: Storage, row: int, pieces: Pieces) -> Pointers:
        """Of the tensors that the storage, which holds, is bound to.

        Raises:
            ValueError: they cannot be set to the average's memory.
        """
        _refuse(_misfits(storage, row))
        pairs = [
            (i, plan.sources[at])
            for part, plan in zip(storage.parts, storage.plans, strict=True)
            for at, i in enumerate(part.members)
            if plan.sources[at].numel() > 0
        ]
        # Also within inference mode, whose tensors nobody could be set to.
        with torch.inference_mode(False), torch.no_grad():
            aliases = [_alias(storage.averages[row][i]) for i, _ in pairs]
        return cls(
            [i for i, _ in pairs],
            [home for _, home in pairs],
            aliases,
            [alias.data_ptr() for alias in aliases],
            frozenset(_storage_address(home) for _, home in pairs),
            list(pieces.not_chosen()),
        )

    def holds(self) -> bool:
        """Whether the aliases are in the average. Who kept a tensor of an earlier block may have
        moved the alias's storage since, to shared memory say."""
        return _addresses(self.aliases) == self.addresses

    def check(self) -> None:
        """Refuses other tensors of the model in the memory of those that are set elsewhere.

        Raises:
            ValueError: there are some.
        """
        _refuse([
            f"{name}: it is not averaged and shares memory with what is"
            for name, tensor in self.beside
            if _storage_address(tensor) in self.own
        ])  # fmt: skip


class Pointed(Applied):
    """The live tensors of a storage are set to the memory of one average, and back to theirs."""

    _pointers: Pointers
    _targets: list[Tensor]

    def _put_in(self, storage: Storage, swap: bool) -> None:
        self._pieces.check_whole("applied: by='pointer'")
        if storage.capturing():
            raise RuntimeError(
                "applied: by='pointer' during the capture of a CUDA graph, whose replays would go "
                "on with the addresses of now; use by='value', or enter the block before"
            )
        pointers = storage.pointers.get(self.row)
        if pointers is None or not pointers.holds():
            pointers = Pointers.of(storage, self.row, self._pieces)
            storage.pointers[self.row] = pointers
        pointers.check()
        self._keep_left_out()
        self._pointers, self._targets = pointers, [storage.live[i] for i in pointers.at]
        self._storage = storage
        storage.applied = self
        # A graph of autograd refers to a parameter, not to its memory: without this, a backward on
        # the other side of the block's border would silently go on with other weights.
        torch.autograd.graph.increment_version(pointers.homes)
        for target, alias in zip(self._targets, pointers.aliases, strict=True):
            target.data = alias

    def _take_out(self, storage: Storage) -> None:
        pointers = self._pointers
        torch.autograd.graph.increment_version(pointers.homes)
        now = _addresses(self._targets)
        for target, home, there, address in zip(
            self._targets, pointers.homes, now, pointers.addresses, strict=True
        ):
            if there == address:
                target.data = home
        # The block may have written to the average through the live tensors.
        storage.note_written()
        if not storage.holds():
            self._back_to_what_moved(storage)

    def _back_to_what_moved(self, storage: Storage) -> None:
        """Tensor by tensor, as the model has them now: one that still lies in the average's memory
        is set to its own; one that was moved or retyped took a copy with it, which is written."""
        pointers = self._pointers
        live, _ = self._live_now(storage)
        ends = sorted(
            (address, address + alias.nbytes)
            for alias, address in zip(pointers.aliases, pointers.addresses, strict=True)
        )
        moved = []
        for i, home in zip(pointers.at, pointers.homes, strict=True):
            address = _address(live[i])
            before = bisect.bisect_right(ends, (address, 1 << 64)) - 1
            inside = before >= 0 and address < ends[before][1]
            if inside or address == home.data_ptr():
                self._attempt(functools.partial(setattr, live[i], "data", home))
            else:
                moved.append((i, home))
        if not self._returned:
            for i, _ in moved:
                # What is not averaged may have been renewed within the block.
                slot = storage.slots[i]
                if not slot.averaged and live[i].dtype == slot.dtype:
                    self._try(storage.averages[self.row][i], live[i])
            self._returned = True
        for i, home in moved:
            self._try(live[i], home)
        storage.unbind()
