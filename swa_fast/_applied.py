"""An average in the place of the live tensors for a while, and back whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ._kept import Block, Kept, put
from .engine import Plan
from .storage import Part, Storage

__all__ = ["Applied", "applied"]

Prepare = Callable[[], tuple[Storage, int]]
Find = Callable[[], tuple[list[Tensor], list[Tensor]]]
LeftOut = Callable[[], Mapping[str, Tensor]]


class Pieces(Protocol):
    """Of parameters that several processes hold, see :class:`~swa_fast._modules.Selection`."""

    def reshard(self, force: bool = False) -> None: ...

    def publish(self) -> None: ...

    def agree(self, fine: bool) -> bool: ...

    def check_whole(self, what: str) -> None: ...

    def not_chosen(self) -> Iterable[tuple[str, Tensor]]: ...


class _Whole:
    """This process has everything."""

    def reshard(self, force: bool = False) -> None:
        pass

    def publish(self) -> None:
        pass

    def agree(self, fine: bool) -> bool:
        return fine

    def check_whole(self, what: str) -> None:
        pass

    def not_chosen(self) -> Iterable[tuple[str, Tensor]]:
        return ()


@contextlib.contextmanager
def applied(
    lock: threading.RLock,
    prepare: Prepare,
    find: Find,
    left_out: LeftOut,
    swap: bool,
    pieces: Pieces | None = None,
    kind: type[Applied] | None = None,
) -> Iterator[None]:
    """An average is in the live tensors for the time of a ``with`` block.

    Args:
        lock: of the averages.
        prepare: checks whether this may be, and returns the storage, bound to the live tensors, and
            which of its averages.
        find: the live tensors where they are now and the loose ones, asked for if one of them moved
            within the block.
        left_out: other tensors of the model by name, whose values are put back too.
        swap: the live values take the average's place meanwhile, where dtype, layout and device
            agree; False keeps a copy of them all.
        pieces: of sharded parameters; all their processes are in this together.
        kind: how it is done; None: by value.

    Raises:
        RuntimeError: the average was written within the block, a tensor was made such that its
            values could not be put back, or another process could not put its piece in place.
        ValueError: the model no longer fits; its values were put back where they were taken.
    """
    change = (kind or Applied)(find, left_out, _Whole() if pieces is None else pieces)
    # Twice, because an interrupt may come while the first is at work: the second goes on where that
    # one stopped, and does nothing where it was done.
    try:
        try:
            change.enter(lock, prepare, swap)
            yield
        finally:
            change.leave()
    finally:
        change.leave()
    change.report()


#: Those that began and have not been seen to end. Whoever waits for another has the live values,
#: also when nobody else knows its averager any more.
_open: set[Applied] = set()
_numbers = itertools.count()


class _Swap:
    """The swap on one device. One launch does the whole of it, so it is done or not; what an
    interrupt leaves unknown is asked from the marks, which the same launch swaps."""

    def __init__(self, part: Part, plan: Plan) -> None:
        self.part, self.plan = part, plan
        self._done: bool | None = False

    def done(self) -> bool:
        if self._done is None:
            self._done = bool(self.plan.marks[0, 0])
        return self._done

    def turn(self, row: int) -> None:
        then = not self.done()
        self._done = None
        self.part.engine.swap(self.plan, row)
        self._done = then

    @property
    def slots(self) -> list[tuple[int, int]]:
        """What is swapped: indices within the device and among all."""
        return [(at, self.part.members[at]) for at in self.plan.swapped]


class Applied:
    """The live tensors of a storage get the values of one average, and theirs back.

    Whatever is done is noted before, or can be asked for: :meth:`leave` may be called again after
    it was interrupted, and finishes then.

    Attributes:
        row: which average, once it is known.
    """

    def __init__(self, find: Find, left_out: LeftOut, pieces: Pieces) -> None:
        self.row = -1
        self._pieces = pieces
        self._find, self._find_left_out = find, left_out
        self._storage: Storage | None = None
        self._swaps: list[_Swap] = []
        self._blocks: list[tuple[Part, Plan, Block]] = []
        self._others: list[int] = []
        self._kept = self._loose_kept = Kept(())
        self._left_out: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._versions: list[int] = []
        self._copies: list[tuple[Tensor, int]] = []
        # Of the way back.
        self._looked = self._written = self._held = False
        self._live: tuple[list[Tensor], list[Tensor]] | None = None
        self._values: list[tuple[int, Tensor]] | None = None
        self._returned = False
        self._problems: list[Exception] = []
        # Of those of other averagers.
        self._tensors: list[Tensor] = []
        self._number = next(_numbers)
        self._left = False

    def enter(self, lock: threading.RLock, prepare: Prepare, swap: bool) -> None:
        """Puts the average in place, in all processes or in none.

        Raises:
            Whatever ``prepare`` raises, and what happens on the way: then :meth:`leave` undoes it.
        """
        try:
            self._enter(lock, prepare, swap)
        except BaseException:
            # The others would wait for this one in their first forward.
            self._pieces.agree(False)
            raise
        if not self._pieces.agree(True):
            raise RuntimeError(
                "applied: another process could not put its piece of the average in place"
            )

    @torch.no_grad()
    def _enter(self, lock: threading.RLock, prepare: Prepare, swap: bool) -> None:
        with lock:
            self._pieces.reshard()
            storage, self.row = prepare()
            self._tensors = storage.live
            for each in tuple(_open):
                if each._left and not each._is_open:  # an interrupt came at its very end
                    _open.discard(each)
            _open.add(self)
            self._put_in(storage, swap)
            self._pieces.publish()

    def _keep_left_out(self) -> None:
        self._left_out = {
            name: (tensor, _version(tensor), tensor.detach().clone())
            for name, tensor in self._find_left_out().items()
        }

    def _put_in(self, storage: Storage, swap: bool) -> None:
        self._storage = storage
        storage.applied = self
        # Every copy before the first write.
        pairs = list(zip(storage.parts, storage.plans, strict=True))
        # The reference works tensor by tensor, and could be interrupted in between.
        whole = [plan.backend != "reference" for _, plan in pairs]
        others = [
            part.members[at]
            for (part, plan), swaps in zip(pairs, whole, strict=True)
            for at in (plan.others if swaps else range(len(part.members)))
        ]
        # What is averaged comes last, and so is right where it overlaps with what is not.
        others.sort(key=lambda i: storage.slots[i].averaged)
        self._others = others
        self._kept = Kept([storage.live[i] for i in others])
        self._loose_kept = Kept(storage.loose_live)
        self._keep_left_out()
        served = [pair for pair, swaps in zip(pairs, whole, strict=True) if swaps]
        self._blocks = [
            (part, plan, Block(plan, part.engine.written[self.row], self.row))
            for part, plan in ([] if swap else served)
        ]
        self._swaps = [_Swap(*pair) for pair in (served if swap else [])]

        average = storage.averages[self.row]
        for each in self._swaps:
            each.turn(self.row)
        if self._swaps:
            storage.note_written()
        for _, _, block in self._blocks:
            block.fill()
        self._kept.fill([average[i] for i in others])
        if storage.loose:
            self._loose_kept.fill(storage.loose[self.row])
        self._versions = storage.versions() if self._swaps else []

    @torch.no_grad()
    def values(self) -> dict[int, Tensor]:
        """Copies of what lies in the live tensors' memory and is the average's, by slot. A write to
        one of them is found when the average goes back."""
        copies = {
            i: each.plan.sources[at].clone()
            for each in self._swaps
            if each.done()
            for at, i in each.slots
        }
        self._copies += [(copy, copy._version) for copy in copies.values()]
        return copies

    def leave(self) -> None:
        """Puts everything back, or has it put back once the block of another averager has ended
        that began later and has the same live tensors: it keeps this average as their values."""
        self._left = True
        self._leave()
        for each in sorted(_open, key=lambda each: -each._number):
            if each._left and each is not self:
                each._leave()
                self._problems += each._problems

    @property
    def _is_open(self) -> bool:
        return self._storage is not None and self._storage.applied is self

    def _covered(self) -> bool:
        later = [each for each in tuple(_open) if each._is_open and each._number > self._number]
        mine = {id(tensor) for tensor in self._tensors} if later else set()
        return any(not mine.isdisjoint(map(id, each._tensors)) for each in later)

    @torch.no_grad()
    def _leave(self) -> None:
        storage = self._storage
        if storage is None or not self._is_open or self._covered():
            return
        with storage.lock:
            self._attempt(lambda: self._pieces.reshard(force=True))
            self._take_out(storage)
            for name, now in self._find_left_out().items() if self._left_out else ():
                if name in self._left_out:
                    tensor, version, value = self._left_out[name]
                    if tensor is not now or version != _version(now):
                        self._try(now, value)
            self._attempt(self._pieces.publish)
            storage.applied = None
            _open.discard(self)

    def _take_out(self, storage: Storage) -> None:
        if not self._looked:
            self._written = bool(self._versions) and self._versions != storage.versions()
            self._written |= any(_version(copy) != was for copy, was in self._copies)
            self._held = storage.holds()
            self._looked = True
        if self._held:
            self._back()
        else:
            self._back_to_what_moved(storage)

    def _back(self) -> None:
        assert self._storage is not None
        for each in self._swaps:
            if each.done():
                each.turn(self.row)
        if self._swaps:
            self._storage.note_written()
        for _, _, block in self._blocks:
            block.restore()
        self._kept.restore()
        self._loose_kept.restore()

    def _live_now(self, storage: Storage) -> tuple[list[Tensor], list[Tensor]]:
        """The live tensors that the model has at the end of the block, and the loose ones."""
        if self._live is None:
            try:
                self._live = self._find()
            except (TypeError, ValueError) as error:
                self._problems.append(error)
                self._live = list(storage.live), list(storage.loose_live)
        return self._live

    def _back_to_what_moved(self, storage: Storage) -> None:
        """Tensor by tensor. What was swapped still lies where it was: a tensor that was moved or
        retyped took a copy with it."""
        live, loose = self._live_now(storage)
        swapped = [each for each in self._swaps if each.done()]
        if self._values is None:
            values = [
                (i, each.part.engine.written[self.row][at].clone())
                for each in swapped
                for at, i in each.slots
            ]
            values += [
                (part.members[at], value)
                for part, plan, block in self._blocks
                for at, value in zip(plan.swapped, block.values(), strict=True)
            ]
            self._values = values
        if not self._returned:
            for each in swapped:
                for at, i in each.slots:
                    # What is not averaged may have been renewed within the block.
                    renewed = live[i].dtype == storage.slots[i].dtype
                    source = each.plan.sources[at]
                    if renewed and not storage.slots[i].averaged:
                        source = live[i]
                    self._try(storage.averages[self.row][i], source)
            self._returned = True
        for i, value in self._values:
            self._try(live[i], value)
        for i, value in zip(self._others, self._kept.values, strict=False):
            self._try(live[i], value)
        for target, value in zip(loose, self._loose_kept.values, strict=False):
            self._try(target, value)
        storage.unbind()

    def _try(self, target: Tensor, value: Tensor) -> None:
        self._attempt(lambda: put([target], [value]))

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except RuntimeError as error:  # the others get their values all the same
            self._problems.append(error)

    def report(self) -> None:
        """Raises what was found on the way back.

        Raises:
            RuntimeError, ValueError: see :func:`applied`.
        """
        if self._problems:
            raise self._problems[0]
        if self._written:
            raise RuntimeError(
                "applied: an average was written while one was applied; if that one was written, "
                "the live weights now hold what was written"
            )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
