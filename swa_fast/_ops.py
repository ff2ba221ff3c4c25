"""Schemas and fake kernels of every operator, and the Python front that checks their arguments.

The only place that talks to :mod:`torch.library`. One schema serves all backends; each backend is
an overload of it (``average_.reference``, ``average_.cpu``, ``average_.cuda``,
``average_.triton``), so that a traced graph says which implementation it holds and a requested
backend is never silently another one. The C++ libraries only add implementations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _backends, reference

__all__ = [
    "AVERAGE_DTYPES",
    "Updatable",
    "average_",
    "averagers",
    "batch_norm_collect",
    "batch_norm_merge_",
    "batch_norm_tickets",
    "exchange_",
    "refresh_averager",
    "same_dense_layout",
    "update_",
    "update_averager",
]

AVERAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_AVERAGE_DTYPES = frozenset(AVERAGE_DTYPES)
_CPU = torch.device("cpu")

_AVERAGE_SCHEMA = "(Tensor(a!)[] averages, Tensor[] sources, Tensor n_averaged, float? decay) -> ()"

# The fused update (swa_fast/engine.py). `table` holds addresses: of sources that the caller keeps
# alive. `sources` are the same memory as tensors and are read by the reference backend only.
_UPDATE_SCHEMA = (
    "(Tensor(a!)[] averages, Tensor(b!) state, Tensor rules, Tensor table, Tensor[] sources, "
    "int pairs, int? seed, bool guard, int short_runs=0) -> ()"
)
_EXCHANGE_SCHEMA = (
    "(Tensor(a!)[] averages, Tensor(b!)[] sources, Tensor table, int row, int short_runs=0) -> ()"
)

_COLLECT_SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool relu, bool normalise, "
    "Tensor(a!) batch, Tensor(b!)? tickets) -> Tensor"
)
_MERGE_SCHEMA = "(Tensor(a!) accumulators, Tensor(b!) batch, int estimator) -> ()"

_library = torch.library.Library("swa_fast", "DEF")
_library.define("watch(Tensor[] tensors) -> int")
_library.define(
    "update_averager(Tensor(a!)[] averages, Tensor(b!)[] states, Tensor[] sources, str handle) "
    "-> ()"
)


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


def _update_fake(
    averages: Sequence[Tensor],
    state: Tensor,
    rules: Tensor,
    table: Tensor,
    sources: Sequence[Tensor],
    pairs: int,
    seed: int | None,
    guard: bool,
    short_runs: int = 0,
) -> None:
    torch._check(all(a.dim() == 2 for a in averages))
    torch._check(state.dtype == torch.int64 and rules.dtype == torch.float64)


def _update_triton(
    averages: list[Tensor],
    state: Tensor,
    rules: Tensor,
    table: Tensor,
    sources: list[Tensor],
    pairs: int,
    seed: int | None,
    guard: bool,
    short_runs: int = 0,
) -> None:
    from .kernels import update

    update.update_(averages, state, rules, table, pairs, seed, guard)


def _exchange_fake(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    table: Tensor,
    row: int,
    short_runs: int = 0,
) -> None:
    torch._check(all(0 <= row < a.shape[0] for a in averages))


def _exchange_triton(
    averages: list[Tensor],
    sources: list[Tensor],
    table: Tensor,
    row: int,
    short_runs: int = 0,
) -> None:
    from .kernels import update

    update.exchange_(table, row)


def _collect_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    normalise: bool,
    batch: Tensor,
    tickets: Tensor | None,
) -> Tensor:
    torch._check(x.dim() >= 2 and batch.shape == (4, x.shape[1]))
    torch._check(batch.dtype == torch.float64)
    return torch.empty_like(x) if normalise else x.new_empty(0)


def _collect_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    normalise: bool,
    batch: Tensor,
    tickets: Tensor | None,
) -> Tensor:
    from .kernels import batch_norm

    return batch_norm.collect(x, weight, bias, eps, relu, normalise, batch, tickets)


def _merge_fake(accumulators: Tensor, batch: Tensor, estimator: int) -> None:
    torch._check(accumulators.dim() == 2 and accumulators.shape[0] == 9)
    torch._check(batch.shape == (4, accumulators.shape[1]))


def _merge_triton(accumulators: Tensor, batch: Tensor, estimator: int) -> None:
    from .kernels import batch_norm

    batch_norm.merge_(accumulators, batch, estimator)


_FAMILIES: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "average_": (_AVERAGE_SCHEMA, _average_fake, reference.average_, _average_triton),
    "update_": (_UPDATE_SCHEMA, _update_fake, reference.update_, _update_triton),
    "exchange_": (_EXCHANGE_SCHEMA, _exchange_fake, reference.exchange_, _exchange_triton),
    "batch_norm_collect": (
        _COLLECT_SCHEMA,
        _collect_fake,
        reference.batch_norm_collect,
        _collect_triton,
    ),
    "batch_norm_merge_": (
        _MERGE_SCHEMA,
        _merge_fake,
        reference.batch_norm_merge_,
        _merge_triton,
    ),
}
for _name, (_schema, _fake, _by_reference, _by_triton) in _FAMILIES.items():
    for _backend in _backends.BACKENDS:
        _library.define(f"{_name}.{_backend}{_schema}")
        torch.library.register_fake(f"swa_fast::{_name}.{_backend}", _fake, lib=_library)
    _library.impl(f"{_name}.reference", _by_reference, "CompositeExplicitAutograd")
    # Both keys, because Triton's interpreter runs the kernels on CPU tensors.
    _library.impl(f"{_name}.triton", _by_triton, "CUDA")
    _library.impl(f"{_name}.triton", _by_triton, "CPU")


class Updatable(Protocol):
    """What traced code updates."""

    def _refresh(self) -> None: ...

    def _update_with(
        self, averages: list[Tensor], states: list[Tensor], sources: list[Tensor]
    ) -> None: ...


# Compiled code names an averager by its handle: a string, because integers may become symbols.
averagers: weakref.WeakValueDictionary[str, Updatable] = weakref.WeakValueDictionary()


@_backends.assume_constant_result
def refresh_averager(handle: str) -> bool:
    """Runs when an update is traced: the averager looks for what changed since its last update."""
    averagers[handle]._refresh()
    return True


def _update_averager(
    averages: list[Tensor], states: list[Tensor], sources: list[Tensor], handle: str
) -> None:
    averagers[handle]._update_with(averages, states, sources)


_library.impl("update_averager", _update_averager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "swa_fast::update_averager", lambda averages, states, sources, handle: None, lib=_library
)


def update_averager(
    averages: list[Tensor], states: list[Tensor], sources: list[Tensor], handle: str
) -> None:
    """The update of a whole averager as one operator, for traced code. A compiler may hand over
    other memory than the averager's own: the operator reads and writes its arguments."""
    torch.ops.swa_fast.update_averager(averages, states, sources, handle)


_update_overloads = {b: getattr(torch.ops.swa_fast.update_, b) for b in _backends.BACKENDS}


def update_(
    backend: str,
    averages: list[Tensor],
    state: Tensor,
    rules: Tensor,
    table: Tensor,
    sources: list[Tensor],
    pairs: int,
    seed: int | None,
    guard: bool,
    short_runs: int = 0,
) -> None:
    r"""Every average of one device moves towards its sources, in one launch.

    For each average :math:`j` with :math:`n_j` updates before this one and each run of the table,
    with the weight :math:`w_j` of the average's rule at :math:`n_j`:

    .. math:: a \leftarrow a + w_j\,(b - a) \qquad n_j \leftarrow n_j + 1

    in float32 (float64 when either side is float64), rounded once; copied where :math:`w_j = 1` or
    the run is marked so.

    Args:
        backend: the overload to call.
        averages: one tensor of shape [k, elements] for each dtype, with 128-byte aligned rows;
            written.
        state: int64 [k + 3]: :math:`n_j`, a ticket, the guard's flag, skipped updates; written.
        rules: float64 [k, 8], see csrc/update.h; on the device for triton, else on the CPU.
        table: int64 [runs, 4], addresses and sizes, see csrc/update.h.
        sources: the runs' sources as one-dimensional tensors, for the reference backend.
        pairs: bit :math:`4a + s` is set if a run has the types :math:`a` and :math:`s` of 0
            (float32), 1 (float64), 2 (bfloat16), 3 (float16); what triton compiles for.
        seed: round bfloat16 averages stochastically with it; None rounds to nearest.
        guard: if an averaged source holds an infinity or NaN, write nothing but the count of
            skipped updates.
        short_runs: how many runs at the end of the table are short enough for one warp to read at
            once; what cuda shares the work by. The result does not depend on it.
    """
    _update_overloads[backend](
        averages, state, rules, table, sources, pairs, seed, guard, short_runs
    )
    # The stable ABI has no version counter, see average_.
    torch.autograd.graph.increment_version(averages)


def exchange_(
    backend: str,
    averages: list[Tensor],
    sources: list[Tensor],
    table: Tensor,
    row: int,
    short_runs: int = 0,
) -> None:
    """Exchanges the contents of the table's runs between average ``row`` and the sources.

    Args:
        backend: the overload to call.
        averages: as in :func:`update_`; written.
        sources: as in :func:`update_`; written.
        table: as in :func:`update_`; both sides of a run have one type.
        row: of ``averages``.
        short_runs: as in :func:`update_`.
    """
    getattr(torch.ops.swa_fast.exchange_, backend)(averages, sources, table, row, short_runs)
    torch.autograd.graph.increment_version(averages)


def same_dense_layout(average: Tensor, source: Tensor) -> bool:
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
            served = chosen[device] = _backends.choose_backend(device, backend)
        if served != "reference" and not same_dense_layout(average, source):
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


_ESTIMATORS = ("torch", "weighted", "pooled")  # as numbered in csrc/batch_norm.h


def is_dense(x: Tensor) -> bool:
    """Contiguous, or contiguous with the channels (dimension 1) innermost."""
    return (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or x.movedim(1, -1).is_contiguous()
    )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_floating(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected layout torch.strided, found {tensor.layout}")
    if tensor.dtype not in _AVERAGE_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in AVERAGE_DTYPES)
        raise TypeError(f"{name}: expected dtype {expected}, found {_dtype_name(tensor)}")


def batch_norm_tickets(device: torch.device | str, channels: int) -> Tensor:
    """What :func:`batch_norm_collect` counts finished blocks with: zeros before and after every
    call. A pass makes one for all its layers and hands each the slice of its channels; layers that
    may run at the same time must not share elements."""
    return torch.zeros(channels, dtype=torch.int32, device=device)


def check_batch_norm_collect(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, batch: Tensor, tickets: Tensor | None
) -> None:
    """Raises what :func:`batch_norm_collect` raises for these arguments."""
    _check_floating(x, "x")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"x: expected a shape [N, C, ...] with at least one element, found {tuple(x.shape)}"
        )
    device, channels = x.device, x.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        _check_floating(tensor, name)
        if tensor.shape != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), found {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected it on {device} as x, found {tensor.device}")
    if batch.dtype != torch.float64:
        raise TypeError(f"batch: expected dtype float64, found {_dtype_name(batch)}")
    if batch.shape != (4, channels) or batch.device != device or batch.stride(1) != 1:
        raise ValueError(
            f"batch: expected shape (4, {channels}) with stride 1 along the channels on {device}, "
            f"found shape {tuple(batch.shape)} with strides {batch.stride()} on {batch.device}"
        )
    if tickets is not None:
        if tickets.dtype != torch.int32:
            raise TypeError(f"tickets: expected dtype int32, found {_dtype_name(tickets)}")
        if tickets.shape != (channels,) or tickets.device != device or not tickets.is_contiguous():
            raise ValueError(
                f"tickets: expected a contiguous tensor of shape ({channels},) on {device}, "
                f"found shape {tuple(tickets.shape)} on {tickets.device}"
            )


@torch.no_grad()
def batch_norm_collect(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: Tensor,
    *,
    relu: bool = False,
    normalise: bool = True,
    tickets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    r"""BatchNorm in training mode that hands out its batch's statistics instead of a running
    average of them. For each channel with :math:`m` values:

    .. math::
        \mu = \frac1m \sum x \qquad M_2 = \sum (x - \mu)^2 \qquad
        y = \frac{x - \mu}{\sqrt{M_2 / m + \epsilon}}\,\gamma + \beta

    and with ``relu`` :math:`\max(y, 0)`. One read of ``x`` for the statistics, one read and one
    write for :math:`y`; at most two launches; the device is never waited for.

    Args:
        x: [N, C, ...] of float32, float64, bfloat16 or float16, not empty. Contiguous or
            channels-last as it is, anything else through a contiguous copy.
        weight: :math:`\gamma`, [C], of any of the four dtypes, or None for 1.
        bias: :math:`\beta`, likewise, or None for 0.
        eps: :math:`\epsilon`.
        batch: float64 [4, C] with stride 1 along the channels, on ``x``'s device; overwritten with
            the rows :math:`m`, N, :math:`\mu`, :math:`M_2`.
        relu: whether to clamp :math:`y` at 0.
        normalise: False leaves out :math:`y`: statistics only.
        tickets: [C] of :func:`batch_norm_tickets` on ``x``'s device, for the backends cuda and
            triton. None makes new ones, at the cost of a launch.
        backend: as for :func:`average_`.

    Returns:
        :math:`y` in ``x``'s dtype and memory format, or None without ``normalise``.

    Raises:
        TypeError: a dtype or layout other than the above.
        ValueError: shapes, strides or devices that do not match; an empty ``x``.
        BackendError: the requested backend cannot serve ``x``.
    """
    check_batch_norm_collect(x, weight, bias, batch, tickets)
    served = _backends.choose_backend(x.device, backend)
    if tickets is None and served in ("cuda", "triton"):
        tickets = batch_norm_tickets(x.device, x.shape[1])
    y: Tensor = getattr(torch.ops.swa_fast.batch_norm_collect, served)(
        x if is_dense(x) else x.contiguous(),
        weight if weight is None else weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        eps,
        relu,
        normalise,
        batch,
        tickets,
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(batch)  # see average_
    return y if normalise else None


@torch.no_grad()
def batch_norm_merge_(
    accumulators: Tensor, batch: Tensor, estimator: str, *, backend: str | None = None
) -> None:
    r"""Merges the statistics of one batch into those of the pass, all layers in one launch.

    With :math:`m, b, \mu_b, M_{2,b}` the batch's rows, :math:`s_b^2 = M_{2,b} / (m - 1)` (0 for
    :math:`m = 1`), and for each channel that the batch used (:math:`m > 0`)

    .. math::
        M \leftarrow M + m \qquad n \leftarrow n + b \qquad k \leftarrow k + 1

    with the values of :math:`M, n, k` before this on the right-hand sides below:

    ========  =====================================================================================
    torch     :math:`w = 1 / (k + 1)`: every batch weighs the same
    weighted  :math:`w = b / (n + b)`: every sample weighs the same. Both:
              :math:`\mu \leftarrow \mu + w (\mu_b - \mu)`,
              :math:`\sigma^2 \leftarrow \sigma^2 + w (s_b^2 - \sigma^2)`
    pooled    the statistics of all batches' values together. With :math:`d = \mu_b - \mu`:
              :math:`\mu \leftarrow \mu + d\,m / (M + m)`,
              :math:`M_2 \leftarrow M_2 + M_{2,b} + d^2 M m / (M + m)`
    ========  =====================================================================================

    and, for the standard errors of both statistics, mean and sum of squared deviations over the
    batches (Welford), of :math:`\mu_b` and of :math:`s_b^2`.

    Args:
        accumulators: float64 [9, channels], contiguous: :math:`M, n, k, \mu`, then
            :math:`\sigma^2` (pooled: :math:`M_2`), mean and sum of squared deviations of
            :math:`\mu_b`, mean and sum of squared deviations of :math:`s_b^2`. Zeros before the
            first batch; written.
        batch: float64 [4, channels], contiguous, as :func:`batch_norm_collect` leaves it. Row 0 is
            zeroed, so that a layer which the next batch does not use is not merged twice.
        estimator: ``torch``, ``weighted`` or ``pooled``.
        backend: as for :func:`average_`.

    Raises:
        TypeError: a dtype other than float64.
        ValueError: shapes, strides or devices that do not match; an unknown estimator.
        BackendError: the requested backend cannot serve the tensors.

    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
    recommendations", The American Statistician 37, 1983 (pooled).
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(
            f"estimator: expected one of {', '.join(_ESTIMATORS)}, found {estimator!r}"
        )
    for name, tensor, rows in (("accumulators", accumulators, 9), ("batch", batch, 4)):
        if tensor.dtype != torch.float64:
            raise TypeError(f"{name}: expected dtype float64, found {_dtype_name(tensor)}")
        if tensor.dim() != 2 or tensor.shape[0] != rows or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous tensor of shape [{rows}, channels], "
                f"found shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if accumulators.shape[1] != batch.shape[1] or accumulators.device != batch.device:
        raise ValueError(
            f"batch: expected {accumulators.shape[1]} channels on {accumulators.device} as "
            f"accumulators, found {batch.shape[1]} on {batch.device}"
        )
    served = _backends.choose_backend(batch.device, backend)
    getattr(torch.ops.swa_fast.batch_norm_merge_, served)(
        accumulators, batch, _ESTIMATORS.index(estimator)
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((accumulators, batch))
