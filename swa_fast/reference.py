"""Every operator in plain PyTorch: the specification, the fallback and the test oracle.

Works on any device, for any strides, and in fp64. Nothing here imports the rest of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_"]


def _math_dtype(average: Tensor, source: Tensor) -> torch.dtype:
    """Arithmetic type of a pair: float64 as soon as one side is float64, else float32."""
    if torch.float64 in (average.dtype, source.dtype):
        return torch.float64
    return torch.float32


def average_(
    averages: list[Tensor], sources: list[Tensor], n_averaged: Tensor, decay: float | None
) -> None:
    r"""Running average of many tensors, in place.

    .. math::
        a \leftarrow \begin{cases} b & n = 0 \\ a + w\,(b - a) & n > 0 \end{cases}
        \qquad w = \begin{cases} 1/(n+1) & \text{decay is None (SWA)} \\
                                 1 - \text{decay} & \text{otherwise (EMA)} \end{cases}

    in float64 when either tensor of a pair is float64, else in float32, rounded once at the end.
    The choice between the two cases is made on the device: the function never waits for it.

    Args:
        averages: tensors :math:`a`, written.
        sources: tensors :math:`b`, one for each average, of its shape and on its device.
        n_averaged: one int64, :math:`n`; not changed.
        decay: None for equal weights, else the decay of the exponential average.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018 (equal weights).
    """
    for average, source in zip(averages, sources, strict=True):
        math = _math_dtype(average, source)
        n = n_averaged.to(average.device)
        one = torch.ones((), dtype=math, device=average.device)
        weight = one / (n + 1).to(math) if decay is None else one * (1.0 - decay)
        wide = source.to(math)
        updated = torch.lerp(average.to(math), wide, weight)
        average.copy_(torch.where(n == 0, wide, updated))
