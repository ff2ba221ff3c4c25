"""When a pass with a tolerance may end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import Statistics, eps_of, standard_errors

# A standard error estimated from fewer batches is itself off by half and more.
MIN_BATCHES = 4


class Convergence:
    """Compares the standard errors with a tolerance, without waiting for a GPU: there a comparison
    is started behind one batch and its outcome found behind a later one."""

    def __init__(self, statistics: Sequence[Statistics], tolerance: float) -> None:
        self.statistics = [(s, eps_of(s, s.device)) for s in statistics]
        self.tolerance = tolerance
        self.pending: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def reached(self) -> bool:
        if not self.pending:
            self.pending = [
                _copy_to_host(standard_errors(s.accumulators, s.estimator, eps))
                for s, eps in self.statistics
            ]
        if any(event is not None and not event.query() for _, event in self.pending):
            return False
        errors = [error for found, _ in self.pending for error in found.tolist()]
        self.pending = []
        # A statistic that is not finite stays so: the pass may as well end, with that error.
        return any(map(math.isnan, errors)) or max(errors) <= self.tolerance


def _copy_to_host(errors: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """``errors`` on the CPU, and the event after which they are there; None if they are already."""
    if errors.device.type != "cuda":
        return errors, None
    pinned = torch.empty(errors.shape, dtype=errors.dtype, pin_memory=True)
    pinned.copy_(errors, non_blocking=True)
    # torch.Event(errors.device) forgets the device's index, and records on the stream of whichever
    # device is the current one: it could be over before the copy has begun.
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(errors.device))
    return pinned, event
