"""What the time of an epoch is spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

#: The keys of a record's ``seconds``.
PHASES = ("data", "forward_backward", "optimizer", "average", "bn", "eval")


class Clock:
    """Seconds by phase. On a GPU they are measured by events on the stream, so that nothing waits
    before :meth:`read`; there they hold the work of the device and the time that it idled because
    the host came late.

    Args:
        device: the one that works.
        before: seconds to begin with, as :meth:`read` gave them.
    """

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = {**dict.fromkeys(PHASES, 0.0), **(before or {})}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._cuda:
            start = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((phase, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The sums so far. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for phase, start, end in self._events:
                self._seconds[phase] += start.elapsed_time(end) / 1e3
            self._events.clear()
        return dict(self._seconds)
