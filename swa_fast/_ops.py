"""Schemas and fake kernels of every operator, and the Python front that checks their arguments.

The only place that talks to :mod:`torch.library`. One schema serves all backends; each backend is
an overload of it (``average_.reference``, ``average_.cpu``, ``average_.cuda``,
``average_.triton``), so that a traced graph says which implementation it holds and a requested
backend is never silently another one. The C++ libraries only add implementations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backends, reference

__all__ = ["AVERAGE_DTYPES", "average_"]

AVERAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_AVERAGE_DTYPES = frozenset(AVERAGE_DTYPES)
_CPU = torch.device("cpu")

_AVERAGE_SCHEMA = "(Tensor(a!)[] averages, Tensor[] sources, Tensor n_averaged, float? decay) -> ()"

_library = torch.library.Library("swa_fast", "DEF")


def _average_fake(
    averages: Sequence[Tensor], sources: Sequence[Tensor], n_averaged: Tensor, decay: float | None
) -> None:
    torch._check(
        len(averages) == len(sources),
        lambda: f"average_: {len(averages)} averages but {len(sources)} sources",
    )
    for average, source in zip(averages, sources, strict=True):
        torch._check(average.shape == source.shape, lambda: "average_: shapes differ")


def _average_triton(
    averages: list[Tensor], sources: list[Tensor], n_averaged: Tensor, decay: float | None
) -> None:
    from .kernels import average

    average.average_(averages, sources, n_averaged, decay)


for _backend in _backends.BACKENDS:
    _library.define(f"average_.{_backend}{_AVERAGE_SCHEMA}")
    torch.library.register_fake(f"swa_fast::average_.{_backend}", _average_fake, lib=_library)
_library.impl("average_.reference", reference.average_, "CompositeExplicitAutograd")
# Both keys, because Triton's interpreter runs the kernels on CPU tensors.
_library.impl("average_.triton", _average_triton, "CUDA")
_library.impl("average_.triton", _average_triton, "CPU")


def _same_dense_layout(average: Tensor, source: Tensor) -> bool:
    """True when both tensors are gapless runs of memory with their elements in the same order."""
    if average.is_contiguous() and source.is_contiguous():
        return True
    # Strides of dimensions of size 1 carry no meaning, and exporters set them freely.
    strides = [
        (a, s)
        for a, s, n in zip(average.stride(), source.stride(), average.shape, strict=True)
        if n != 1
    ]
    if any(a != s for a, s in strides):
        return False
    sizes = [n for n in average.shape if n != 1]
    expected = 1
    for (stride, _), size in sorted(zip(strides, sizes, strict=True)):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_pair(average: Tensor, source: Tensor, name: str) -> None:
    if average.shape != source.shape:
        raise ValueError(
            f"{name}: the average has shape {tuple(average.shape)}, "
            f"the source {tuple(source.shape)}"
        )
    if average.device != source.device:
        raise ValueError(
            f"{name}: the average is on {average.device}, the source on {source.device}"
        )
    for role, tensor in (("average", average), ("source", source)):
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name}: the {role} has layout {tensor.layout}, expected torch.strided"
            )
        if tensor.dtype not in AVERAGE_DTYPES:
            expected = ", ".join(str(d).removeprefix("torch.") for d in AVERAGE_DTYPES)
            raise TypeError(
                f"{name}: the {role} has dtype {str(tensor.dtype).removeprefix('torch.')}, "
                f"expected one of {expected}"
            )


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    n_averaged: Tensor,
    decay: float | None = None,
    *,
    backend: str | None = None,
    names: Sequence[str] | None = None,
) -> None:
    r"""Moves every average towards its source, in place: one launch per device and dtype pair.

    .. math::
        a \leftarrow \begin{cases} b & n = 0 \\ a + w\,(b - a) & n > 0 \end{cases}
        \qquad w = \begin{cases} 1/(n+1) & \text{decay is None (SWA)} \\
                                 1 - \text{decay} & \text{otherwise (EMA)} \end{cases}

    computed in float32 (float64 when either tensor of a pair is float64) and rounded once.

    Args:
        averages: tensors of dtype float32, float64, bfloat16 or float16, on any devices, of any
            shapes and strides; written. Pairs that are dense and laid out alike go through the
            kernels; others through the reference.
        sources: one for each average, of its shape, on its device, of any of the four dtypes.
        n_averaged: one int64 :math:`n`, the number of sources averaged before. On the averages'
            device it is read there, without a synchronisation. Not changed.
        decay: in [0, 1], or None for equal weights.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by
            device and environment.
        names: what to call the pairs in error messages.

    Raises:
        TypeError: a dtype outside the four, a sparse tensor, or an ``n_averaged`` that is not one
            int64.
        ValueError: lists, shapes or devices that do not match; a decay outside [0, 1].
        BackendError: the requested backend cannot serve a tensor.

    All arguments are checked before the first write.
    """

    if len(averages) != len(sources):
        raise ValueError(
            f"averages and sources: expected two lists of equal length, "
            f"found {len(averages)} and {len(sources)} tensors"
        )
    if n_averaged.dtype != torch.int64 or n_averaged.numel() != 1:
        raise TypeError(
            f"n_averaged: expected one int64, found {tuple(n_averaged.shape)} {n_averaged.dtype}"
        )
    if decay is not None and not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1], found {decay}")

    # This loop is most of the cost of an update of many small tensors.
    groups: dict[tuple[str, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    chosen: dict[torch.device, str] = {}
    for i, (average, source) in enumerate(zip(averages, sources, strict=True)):
        device = average.device
        if (
            average.shape != source.shape
            or source.device != device
            or average.dtype not in _AVERAGE_DTYPES
            or source.dtype not in _AVERAGE_DTYPES
            or average.layout is not torch.strided
            or source.layout is not torch.strided
        ):
            _check_pair(average, source, f"pair {i}" if names is None else names[i])
        served = chosen.get(device)
        if served is None:
            served = chosen[device] = _backends.choose_backend(device.type, backend)
        if served != "reference" and not _same_dense_layout(average, source):
            served = "reference"
        group = groups.get((served, device))
        if group is None:
            group = groups[served, device] = ([], [])
        group[0].append(average)
        group[1].append(source)

    overloads = torch.ops.swa_fast.average_
    for (served, device), (group_averages, group_sources) in groups.items():
        # A counter on the CPU is an argument of the launch; one elsewhere has to be brought.
        n = n_averaged if n_averaged.device in (device, _CPU) else n_averaged.to(device)
        getattr(overloads, served)(group_averages, group_sources, n, decay)
    if not torch.compiler.is_compiling():
        # The stable ABI has no version counter: without this, autograd would not notice that a
        # tensor it saved for backward has changed.
        torch.autograd.graph.increment_version(list(averages))
