"""Averages of weights: the drop-in :class:`AveragedModel` and its averaging functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends, _ops

__all__ = [
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
]

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1], found {decay}")


def _average_any_(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    n_averaged: Tensor,
    decay: float | None,
    backend: str | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """:func:`_ops.average_` extended to complex tensors (averaged as pairs of reals) and to
    integers and booleans (copied: a count or a mask has no meaningful mean)."""
    if all(average.dtype.is_floating_point for average in averages):
        _ops.average_(averages, sources, n_averaged, decay, backend=backend, names=names)
        return
    averaged: tuple[list[Tensor], list[Tensor], list[str]] = ([], [], [])
    copied: list[tuple[Tensor, Tensor]] = []
    for i, (average, source) in enumerate(zip(averages, sources, strict=True)):
        if average.is_complex() and source.is_complex():
            average = torch.view_as_real(average)
            source = torch.view_as_real(source.resolve_conj())
        elif not average.is_floating_point() and not average.is_complex():
            copied.append((average, source))
            continue
        averaged[0].append(average)
        averaged[1].append(source)
        averaged[2].append(f"pair {i}" if names is None else names[i])
    _ops.average_(averaged[0], averaged[1], n_averaged, decay, backend=backend, names=averaged[2])
    for average, source in copied:
        average.copy_(source)


# The averaging functions are instances rather than closures so that a model holding one can be
# pickled, and so that AveragedModel recognises them and takes the fused path.
@dataclass(frozen=True)
class _AvgFn:
    """Average of one tensor; equal weights when ``decay`` is None."""

    decay: float | None

    @torch.no_grad()
    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        if self.decay is None:
            return averaged + (current - averaged) / (num_averaged + 1)
        return self.decay * averaged + (1 - self.decay) * current


@dataclass(frozen=True)
class _MultiAvgFn:
    """Average of lists of tensors in place; equal weights when ``decay`` is None."""

    decay: float | None

    @torch.no_grad()
    def __call__(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        if self.decay is not None:
            # The function itself never looks at the count: the first update of an average is
            # its caller's business.
            num_averaged = torch.ones((), dtype=torch.int64)
        elif not isinstance(num_averaged, Tensor):
            num_averaged = torch.tensor(num_averaged, dtype=torch.int64)
        _average_any_(averaged, current, num_averaged, self.decay)


def get_swa_avg_fn() -> AvgFn:
    r"""The equal-weight average of one tensor, :math:`a + (b - a)/(n + 1)`, as a function
    ``(averaged, current, num_averaged) -> Tensor``. Drop-in for torch's function of this name."""
    return _AvgFn(None)


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    r"""The exponential average of one tensor, :math:`d\,a + (1 - d)\,b`, as a function
    ``(averaged, current, num_averaged) -> Tensor``. Drop-in for torch's function of this name.

    Raises:
        ValueError: ``decay`` outside [0, 1].
    """
    _check_decay(decay)
    return _AvgFn(decay)


def get_swa_multi_avg_fn() -> MultiAvgFn:
    r"""The equal-weight average of lists of tensors in place, :math:`a \leftarrow a + (b - a)/(n +
    1)`, as a function ``(averaged_list, current_list, num_averaged) -> None``. Drop-in for torch's
    function of this name; integer tensors are copied."""
    return _MultiAvgFn(None)


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    r"""The exponential average of lists of tensors in place, :math:`a \leftarrow d\,a + (1 -
    d)\,b`, as a function ``(averaged_list, current_list, num_averaged) -> None``. Drop-in for
    torch's function of this name; integer tensors are copied.

    Raises:
        ValueError: ``decay`` outside [0, 1].
    """
    _check_decay(decay)
    return _MultiAvgFn(decay)


def _by_device_and_dtype(
    averages: Sequence[Tensor], sources: Sequence[Tensor]
) -> Iterable[tuple[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]]:
    """Pairs grouped by the device and dtype of the average."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for average, source in zip(averages, sources, strict=True):
        group = groups.setdefault((average.device, average.dtype), ([], []))
        group[0].append(average)
        group[1].append(source)
    return groups.items()


def _copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    # Grouped, because foreach is fused only for lists of one device and dtype.
    for _, group in _by_device_and_dtype(targets, sources):
        torch._foreach_copy_(*group)


def _strip_wrappers(name: str) -> str:
    """``name`` without what wrappers put into it: ``module.`` in front (DataParallel and
    DistributedDataParallel), ``_orig_mod.`` anywhere (torch.compile, also of a submodule)."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _match(
    kind: str, averages: Iterable[tuple[str, Tensor]], model: Iterable[tuple[str, Tensor]]
) -> tuple[list[str], list[Tensor], list[Tensor], list[str]]:
    """Pairs tensors by name.

    Args:
        kind: "parameter" or "buffer", for messages.
        averages: named tensors of the average, each tensor once.
        model: named tensors of the model, tied ones under each of their names.

    Returns:
        names, averages, sources, and what does not fit, a line each.
    """
    pairs, named = list(averages), list(model)
    sources = dict(named)
    if not all(name in sources for name, _ in pairs):
        pairs = [(_strip_wrappers(name), tensor) for name, tensor in pairs]
        named = [(_strip_wrappers(name), tensor) for name, tensor in named]
        sources = dict(named)

    problems = []
    names, matched_averages, matched_sources = [], [], []
    unused = {id(tensor): name for name, tensor in reversed(named)}
    for name, average in pairs:
        source = sources.get(name)
        if source is None:
            problems.append(f"{kind} {name}: in the average, not in the model")
            continue
        unused.pop(id(source), None)
        if source.shape != average.shape:
            problems.append(
                f"{kind} {name}: shape {tuple(average.shape)} in the average, "
                f"{tuple(source.shape)} in the model"
            )
            continue
        names.append(name)
        matched_averages.append(average)
        matched_sources.append(source)
    problems += [f"{kind} {name}: in the model, not in the average" for name in unused.values()]
    return names, matched_averages, matched_sources, problems


class AveragedModel(nn.Module):
    r"""A copy of a model whose parameters are running averages. Drop-in for
    ``torch.optim.swa_utils.AveragedModel``: same arguments, attributes and state_dict keys.

    .. math::
        \bar w \leftarrow \begin{cases} w & n = 0 \\ \bar w + (w - \bar w)/(n + 1) & \text{SWA} \\
        d\,\bar w + (1 - d)\,w & \text{EMA} \end{cases} \qquad n \leftarrow n + 1

    Where it differs from torch's class, on purpose:

    * all parameters are updated by one kernel launch per device and dtype;
    * tensors are paired by name, and a model that does not fit is refused as a whole, instead of
      being paired by position;
    * with ``use_buffers=True`` the built-in rules copy integer buffers (``num_batches_tracked``)
      instead of averaging them into a truncated number;
    * ``n_averaged`` lives on the device of the model's first parameter when ``device`` is None, so
      that an update never waits for the device;
    * ``dtype`` keeps the average in another precision than the model.

    Args:
        model: the model to average. It is deep-copied.
        device: where the average lives; None keeps each tensor where it is.
        avg_fn: average of one tensor, ``(averaged, current, n_averaged) -> Tensor``.
        multi_avg_fn: average of lists of tensors in place, ``(averaged_list, current_list,
            n_averaged) -> None``, called once per device and dtype. At most one of the two; neither
            means equal weights.
        use_buffers: average the buffers like the parameters; False copies them at every update.
        dtype: dtype of the average's floating-point parameters and buffers, such as
            ``torch.float32`` for a bfloat16 model; None keeps the model's. float32, float64,
            bfloat16 or float16.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device. Not saved.

    Raises:
        AssertionError: both functions are given (as torch does).
        TypeError: ``dtype`` is none of the four.
        ValueError: no such backend.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: int | str | torch.device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("avg_fn, multi_avg_fn: expected at most one of the two")
        if dtype is not None and dtype not in _ops.AVERAGE_DTYPES:
            raise TypeError(f"dtype: expected one of {_ops.AVERAGE_DTYPES}, found {dtype}")
        if backend is not None and backend not in _backends.BACKENDS:
            raise ValueError(
                f"backend: expected one of {', '.join(_backends.BACKENDS)}, found {backend!r}"
            )
        self.module = copy.deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        if dtype is not None:
            # Not Module.to(dtype): that would drop the imaginary part of complex tensors.
            self.module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        if device is None:
            first = next(self.module.parameters(), None)
            device = None if first is None else first.device
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self.backend = backend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's forward."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's current weights into the average.

        Args:
            model: a model with the parameters and buffers of the one given to the constructor, on
                any device; it may be wrapped by DataParallel, DistributedDataParallel or
                torch.compile.

        Raises:
            ValueError: parameters or buffers that are missing, extra or of another shape, all
                named in one message.
            TypeError: a dtype that the built-in rules do not average.

        Nothing is written before everything has been checked.
        """
        names, averages, sources, problems = _match(
            "parameter",
            self.module.named_parameters(),
            model.named_parameters(remove_duplicate=False),
        )
        buffer_names, buffers, model_buffers, buffer_problems = _match(
            "buffer",
            self.module.named_buffers(),
            model.named_buffers(remove_duplicate=False),
        )
        problems += buffer_problems
        if problems:
            raise ValueError(
                "update_parameters: the model does not fit the average\n  " + "\n  ".join(problems)
            )
        if self.use_buffers:
            names, averages, sources = (
                names + buffer_names,
                averages + buffers,
                sources + model_buffers,
            )
        sources = [
            s if s.device == a.device else s.to(a.device)
            for s, a in zip(sources, averages, strict=True)
        ]

        rule = self.multi_avg_fn or self.avg_fn or _MultiAvgFn(None)
        if isinstance(rule, _AvgFn | _MultiAvgFn):
            _average_any_(averages, sources, self.n_averaged, rule.decay, self.backend, names)
        else:
            self._apply_user_function([a.detach() for a in averages], [s.detach() for s in sources])
        if not self.use_buffers:
            _copy_all_(buffers, model_buffers)
        self.n_averaged += 1

    def _apply_user_function(self, averages: list[Tensor], sources: list[Tensor]) -> None:
        # As torch does: the first update copies, and functions see every tensor, integers included.
        if self.n_averaged == 0:
            _copy_all_(averages, sources)
        elif self.multi_avg_fn is not None:
            for (device, _), group in _by_device_and_dtype(averages, sources):
                self.multi_avg_fn(*group, self.n_averaged.to(device))
        else:
            assert self.avg_fn is not None
            for average, source in zip(averages, sources, strict=True):
                n_averaged = self.n_averaged.to(average.device)
                average.copy_(self.avg_fn(average, source, n_averaged))
