"""The operators and the Python front that checks their arguments.

The only place that talks to :mod:`torch.library`. One schema, inferred from the signature in
:mod:`swa_fast.reference`, serves all backends; each backend is an overload of it
(``update_.reference``, ``update_.cpu``, ``update_.cuda``, ``update_.triton``), so that a traced
graph says which implementation it holds and a requested backend is never silently another one. The
C++ libraries only add implementations.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _backends, _layout, reference

__all__ = [
    "AVERAGE_DTYPES",
    "Updatable",
    "averagers",
    "batch_norm_collect",
    "batch_norm_merge_",
    "batch_norm_tickets",
    "combine_",
    "refresh_averager",
    "same_dense_layout",
    "swag_",
    "swap_",
    "update_",
    "update_averager",
]

AVERAGE_DTYPES = tuple(_layout.TYPE_CODES)

_library = torch.library.Library("swa_fast", "DEF")


def _update_fake(
    averages: Sequence[Tensor], sources: Sequence[Tensor], n_averaged: Tensor, *_: object
) -> None:
    torch._check(n_averaged.dtype == torch.int64)


def _swap_fake(
    averages: Sequence[Tensor], sources: Sequence[Tensor], table: Tensor, row: int, _: int = 0
) -> None:
    torch._check(0 <= row < table.shape[1] - _layout.SEGMENT_HEADER)


def _combine_fake(
    outputs: Sequence[Tensor], sources: Sequence[Tensor], coefficients: Tensor, *_: object
) -> None:
    torch._check(coefficients.shape == (len(outputs), len(sources)))


def _collect_fake(x: Tensor, *others: Any) -> Tensor:
    *_, normalise, batch, _ = others
    torch._check(x.dim() >= 2 and batch.shape == (4, x.shape[1]))
    torch._check(batch.dtype == torch.float64)
    return torch.empty_like(x) if normalise else x.new_empty(0)


def _merge_fake(accumulators: Tensor, batch: Tensor, estimator: int) -> None:
    torch._check(accumulators.dim() == 2 and accumulators.shape[0] == _layout.ACCUMULATOR_ROWS)
    torch._check(batch.shape == (_layout.BATCH_ROWS, accumulators.shape[1]))


def _in_kernels(module: str, name: str) -> Callable[..., Any]:
    """A Triton function, imported at its first call."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"swa_fast.kernels.{module}"), name)(*arguments)

    return call


# The reference, what it writes to, the fake kernel, and the file of the Triton kernels.
_FAMILIES: tuple[tuple[Callable[..., Any], tuple[str, ...], Callable[..., Any], str], ...]
_FAMILIES = (
    (reference.update_, ("averages", "n_averaged", "counters", "steps"), _update_fake, "update"),
    (reference.swag_, ("averages", "n_averaged", "counters", "steps"), _update_fake, "swag"),
    (reference.swap_, ("averages", "sources"), _swap_fake, "update"),
    (reference.batch_norm_collect, ("batch", "tickets"), _collect_fake, "batch_norm"),
    (reference.batch_norm_merge_, ("accumulators", "batch"), _merge_fake, "batch_norm"),
    (reference.combine_, ("outputs",), _combine_fake, "combine"),
)
for _function, _written, _fake, _module in _FAMILIES:
    _name: str = _function.__name__
    # Plain integers: what they are the sizes of is known to the table's addresses alone.
    _schema = torch.library.infer_schema(_function, mutates_args=_written).replace("SymInt", "int")
    for _backend in _backends.BACKENDS:
        _library.define(f"{_name}.{_backend}{_schema}")
        torch.library.register_fake(f"swa_fast::{_name}.{_backend}", _fake, lib=_library)
    _library.impl(f"{_name}.reference", _function, "CompositeExplicitAutograd")
    # Both keys, because Triton's interpreter runs the kernels on CPU tensors.
    _library.impl(f"{_name}.triton", _in_kernels(_module, _name), "CUDA")
    _library.impl(f"{_name}.triton", _in_kernels(_module, _name), "CPU")


class Updatable(Protocol):
    """What traced code updates."""

    def _refresh(self) -> None: ...

    def _update_with(
        self, averages: list[Tensor], counts: list[Tensor], sources: list[Tensor]
    ) -> None: ...


# Compiled code names an averager by its handle: a string, because integers may become symbols.
averagers: weakref.WeakValueDictionary[str, Updatable] = weakref.WeakValueDictionary()


@_backends.assume_constant_result
def refresh_averager(handle: str) -> bool:
    """Runs when an update is traced: the averager looks for what changed since its last update."""
    averagers[handle]._refresh()
    return True


def _update_averager(
    averages: list[Tensor], counts: list[Tensor], sources: list[Tensor], handle: str
) -> None:
    averagers[handle]._update_with(averages, counts, sources)


def define(
    name: str, function: Callable[..., None], written: tuple[str, ...]
) -> Callable[..., None]:
    """An operator for traced code, which runs ``function`` on any device."""
    _library.define(name + torch.library.infer_schema(function, mutates_args=written))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"swa_fast::{name}", lambda *_: None, lib=_library)
    operator: Callable[..., None] = getattr(torch.ops.swa_fast, name)
    return operator


# The update of a whole averager, for traced code. A compiler may hand over other memory than the
# averager's own: the operator reads and writes its arguments.
update_averager = define("update_averager", _update_averager, ("averages", "counts"))

_updates = {b: getattr(torch.ops.swa_fast.update_, b) for b in _backends.BACKENDS}
_swaps = {b: getattr(torch.ops.swa_fast.swap_, b) for b in _backends.BACKENDS}


def update_(backend: str, *arguments: Any) -> None:
    """:func:`swa_fast.reference.update_` by one backend."""
    _updates[backend](*arguments)


def swag_(backend: str, *arguments: Any) -> None:
    """:func:`swa_fast.reference.swag_` by one backend."""
    getattr(torch.ops.swa_fast.swag_, backend)(*arguments)


def swap_(backend: str, *arguments: Any) -> None:
    """:func:`swa_fast.reference.swap_` by one backend."""
    _swaps[backend](*arguments)


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
    if tensor.dtype not in AVERAGE_DTYPES:
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
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device and
            environment.

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
        # The stable ABI has no version counter: without this, autograd would not notice that a
        # tensor it saved for backward has changed.
        torch.autograd.graph.increment_version(batch)
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
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device and
            environment.

    Raises:
        TypeError: a dtype other than float64.
        ValueError: shapes, strides or devices that do not match; an unknown estimator.
        BackendError: the requested backend cannot serve the tensors.

    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
    recommendations", The American Statistician 37, 1983 (pooled).
    """
    if estimator not in _layout.ESTIMATORS:
        raise ValueError(
            f"estimator: expected one of {', '.join(_layout.ESTIMATORS)}, found {estimator!r}"
        )
    for name, tensor, rows in (
        ("accumulators", accumulators, _layout.ACCUMULATOR_ROWS),
        ("batch", batch, _layout.BATCH_ROWS),
    ):
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
        accumulators, batch, _layout.ESTIMATORS.index(estimator)
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((accumulators, batch))


@torch.no_grad()
def combine_(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    coefficients: Tensor,
    *,
    double_precision: bool = False,
    backend: str | None = None,
) -> None:
    r"""K weighted sums of r rows, :math:`y_k = \sum_j c_{kj} x_j`, in one pass over them.

    Reads :math:`r` and writes :math:`K` rows once: :math:`4 r + 4 K` bytes per fp32 element.

    Args:
        outputs: K tensors of float32, float64, bfloat16 or float16, contiguous, all of one number
            of elements and on one device; overwritten.
        sources: r tensors likewise, of the same number of elements; none may share memory with an
            output.
        coefficients: float64 [K, r] on the CPU.
        double_precision: sum in float64; else in float32, unless a tensor is float64.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device.

    Raises:
        TypeError: another dtype or layout.
        ValueError: sizes, devices or strides that do not match.
        BackendError: the requested backend cannot serve the tensors.
    """
    tensors = [*((t, f"outputs[{i}]") for i, t in enumerate(outputs))]
    tensors += [(t, f"sources[{j}]") for j, t in enumerate(sources)]
    if not outputs or not sources:
        raise ValueError(
            f"combine_: expected at least one output and one source, found {len(outputs)} and "
            f"{len(sources)}"
        )
    count, device = outputs[0].numel(), outputs[0].device
    for tensor, name in tensors:
        _check_floating(tensor, name)
        if tensor.numel() != count or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected {count} contiguous elements on {device} as outputs[0], found "
                f"shape {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    if coefficients.dtype != torch.float64:
        raise TypeError(f"coefficients: expected dtype float64, found {_dtype_name(coefficients)}")
    if coefficients.shape != (len(outputs), len(sources)) or coefficients.device.type != "cpu":
        raise ValueError(
            f"coefficients: expected shape ({len(outputs)}, {len(sources)}) on the CPU, found "
            f"{tuple(coefficients.shape)} on {coefficients.device}"
        )
    served = combine_backend(device, backend)
    getattr(torch.ops.swa_fast.combine_, served)(
        list(outputs), list(sources), coefficients.contiguous(), double_precision
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tuple(outputs))


def combine_backend(device: torch.device, requested: str | None = None) -> str:
    """Which backend serves :func:`combine_` on a device: by itself the first usable one, whatever
    ``SWA_FAST_BACKEND`` says, which is about where models are.

    Raises:
        BackendError: the requested one cannot.
        ValueError: there is no backend of that name.
    """
    if requested is None:
        own = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        usable = (b for b in own if _backends.why_unusable(b, device) is None)
        requested = next(usable, "reference")
    return _backends.choose_backend(device, requested)
