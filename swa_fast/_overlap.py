"""Averages on the CPU that follow a model on GPUs without making it wait.

Weights stand still from one step of the optimiser to the next. So their copies may be made straight
from the live tensors, by another stream, while the next forward and backward run:

1. after a step the side stream waits for the present one, and copies into pinned memory;
2. before the next step the present stream waits for the copies: on the device, and for nothing
   where they have ended;
3. a thread of the host waits for the copies and brings the averages up to date.

Buffers change in the forward, and small tensors would each be a copy of their own: one launch puts
both together in a buffer on the GPU, in the present stream. No weight of more than ``SMALL`` bytes
takes memory there. Over the bus go as many bytes as the model has.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._cadence import Gate
from ._memory import Slot, allocate, averages_in, bytes_of, dense_strides, is_plain
from .engine import Engine, Plan
from .rules import SWA

if TYPE_CHECKING:
    from .storage import Storage

__all__ = ["DEPTH", "SMALL", "Overlap", "Streams"]

#: Copies that may be on the way, each of the size of the model in pinned memory.
DEPTH = 2
#: Bytes of a tensor that is put together with others first.
SMALL = 256 << 10
_PAGE = 4096

_log = logging.getLogger("swa_fast")


class Streams:
    """What is asked of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def fork(self) -> None:
        """The side stream waits for what the present one has been given."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """On the side stream."""
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """An event after what the side stream has been given."""
        event = torch.cuda.Event()
        event.record(self._side)
        return event

    def hold(self, event: Any) -> None:
        """The present stream goes no further before the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def wait(self, event: Any) -> None:
        """The host goes no further before the event."""
        event.synchronize()

    def memory(self, size: int, owner: object) -> Tensor:
        """Pinned memory of this many bytes and no more, uint8 [size], until ``owner`` is gone.
        (torch's own allocator takes the next power of two.)"""
        memory = torch.empty(size + _PAGE, dtype=torch.uint8, device="cpu")
        memory = memory[-memory.data_ptr() % _PAGE :][:size]
        runtime: Any = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)) if size > 0 else 0
        if failed:
            _log.warning(
                "overlap: %.2f GB could not be pinned (CUDA error %d; see ulimit -l), so the "
                "copies are slower and wait for each other", size / 1e9, failed,
            )  # fmt: skip
        elif size > 0:
            weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
        return memory


class _Device:
    """What comes from one device in a round."""

    def __init__(
        self, streams: Any, tensors: Sequence[Tensor], together: Sequence[bool], owner: object
    ) -> None:
        self.streams = streams
        self.event: Any = None
        device = tensors[0].device
        slots = [Slot("", False, t.dtype, tuple(t.shape), dense_strides(t)) for t in tensors]
        first = [i for i, yes in enumerate(together) if yes]
        rest = [i for i, yes in enumerate(together) if not yes]
        sizes = [bytes_of([slots[i] for i in first]) if first else 0]
        sizes += [bytes_of([slots[i]]) for i in rest]
        pieces = streams.memory(sum(sizes), owner).split(sizes)
        self.copies: list[Tensor] = [tensors[0]] * len(tensors)
        self._gathers: list[tuple[Engine, Plan]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []  # targets and sources
        if first:
            of_first = [slots[i] for i in first]
            buffer = torch.empty(sizes[0], dtype=torch.uint8, device=device)
            memory = allocate(of_first, 1, device, buffer)
            engine = Engine(of_first, averages_in(of_first, memory), [SWA()], device)
            self._gathers.append((engine, engine.plan([tensors[i] for i in first])))
            self._pairs.append((pieces[0], buffer))
            there = averages_in(of_first, allocate(of_first, 1, torch.device("cpu"), pieces[0]))
            for i, copy in zip(first, there[0], strict=True):
                self.copies[i] = copy
        for i, piece in zip(rest, pieces[1:], strict=True):
            own = [slots[i]]
            copy = averages_in(own, allocate(own, 1, torch.device("cpu"), piece))[0][0]
            self.copies[i] = copy
            self._pairs.append((copy, tensors[i].detach()))
        self.found_inf = torch.zeros(1, device="cpu")

    def take(self, found_inf: Tensor | None) -> None:
        for engine, plan in self._gathers:
            engine.update(plan)
        self.streams.fork()
        for target, source in self._pairs:
            self.streams.copy(target, source)
        if found_inf is not None and found_inf.device == self.streams.device:
            self.streams.copy(self.found_inf, found_inf.detach().view(1))
        self.event = self.streams.mark()


class _Round:
    """One set of copies, and what becomes of it."""

    def __init__(self, storage: Storage, steady: Sequence[bool], make: Callable[..., Any]) -> None:
        self.live = list(storage.live)
        by_device: dict[torch.device, list[int]] = {}
        for i, tensor in enumerate(self.live):
            by_device.setdefault(tensor.device, []).append(i)
        copies = list(self.live)
        self.devices: list[_Device] = []
        for device, members in by_device.items():
            tensors = [self.live[i] for i in members]
            together = [
                not steady[i] or not is_plain(t) or t.nbytes <= SMALL
                for i, t in zip(members, tensors, strict=True)
            ]
            of_device = _Device(make(device), tensors, together, self)
            self.devices.append(of_device)
            for i, copy in zip(members, of_device.copies, strict=True):
                copies[i] = copy
        self.plans = [part.engine.plan(part.of(copies)) for part in storage.parts]
        self.future: concurrent.futures.Future[None] | None = None
        self.guarded = False
        self._steady = list(steady)
        self._versions: list[int] = []
        self._found: Tensor | None = None

    def _look(self) -> list[int]:
        return [
            0 if t.is_inference() else t._version
            for t, steady in zip(self.live, self._steady, strict=True)
            if steady
        ]

    def take(self, gate: Gate | None) -> Gate | None:
        """Starts the copies; the gate as the averages are to ask it."""
        found = None if gate is None else gate.found_inf
        for device in self.devices:
            device.take(found)
        self._found, self._versions, self.guarded = found, self._look(), False
        if gate is None or found is None:
            return gate
        for device in self.devices:
            if found.device == device.streams.device:
                found = device.found_inf
        return Gate(found, gate.steps, gate.every, gate.offset)

    def hold(self) -> None:
        for device in self.devices:
            device.streams.hold(device.event)

    def wait(self) -> None:
        for device in self.devices:
            device.streams.wait(device.event)

    def check(self) -> None:
        """Whether nobody wrote to the weights while they were on their way.

        Raises:
            RuntimeError: somebody did.
        """
        if not self.guarded and self._look() != self._versions:
            self.guarded = True  # said once
            raise RuntimeError(
                "overlap: weights were written while they were being copied, by something else "
                "than the step of an optimiser that the averager is attached to, so an average may "
                "hold a mixture; attach() every optimiser, and flush() before other writes"
            )


class Overlap:
    """The copies of a storage on the CPU that are on their way.

    Args:
        storage: all its averages on the CPU.
        make: gives what a device is asked by, see :class:`Streams`.
    """

    def __init__(self, storage: Storage, make: Callable[[torch.device], Any] = Streams) -> None:
        self._storage, self._make = storage, make
        self._streams: dict[torch.device, Any] = {}
        self._rounds: list[_Round] = []
        self._of: object = None  # the plans of the tensors that the rounds are of
        self._next = 0
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def _for(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = self._make(device)
        return self._streams[device]

    def pays(self) -> bool:
        """Whether anything comes from elsewhere, and all of it can be read by address."""
        storage = self._storage
        return not any(storage.loose) and any(t.device.type != "cpu" for t in storage.live)

    @torch.no_grad()
    def take(self, gate: Gate | None, steady: Callable[[Tensor], bool]) -> None:
        """Has the live tensors of the storage, which holds, taken into the averages soon. Comes
        after :meth:`guard`: what the last round had on the device is written again.

        Args:
            gate: see :meth:`Storage.update`.
            steady: whether a tensor changes in steps of the optimiser alone.

        Raises:
            RuntimeError: an earlier update failed, weights were written meanwhile, a CUDA graph is
                being captured, or the process was forked.
        """
        if os.getpid() != self._process:
            raise RuntimeError("overlap: the process was forked; make another averager there")
        if self._of is not self._storage.plans:
            kinds = [steady(tensor) for tensor in self._storage.live]
            self._rounds = [_Round(self._storage, kinds, self._for) for _ in range(DEPTH)]
            self._of = self._storage.plans
        if any(streams.capturing() for streams in self._streams.values()):
            raise RuntimeError(
                "overlap: a thread of the host has part in an update, which cannot be captured in "
                "a CUDA graph"
            )
        now = self._rounds[self._next]
        self._finish(now)
        gate = now.take(gate)
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "swa_fast")
        now.future = self._thread.submit(self._update, now, gate)
        self._next = (self._next + 1) % DEPTH

    @torch.no_grad()
    def _update(self, now: _Round, gate: Gate | None) -> None:
        now.wait()
        self._storage.update_by(now.plans, gate)

    def guard(self, *_: object) -> None:
        """Before a step of the optimiser: on the device it waits for the copies.

        Raises:
            RuntimeError: see :meth:`_Round.check`.
        """
        for each in self._rounds:
            if each.future is not None:
                each.check()
                each.hold()
                each.guarded = True

    def _finish(self, each: _Round) -> None:
        future, each.future = each.future, None
        if future is not None:
            future.result()

    def flush(self) -> None:
        """Waits until the averages have everything that was taken.

        Raises:
            RuntimeError: weights were written meanwhile; or whatever an update raised, which then
                has changed nothing.
        """
        if os.getpid() != self._process:
            return  # what was on its way there is not here
        errors: list[BaseException] = []
        for shift in range(len(self._rounds)):
            each = self._rounds[(self._next + shift) % DEPTH]
            for step in (each.check, lambda each=each: self._finish(each)):
                try:
                    if each.future is not None:
                        step()
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]
