"""The means of windows, formed anew from the sources that are kept."""

from __future__ import annotations

from .engine import Engine, Plan
from .rules import Filled

__all__ = ["means_of"]


def means_of(engine: Engine) -> list[tuple[Engine, Plan]]:
    """What takes each source that a window keeps into the window's mean, in the order of the rows.

    The first one is copied and those that follow weigh 1/2, 1/3, ...: nothing of an earlier mean is
    left, so no error accumulates over the updates. How many there are is known to the device.

    Args:
        engine: with a :class:`~swa_fast.rules.Member` for each such source among its rules.
    """
    averaged = [i for i, slot in enumerate(engine.slots) if slot.averaged]
    slots = [engine.slots[i] for i in averaged]
    means = []
    for row, member in engine.members:
        taking = Engine(
            slots,
            [[engine.averages[member.window][i] for i in averaged]],
            [Filled(member.at)],
            engine.device,
            n_averaged=engine.n_averaged[member.window : member.window + 1],
            counted=False,
            backend=engine.requested,
        )
        means.append((taking, taking.plan([engine.averages[row][i] for i in averaged])))
    return means
