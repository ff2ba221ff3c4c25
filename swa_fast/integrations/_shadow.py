"""Lists of averaged parameters, as diffusers and torch-ema keep them, moved by one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swa_fast import EMA, Averager

__all__ = ["Shadow"]


class Shadow:
    r"""The average of a list of parameters, :math:`a \leftarrow d\,a + (1 - d)\,b` with a decay
    given at each update.

    Attributes:
        tensors: the averages, in the order of the parameters. They start as copies of those given.
    """

    def __init__(self, parameters: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        floating = {a.dtype for a in averages if a.is_floating_point()}
        # None keeps every parameter's own, which is what averages of several dtypes have.
        dtype = floating.pop() if len(floating) == 1 else None
        devices = {a.device for a in averages}
        self._averager = Averager(
            [(str(at), parameter) for at, parameter in enumerate(parameters)],
            # Of no consequence: every update is given its decay, which a moment's rounding to
            # nearest in 16 bits may swallow, here as there.
            {"ema": EMA(0.0)},
            dtype=dtype,
            device=devices.pop() if len(devices) == 1 else None,
        )
        # Counted as updated, so that the next update moves them instead of copying.
        self._averager.load_average("ema", list(averages), n_averaged=1)
        named = self._averager.averages["ema"]
        self.tensors = [named[str(at)] for at in range(len(self._parameters))]

    @staticmethod
    def can(parameters: Sequence[Tensor], averages: Sequence[Tensor]) -> bool:
        """Whether the averages are of a kind that is kept here: a tensor each, in the dtype of all
        or of their parameters, on one device or beside their parameters."""
        pairs = list(zip(parameters, averages, strict=False))
        dtypes = {a.dtype for a in averages}
        return (
            len(parameters) == len(averages) == len({id(p) for p in parameters}) > 0
            and all(p.shape == a.shape and p.layout == torch.strided for p, a in pairs)
            and all(p.is_floating_point() and a.is_floating_point() for p, a in pairs)
            and (len(dtypes) == 1 or all(p.dtype == a.dtype for p, a in pairs))
            # Averages of float64 parameters are float64 always.
            and all(p.dtype != torch.float64 or a.dtype == torch.float64 for p, a in pairs)
            and (
                len({a.device for a in averages}) == 1
                or all(p.device == a.device for p, a in pairs)
            )
            # Parameters whose parts are elsewhere, as DeepSpeed's.
            and not any(hasattr(p, "ds_id") for p in parameters)
        )

    def serves(self, parameters: Sequence[Tensor], averages: Sequence[Tensor]) -> bool:
        """Whether these are the lists that it stands for."""
        ours = (*self._parameters, *self.tensors)
        theirs = (*parameters, *averages)
        return len(ours) == len(theirs) and all(map(_is, ours, theirs))

    def update(self, decay: float) -> None:
        """Moves all averages, or none if it raises."""
        self._averager.update(decay=decay)


def _is(a: object, b: object) -> bool:
    return a is b
