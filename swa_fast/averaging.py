"""Averages of weights: :class:`Averager`, the engine, and :class:`AveragedModel`, the drop-in."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _backends, _ops
from .engine import MAX_AVERAGES, FlatAverages, Slot, Watch, dense_strides
from .rules import EMA, SWA, Rule, check_decay, describe_rule

__all__ = [
    "AveragedModel",
    "Averager",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
]

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]
Filter = Callable[[str, Tensor], bool] | str | re.Pattern[str]

_log = logging.getLogger("swa_fast")


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
    check_decay(decay)
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
    check_decay(decay)
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


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend not in _backends.BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(_backends.BACKENDS)}, found {backend!r}"
        )


def _stagnates(rule: Rule, dtype: torch.dtype) -> str | None:
    """Why an exponential average of this dtype, rounded to nearest, would stand still."""
    if not isinstance(rule, EMA) or not (dtype.is_floating_point or dtype.is_complex):
        return None
    resolution = torch.finfo(dtype).eps
    if rule.decay == 1.0 or 1.0 - rule.decay >= resolution:
        return None
    return (
        f"an EMA with decay {rule.decay} moves by {1.0 - rule.decay:.2g} of the difference at each "
        f"update, which is below the resolution {resolution:.2g} of {dtype}: it would be rounded "
        "away and the average would stand still"
    )


def _inner(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it is a parameter, in the order and with the names of the model's
    state_dict: tied tensors under each of their names, without non-persistent buffers."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, buffer, False


def _check_kind(name: str, tensor: object) -> None:
    """Refuses what has no memory of its own to be averaged."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if is_lazy(tensor):
        raise ValueError(f"{name}: not initialised yet; run a forward of the model first")
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{name}: found a {type(tensor).__name__}, expected a plain tensor; sharded and "
            "quantised parameters are not supported"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: found layout {tensor.layout}, expected torch.strided")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: it is on the meta device and has no values")


@dataclass(frozen=True)
class _Group:
    """The part of an average that lives on one device."""

    flat: FlatAverages
    members: tuple[int, ...]  # indices of its slots among all tensors

    def sources_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.members]


def _update_with(
    groups: Sequence[_Group],
    averages: Sequence[Tensor],
    states: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> None:
    """Updates every group, on given tensors: flat ones in the order of the groups, and sources in
    the order of all tensors."""
    rows = iter(averages)
    for group, state in zip(groups, states, strict=True):
        own = [next(rows) for _ in group.flat.rows]
        group.flat.update_with(own, state, group.sources_of(sources))


class _Exchange:
    """Live tensors and one average trade places, and back."""

    def __init__(self, groups: Sequence[_Group], row: int) -> None:
        self._groups = groups
        self._row = row
        self._applied_to: list[Tensor] = []
        self._kept: list[dict[int, Tensor]] = []
        # Tensors over memory that another one exchanges already are in neither.
        self._exchanged: list[frozenset[int]] = []

    def apply(self, tensors: Sequence[Tensor]) -> None:
        self._applied_to = list(tensors)
        for group in self._groups:
            rest = group.flat.exchange(self._row, group.sources_of(tensors))
            # Of another dtype or device: exchanged through a copy, because the average could not
            # hold the live values without a loss, or the other way round.
            self._exchanged.append(group.flat.exchanged)
            self._kept.append({i: source.clone() for i, source in rest})
            for i, source in rest:
                source.copy_(group.flat.view(self._row, i))

    def restore(self) -> None:
        """Undoes :meth:`apply` between the same tensors."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            sources = group.sources_of(self._applied_to)
            group.flat.exchange(self._row, sources)
            for i, live in kept.items():
                sources[i].copy_(live)

    def restore_into(self, tensors: Sequence[Tensor]) -> None:
        """Undoes :meth:`apply` tensor by tensor: the averages come back from the tensors that got
        them, wherever these lie now, and the live values go into ``tensors``."""
        for at, (group, kept) in enumerate(zip(self._groups, self._kept, strict=True)):
            pairs = zip(group.sources_of(self._applied_to), group.sources_of(tensors), strict=True)
            for i, (holder, target) in enumerate(pairs):
                if i in kept:
                    target.copy_(kept[i])
                elif i in self._exchanged[at]:
                    view = group.flat.view(self._row, i)
                    live = view.clone()
                    view.copy_(holder)
                    target.copy_(live)


class Averager:
    r"""Running averages of a model's weights, several at once, without a copy of the model.

    .. math::
        a_j \leftarrow a_j + w_j(n)\,(b - a_j) \quad\text{for each average } j, \qquad
        n \leftarrow n + 1

    with the weight :math:`w_j` of the average's rule, and :math:`w_j(0) = 1`. One launch per device
    updates all tensors of all averages, buffers and counters included, and reads every source once:
    :math:`4 + 8k` bytes per fp32 parameter for :math:`k` averages. An update does not wait for the
    device and can be captured in a CUDA graph or compiled by ``torch.compile(fullgraph=True)``.

    Sources are read where they are. A parameter that was moved, replaced or changed to another
    floating type is noticed at the next update.

    Args:
        params_or_module: a module, whose averages are named like its ``state_dict``; or tensors; or
            pairs of name and tensor. A tensor that appears under several names is averaged once.
        averages: rules by name, 1 to 16 of them: :class:`~swa_fast.SWA`, :class:`~swa_fast.EMA`, or
            a function ``(averages, sources, n_averaged) -> None`` that changes lists of tensors in
            place, called for each device and dtype. The function is called at every update; the
            first update then copies the sources over its result.
        dtype: of the averages of floating-point tensors: float32, float64, bfloat16 or float16.
            A float64 tensor's average is float64 all the same, complex tensors keep their dtype,
            and None keeps every tensor's own.
        device: where the averages live; None keeps each beside its tensor. On the CPU, an update of
            a model on a GPU waits once, for the copy of its tensors, which takes as much pinned
            memory and up to 256 MiB of the GPU's.
        buffers: ``copy`` keeps the last values, ``average`` averages floating-point buffers and
            copies integers and booleans, ``skip`` leaves buffers out.
        filter: which parameters and buffers to keep: a predicate of name and tensor, or a regular
            expression to be found in the name.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device.
        trainable_only: leave out parameters that do not require a gradient.
        unwrap: average the model inside DataParallel, DistributedDataParallel or torch.compile, so
            that names do not carry their prefixes.
        rounding: ``nearest``, or ``stochastic`` for bfloat16 averages: up with the probability of
            the distance from the next lower number, so that small steps are not lost on average.
        seed: of the stochastic rounding. Its random bits depend on the seed, the average, the
            element and the update alone, not on device, backend or the order of work.
        on_nonfinite: what happens when an averaged tensor holds an infinity or NaN: None averages
            it, ``skip`` leaves all averages and counters as they are, ``raise`` does the same and
            raises FloatingPointError: on the CPU at once, on a GPU, which is not waited for, at
            the first later ``update``, ``applied`` or ``state_dict`` that finds it.

    Raises:
        TypeError: a dtype or tensor that cannot be averaged.
        ValueError: an argument outside its range, no tensor left, or an EMA that could not move
            because ``1 - decay`` is below the resolution of ``dtype``.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018.
    """

    def __init__(
        self,
        params_or_module: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        averages: Mapping[str, Rule],
        *,
        dtype: torch.dtype | None = torch.float32,
        device: int | str | torch.device | None = None,
        buffers: str = "copy",
        filter: Filter | None = None,
        backend: str | None = None,
        trainable_only: bool = False,
        unwrap: bool = True,
        rounding: str = "nearest",
        seed: int = 0,
        on_nonfinite: str | None = None,
    ) -> None:
        if not averages or len(averages) > MAX_AVERAGES:
            raise ValueError(f"averages: expected 1 to {MAX_AVERAGES} rules, found {len(averages)}")
        for name, rule in averages.items():
            if not isinstance(rule, SWA | EMA) and not callable(rule):
                raise TypeError(
                    f"averages[{name!r}]: expected SWA, EMA or a function, found "
                    f"{type(rule).__name__}"
                )
        if dtype is not None and dtype not in _ops.AVERAGE_DTYPES:
            raise TypeError(f"dtype: expected None or one of {_ops.AVERAGE_DTYPES}, found {dtype}")
        _check_backend(backend)
        for argument, value, expected in (
            ("buffers", buffers, ("copy", "average", "skip")),
            ("rounding", rounding, ("nearest", "stochastic")),
            ("on_nonfinite", on_nonfinite, (None, "skip", "raise")),
        ):
            if value not in expected:
                raise ValueError(f"{argument}: expected one of {expected}, found {value!r}")
        if rounding == "stochastic" and dtype != torch.bfloat16:
            raise ValueError(f"rounding='stochastic': expected dtype torch.bfloat16, found {dtype}")
        if on_nonfinite is not None and any(
            not isinstance(rule, SWA | EMA) for rule in averages.values()
        ):
            raise ValueError(
                "on_nonfinite: expected None beside a user's function, which runs before the "
                f"check; found {on_nonfinite!r}"
            )

        self._rules = dict(averages)
        self._rounding = rounding
        self._seed = seed
        self._on_nonfinite = on_nonfinite
        self._dtype = dtype
        self._buffers = buffers
        self._keeps: Callable[[str, Tensor], object] | None = None
        if isinstance(filter, str | re.Pattern):
            pattern = re.compile(filter)
            self._keeps = lambda name, _: pattern.search(name)
        elif filter is not None:
            self._keeps = filter
        self._trainable_only = trainable_only
        self._device = None if device is None else torch.empty(0, device=device).device
        self._module: nn.Module | None = None
        self._listed: list[tuple[str, Tensor, bool]] = []
        if isinstance(params_or_module, nn.Module):
            self._module = _inner(params_or_module) if unwrap else params_or_module
        else:
            for i, item in enumerate(params_or_module):
                name, tensor = item if isinstance(item, tuple) else (str(i), item)
                self._listed.append((name, tensor, True))

        names, tensors, is_parameter = self._collect()
        if not tensors:
            found, left_out = self._left_out()
            raise ValueError(
                f"{found}: expected at least one tensor to average, found none{left_out}"
            )
        self._aliases = names
        first_names: dict[int, str] = {}
        for name, at in names.items():
            first_names.setdefault(at, name)
        slots = []
        for i, (tensor, parameter) in enumerate(zip(tensors, is_parameter, strict=True)):
            name = first_names[i]
            _check_kind(name, tensor)
            numeric = tensor.is_floating_point() or tensor.is_complex()
            averaged = (parameter or buffers == "average") and numeric
            slots.append(
                Slot(
                    name,
                    averaged,
                    self._average_dtype(tensor),
                    tuple(tensor.shape),
                    dense_strides(tensor),
                )
            )
            for average, rule in averages.items():
                reason = _stagnates(rule, slots[-1].dtype) if averaged else None
                if reason and rounding == "nearest":
                    raise ValueError(
                        f"averages[{average!r}]: {reason}; use dtype=torch.float32 or, for "
                        "bfloat16, rounding='stochastic'"
                    )
        self._slots = slots

        by_device: dict[torch.device, list[int]] = {}
        for i, tensor in enumerate(tensors):
            by_device.setdefault(self._device or tensor.device, []).append(i)
        self._groups = [
            _Group(
                FlatAverages(
                    [slots[i] for i in members],
                    list(averages.values()),
                    where,
                    backend=backend,
                    seed=seed if rounding == "stochastic" else None,
                    guard=on_nonfinite is not None,
                ),
                tuple(members),
            )
            for where, members in by_device.items()
        ]
        # What a traced update reads and writes.
        self._rows = [rows for group in self._groups for rows in group.flat.rows]
        self._states = [group.flat.state for group in self._groups]
        self._sources: list[Tensor] = []
        self._bind(tensors)
        with torch.no_grad():
            for group in self._groups:
                for row in range(len(averages)):
                    for i, source in enumerate(group.sources_of(tensors)):
                        group.flat.view(row, i).copy_(source)
        self._applied: str | None = None
        self._known_updated: set[str] = set()
        self._reported = 0
        self._seen = [self._mirror(group) for group in self._groups]
        self._handle = str(id(self))
        _ops.averagers[self._handle] = self

    def _average_dtype(self, tensor: Tensor) -> torch.dtype:
        if self._dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor.dtype
        return self._dtype

    def _collect(self) -> tuple[dict[str, int], list[Tensor], list[bool]]:
        """Index of every name, and of every index the tensor and whether it is a parameter."""
        named = self._listed if self._module is None else _state_tensors(self._module)
        names: dict[str, int] = {}
        tensors: list[Tensor] = []
        is_parameter: list[bool] = []
        index: dict[int, int] = {}
        for name, tensor, parameter in named:
            if not parameter and self._buffers == "skip":
                continue
            if parameter and self._trainable_only and not tensor.requires_grad:
                continue
            if self._keeps is not None and not self._keeps(name, tensor):
                continue
            if name in names:
                raise ValueError(f"params_or_module: found the name {name} twice")
            if id(tensor) not in index:
                index[id(tensor)] = len(tensors)
                tensors.append(tensor)
                is_parameter.append(parameter)
            names[name] = index[id(tensor)]
        return names, tensors, is_parameter

    def _left_out(self) -> tuple[str, str]:
        """Which argument leaves no tensor to average, and of how many."""
        named = list(self._listed if self._module is None else _state_tensors(self._module))
        if not named:
            return "params_or_module", ""
        trains = any(tensor.requires_grad for _, tensor, parameter in named if parameter)
        if trains or not self._trainable_only:
            if self._keeps is not None:
                return "filter", f" among {len(named)} (the first is {named[0][0]!r})"
            return "buffers='skip'", f" among {len(named)}, which are all buffers"
        return "trainable_only", f" among {len(named)}, none of which requires a gradient"

    def _bind(self, tensors: list[Tensor]) -> None:
        for group in self._groups:
            group.flat.bind(group.sources_of(tensors))
        self._sources = tensors
        self._watch = Watch(
            tensors, [] if self._module is None else Watch.dictionaries_of(self._module)
        )

    def _rebind(self) -> None:
        """Follows sources that moved, were replaced or changed type."""
        names, tensors, _ = self._collect()
        problems = [
            f"{n}: in the average, not in the model" for n in self._aliases if n not in names
        ]
        problems += [
            f"{n}: in the model, not in the average" for n in names if n not in self._aliases
        ]
        places = {i: group.flat.device for group in self._groups for i in group.members}
        sources: list[Tensor] = [torch.empty(0)] * len(self._slots)
        chosen: dict[int, str] = {}
        for name, at in names.items():
            i = self._aliases.get(name)
            if i is None:
                continue
            slot, tensor = self._slots[i], tensors[at]
            if i in chosen and sources[i] is not tensor:
                problems.append(f"{name}: tied to {chosen[i]} in the average, not in the model")
                continue
            chosen[i], sources[i] = name, tensor
            if tuple(tensor.shape) != slot.shape:
                problems.append(
                    f"{name}: shape {slot.shape} in the average, {tuple(tensor.shape)} in the model"
                )
            expected = slot.dtype
            if not (
                tensor.dtype == expected
                or (tensor.is_floating_point() and expected.is_floating_point)
            ):
                problems.append(f"{name}: {expected} in the average, {tensor.dtype} in the model")
            if self._device is None and tensor.device != places[i]:
                problems.append(
                    f"{name}: the average is on {places[i]}, the model on {tensor.device} (give "
                    "device= to keep the averages elsewhere)"
                )
        if problems:
            raise ValueError("the model does not fit the averages\n  " + "\n  ".join(problems))
        self._bind(sources)

    @staticmethod
    def _mirror(group: _Group) -> Tensor:
        """Where the count of skipped updates arrives without anyone waiting for it."""
        flat = group.flat
        if flat.device.type != "cuda":
            return flat.skipped
        return torch.zeros((), dtype=torch.int64, pin_memory=True)

    def _raise_if_nonfinite(self, wait: bool = False) -> None:
        if self._on_nonfinite != "raise":
            return
        skipped = self.skipped_updates if wait else max(int(seen) for seen in self._seen)
        if skipped > self._reported:
            found = skipped - self._reported
            self._reported = skipped
            bad = [
                slot.name
                for slot, source in zip(self._slots, self._sources, strict=True)
                if slot.averaged and not bool(source.isfinite().all())
            ]
            raise FloatingPointError(
                f"{found} update(s) met an infinity or NaN and changed nothing; not finite now: "
                f"{', '.join(bad) or 'none'}"
            )

    def update(self) -> None:
        """Takes the current values of all tensors into every average.

        Raises:
            RuntimeError: an average is applied at the moment.
            ValueError: tensors are missing, extra, reshaped, retyped or on another device; all are
                named in one message.
            FloatingPointError: see ``on_nonfinite``.

        Nothing is written if it raises.
        """
        if torch.compiler.is_compiling():
            _ops.refresh_averager(self._handle)
            _ops.update_averager(self._rows, self._states, self._sources, self._handle)
        else:
            self._update()

    def _refresh(self) -> None:
        if not self._watch.holds():
            self._rebind()

    def _update_with(
        self, averages: list[Tensor], states: list[Tensor], sources: list[Tensor]
    ) -> None:
        self._update((averages, states, sources))

    @torch.no_grad()
    def _update(self, given: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None) -> None:
        """``given``: averages, states and sources to use instead of the averager's own."""
        if self._applied is not None:
            raise RuntimeError(
                f"update: the average {self._applied!r} is applied, so the live weights are in its "
                "place; leave applied() first"
            )
        if self._on_nonfinite == "raise":
            self._raise_if_nonfinite()
        if given is None:
            self._refresh()
            for group in self._groups:
                group.flat.update()
        else:
            _update_with(self._groups, *given)
        if self._on_nonfinite == "raise":
            for group, seen in zip(self._groups, self._seen, strict=True):
                if seen.is_pinned():
                    seen.copy_(group.flat.skipped, non_blocking=True)
            if all(not seen.is_pinned() for seen in self._seen):
                self._raise_if_nonfinite()

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}={rule!r}" for name, rule in self._rules.items())
        elements = sum(slot.numel for slot in self._slots)
        devices = ", ".join(str(group.flat.device) for group in self._groups)
        backends = ", ".join(sorted({group.flat.backend for group in self._groups}))
        return (
            f"{type(self).__name__}({rules}; {len(self._slots)} tensors of {elements:,} elements "
            f"on {devices}, backend {backends})"
        )

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        """The averages by name; each maps tensor names to the averages themselves, not copies.
        Before the first update they hold the values at construction."""
        views: list[Tensor] = [torch.empty(0)] * len(self._slots)
        result: dict[str, dict[str, Tensor]] = _ByName()
        for row, average in enumerate(self._rules):
            for group in self._groups:
                for i, at in enumerate(group.members):
                    views[at] = group.flat.view(row, i)
            result[average] = {name: views[at] for name, at in self._aliases.items()}
        return result

    @property
    def n_averaged(self) -> dict[str, int]:
        """Updates that each average has seen. Waits for the device."""
        return dict(zip(self._rules, self._groups[0].flat.n_averaged.tolist(), strict=True))

    @property
    def skipped_updates(self) -> int:
        """Updates skipped by ``on_nonfinite``. Waits for the device."""
        return max(int(group.flat.skipped) for group in self._groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs: rules with their warm-ups, counters (which
        are also the position in the random numbers), seed, and the averages themselves.

        Only plain values and tensors, so that ``torch.load(weights_only=True)`` reads it.
        """
        self._raise_if_nonfinite(wait=True)
        return {
            "format": 1,
            "rules": {name: describe_rule(rule) for name, rule in self._rules.items()},
            "n_averaged": self.n_averaged,
            "rounding": self._rounding,
            "seed": self._seed,
            "skipped_updates": self.skipped_updates,
            "averages": dict(self.averages),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict` of an averager with the same rules and tensors.

        Raises:
            RuntimeError: an average is applied at the moment.
            ValueError: it does not fit; all differences are named, and nothing is changed.
        """
        if self._applied is not None:
            raise RuntimeError(f"load_state_dict: the average {self._applied!r} is applied")
        keys = ("n_averaged", "rounding", "rules", "seed", "skipped_updates", "averages")
        if state_dict.get("format") != 1 or any(key not in state_dict for key in keys):
            raise ValueError(
                "state_dict: expected one of an Averager in format 1, found the keys "
                f"{sorted(map(str, state_dict))}"
            )
        problems = []
        rules = {name: describe_rule(rule) for name, rule in self._rules.items()}
        expected_settings: dict[str, Any] = {"rules": rules, "rounding": self._rounding}
        if self._rounding == "stochastic":
            expected_settings["seed"] = self._seed
        for key, expected in expected_settings.items():
            if state_dict[key] != expected:
                problems.append(f"{key}: expected {expected}, found {state_dict[key]}")
        own = self.averages
        for average, tensors in own.items():
            theirs = state_dict["averages"].get(average, {})
            for name in tensors.keys() | theirs.keys():
                if name not in theirs or name not in tensors:
                    where = "missing" if name not in theirs else "unknown"
                    problems.append(f"averages[{average!r}]: {name} is {where}")
                elif (theirs[name].shape, theirs[name].dtype) != (
                    tensors[name].shape,
                    tensors[name].dtype,
                ):
                    problems.append(
                        f"averages[{average!r}]: {name} expected {tuple(tensors[name].shape)} "
                        f"{tensors[name].dtype}, found {tuple(theirs[name].shape)} "
                        f"{theirs[name].dtype}"
                    )
        if problems:
            raise ValueError("state_dict does not fit\n  " + "\n  ".join(sorted(problems)))
        self._known_updated.clear()
        for average, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(state_dict["averages"][average][name])
        counters = torch.tensor([state_dict["n_averaged"][name] for name in self._rules])
        self._reported = int(state_dict["skipped_updates"])
        for group, seen in zip(self._groups, self._seen, strict=True):
            group.flat.n_averaged.copy_(counters)
            group.flat.skipped.fill_(self._reported)
            seen.fill_(self._reported)

    @contextlib.contextmanager
    def applied(self, name: str) -> Iterator[None]:
        """Puts an average into the live tensors for the time of a ``with`` block.

        Live values and average are exchanged in place, without a third copy, where their dtypes
        agree; where they do not (an fp32 average of bf16 weights) the live values are kept in a
        copy. Parameters stay the same objects at the same addresses, so optimizers, tied weights,
        compiled code and captured graphs are not disturbed. The exchange is undone when the block
        ends, also by an exception.

        Args:
            name: of an average.

        Raises:
            KeyError: there is no average of that name.
            RuntimeError: it has not been updated yet, an average is already applied, or an average
                was written inside the block (which would have been to the live values).
        """
        if name not in self._rules:
            raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
        if self._applied is not None:
            raise RuntimeError(f"applied: the average {self._applied!r} is already applied")
        self._raise_if_nonfinite(wait=True)
        # Counters only grow, but for load_state_dict: the device is asked once.
        if name not in self._known_updated:
            if self.n_averaged[name] == 0:
                raise RuntimeError(f"applied: the average {name!r} has not been updated yet")
            self._known_updated.add(name)
        with torch.no_grad():
            if not self._watch.holds():
                self._rebind()
            exchange = _Exchange(self._groups, list(self._rules).index(name))
            exchange.apply(self._sources)
        self._applied = name
        versions = [rows._version for rows in self._rows]
        try:
            yield
        finally:
            written = versions != [rows._version for rows in self._rows]
            self._applied = None
            with torch.no_grad():
                if self._watch.holds():
                    exchange.restore()
                else:
                    tensors = self._sources
                    try:
                        self._rebind()
                        tensors = self._sources
                    finally:
                        # A model that no longer fits gets its weights back all the same.
                        exchange.restore_into(tensors)
        if written:
            raise RuntimeError(
                f"applied: an average was written while {name!r} was applied; where that was "
                f"{name!r} itself, the live weights now hold what was written"
            )


class _ByName(dict[str, dict[str, Tensor]]):
    """Averages by name. Pickled as a type that ``torch.load(weights_only=True)`` allows."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __missing__(self, name: object) -> dict[str, Tensor]:
        raise KeyError(f"averages: expected one of {', '.join(self)}, found {name!r}")


def _rule_of(function: AvgFn | MultiAvgFn | None) -> Rule | None:
    """The kernel's rule for one of our averaging functions; None for a user's."""
    if function is None:
        return SWA()
    if isinstance(function, _AvgFn | _MultiAvgFn):
        return SWA() if function.decay is None else EMA(function.decay)
    return None


class _Storage:
    """An AveragedModel's tensors as views of flat storage."""

    def __init__(self, owner: AveragedModel, key: object) -> None:
        self.key = key
        named: list[tuple[str, str, Tensor]] = []
        named += (("parameter", n, t) for n, t in owner.module.named_parameters())
        named += (("buffer", n, t) for n, t in owner.module.named_buffers())
        self.tensors: list[Tensor] = [tensor for _, _, tensor in named]
        self.problem: Exception | None = None
        by_device: dict[torch.device, list[tuple[int, Slot]]] = {}
        for i, (kind, name, tensor) in enumerate(named):
            try:
                _check_kind(name, tensor)
            except (TypeError, ValueError) as error:
                # Not flattened; averaging it by a built-in rule fails with this.
                self.problem = self.problem or error
                continue
            numeric = tensor.is_floating_point() or tensor.is_complex()
            averaged = (kind == "parameter" or owner.use_buffers) and numeric
            slot = Slot(name, averaged, tensor.dtype, tuple(tensor.shape), dense_strides(tensor))
            by_device.setdefault(tensor.device, []).append((i, slot))
        rule = _rule_of(owner.multi_avg_fn or owner.avg_fn) or SWA()
        self.groups = [
            _Group(
                FlatAverages([slot for _, slot in members], [rule], device, backend=owner.backend),
                tuple(i for i, _ in members),
            )
            for device, members in by_device.items()
        ]
        with torch.no_grad():
            for group in self.groups:
                for i, tensor in enumerate(group.sources_of(self.tensors)):
                    view = group.flat.view(0, i)
                    view.copy_(tensor)
                    tensor.data = view
            counter = owner.n_averaged
            self.counting = [g for g in self.groups if g.flat.device == counter.device]
            if self.counting:
                n_averaged = self.counting[0].flat.n_averaged[0]
                n_averaged.copy_(counter)
                counter.data = n_averaged
        self.watch_again(owner)

    def watch_again(self, owner: AveragedModel) -> None:
        dictionaries = itertools.chain([owner._buffers], Watch.dictionaries_of(owner.module))
        self.watch = Watch([*self.tensors, owner.n_averaged], dictionaries)

    def still_holds(self, owner: AveragedModel) -> bool:
        """True when the owner's tensors are the views of this storage, wherever that has moved
        (to shared memory, for instance)."""
        current = [*owner.module.parameters(), *owner.module.buffers()]
        if len(current) != len(self.tensors):
            return False
        if any(a is not b for a, b in zip(current, self.tensors, strict=True)):
            return False
        for group in self.groups:
            for i, tensor in enumerate(group.sources_of(self.tensors)):
                view = group.flat.view(0, i)
                if (
                    tensor.data_ptr() != view.data_ptr()
                    or tensor.dtype != view.dtype
                    or tensor.shape != view.shape
                    or tensor.stride() != view.stride()
                ):
                    return False
        return not self.counting or (
            owner.n_averaged.data_ptr() == self.counting[0].flat.n_averaged.data_ptr()
        )


@dataclass
class _Binding:
    """The model that an AveragedModel reads from."""

    model: weakref.ref[nn.Module]
    storage: _Storage
    watch: Watch
    sources: list[Tensor]  # one for each tensor of the storage
    counted: tuple[int, int] | None = None  # the counter that an update has left behind


class AveragedModel(nn.Module):
    r"""A copy of a model whose parameters are running averages. Drop-in for
    ``torch.optim.swa_utils.AveragedModel``: same arguments, attributes and state_dict keys.

    .. math::
        \bar w \leftarrow \begin{cases} w & n = 0 \\ \bar w + (w - \bar w)/(n + 1) & \text{SWA} \\
        d\,\bar w + (1 - d)\,w & \text{EMA} \end{cases} \qquad n \leftarrow n + 1

    Parameters and buffers of ``module`` are views of flat storage, which one launch per device
    updates, buffers and counter included. They stay ordinary tensors: they may be written, loaded,
    moved, copied and pickled, and what was moved is gathered again at the next update.

    Where it differs from torch's class, on purpose:

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
        unwrap: copy the model inside DataParallel, DistributedDataParallel or torch.compile
            instead of the wrapper.

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
        unwrap: bool = False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("avg_fn, multi_avg_fn: expected at most one of the two")
        if dtype is not None and dtype not in _ops.AVERAGE_DTYPES:
            raise TypeError(f"dtype: expected one of {_ops.AVERAGE_DTYPES}, found {dtype}")
        _check_backend(backend)
        self.module = copy.deepcopy(_inner(model) if unwrap else model)
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
        self._storage: _Storage | None = None
        self._binding: _Binding | None = None
        self._handle = ""
        self._applied = False
        self._warn_of_stagnation()
        self._flatten()

    def _warn_of_stagnation(self) -> None:
        rule = _rule_of(self.multi_avg_fn or self.avg_fn)
        for dtype in {p.dtype for p in self.module.parameters()}:
            if rule is not None and (reason := _stagnates(rule, dtype)):
                _log.warning("AveragedModel: %s; use dtype=torch.float32", reason)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's forward."""
        return self.module(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Addresses and watches are of this process and of these tensors.
        return {**self.__dict__, "_storage": None, "_binding": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AveragedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._flatten()
        return self

    def _flatten(self) -> _Storage:
        """The storage, gathered anew if tensors were moved, replaced or retyped."""
        function = self.multi_avg_fn or self.avg_fn
        key = (self.backend, self.use_buffers, function)
        storage = self._storage
        if storage is None or storage.key != key:
            storage = self._storage = _Storage(self, key)
        elif not storage.watch.holds():
            if storage.still_holds(self):
                storage.watch_again(self)
                self._binding = None
            else:
                storage = self._storage = _Storage(self, key)
        return storage

    def _bind(self, storage: _Storage, model: nn.Module) -> _Binding:
        """Reads from ``model`` from now on.

        Raises:
            ValueError, TypeError: the model does not fit; nothing has changed then.
        """
        *_, sources, problems = _match(
            "parameter",
            self.module.named_parameters(),
            model.named_parameters(remove_duplicate=False),
        )
        *_, model_buffers, buffer_problems = _match(
            "buffer",
            self.module.named_buffers(),
            model.named_buffers(remove_duplicate=False),
        )
        problems += buffer_problems
        if problems:
            raise ValueError(
                "update_parameters: the model does not fit the average\n  " + "\n  ".join(problems)
            )
        sources += model_buffers
        if _rule_of(self.multi_avg_fn or self.avg_fn) is not None:
            if storage.problem is not None:
                raise storage.problem
            for group in storage.groups:
                group.flat.bind(group.sources_of(sources))
        watch = Watch(sources, Watch.dictionaries_of(model))

        this = weakref.ref(self)

        def forget(_: object) -> None:
            for group in storage.groups:
                group.flat.unbind()
            averaged = this()
            if averaged is not None:
                averaged._binding = None

        binding = _Binding(weakref.ref(model, forget), storage, watch, sources)
        self._binding = binding
        self._handle = str(id(self))
        _ops.averagers[self._handle] = self
        return binding

    def _bound(self, model: nn.Module) -> _Binding:
        storage, binding = self._flatten(), self._binding
        if (
            binding is None
            or binding.model() is not model
            or binding.storage is not storage
            or not binding.watch.holds()
        ):
            self._binding = None
            binding = self._bind(storage, model)
        return binding

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
            RuntimeError: the average is applied to a model at the moment.

        Nothing is written before everything has been checked. Under ``torch.compile`` the model is
        the one of the last update, of which there must have been one.
        """
        if torch.compiler.is_compiling():
            self._trace_update(model)
        else:
            self._update(model)

    def _trace_update(self, model: nn.Module) -> None:
        if self._binding is None or self._binding.model() is not model:
            raise RuntimeError(
                "update_parameters: run one update of this model before compiling it"
            )
        if _rule_of(self.multi_avg_fn or self.avg_fn) is None:
            raise RuntimeError(
                "update_parameters: a user's averaging function cannot be compiled; call this "
                "outside of the compiled function"
            )
        _ops.refresh_averager(self._handle)
        storage = self._binding.storage
        with torch.no_grad():
            for group in storage.groups:
                if not storage.counting or group is not storage.counting[0]:
                    group.flat.n_averaged.copy_(self.n_averaged)
            _ops.update_averager(
                [rows for group in storage.groups for rows in group.flat.rows],
                [group.flat.state for group in storage.groups],
                self._binding.sources,
                self._handle,
            )
            if not storage.counting:
                self.n_averaged.add_(1)

    def _refresh(self) -> None:
        model = None if self._binding is None else self._binding.model()
        if model is not None:
            self._bound(model)

    def _update_with(
        self, averages: list[Tensor], states: list[Tensor], sources: list[Tensor]
    ) -> None:
        assert self._binding is not None
        storage = self._binding.storage
        with torch.no_grad():
            _update_with(storage.groups, averages, states, sources)
        torch.autograd.graph.increment_version(storage.tensors)

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        if self._applied:
            raise RuntimeError(
                "update_parameters: the average is applied, so live weights are in its place; "
                "leave applied() first"
            )
        binding = self._bound(model)
        storage = binding.storage
        if _rule_of(self.multi_avg_fn or self.avg_fn) is None:
            self._apply_user_function(binding)
            self.n_averaged += 1
            return
        for group in storage.groups:
            if not storage.counting or group is not storage.counting[0]:
                group.flat.n_averaged.copy_(self.n_averaged, non_blocking=True)
        for group in storage.groups:
            group.flat.update()
        if not storage.counting:
            self.n_averaged += 1
        # The views carry version counters of their own, see _ops.average_.
        torch.autograd.graph.increment_version(storage.tensors)
        binding.counted = self._counter_seen()

    def _counter_seen(self) -> tuple[int, int] | None:
        """Which counter this is, and how often something other than an update's kernel has written
        it: after an update, what stays the same is not zero."""
        if self.n_averaged.is_inference():
            return None
        return self.n_averaged.data_ptr(), self.n_averaged._version

    def _apply_user_function(self, binding: _Binding) -> None:
        # As torch does: the first update copies, and functions see every tensor, integers included.
        tensors = [t.detach() for t in binding.storage.tensors]
        sources = [s.detach() for s in binding.sources]
        parameters = len(list(self.module.parameters()))
        averaged = len(tensors) if self.use_buffers else parameters
        averages = tensors[:averaged]
        current = [
            s if s.device == a.device else s.to(a.device)
            for a, s in zip(averages, sources[:averaged], strict=True)
        ]
        if self.n_averaged == 0:
            _copy_all_(averages, current)
        elif self.multi_avg_fn is not None:
            for (device, _), group in _by_device_and_dtype(averages, current):
                self.multi_avg_fn(*group, self.n_averaged.to(device))
        else:
            assert self.avg_fn is not None
            for average, source in zip(averages, current, strict=True):
                n_averaged = self.n_averaged.to(average.device)
                average.copy_(self.avg_fn(average, source, n_averaged))
        _copy_all_(tensors[averaged:], sources[averaged:])

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the average into ``model`` for the time of a ``with`` block.

        The model's tensors and the average's are exchanged in place, without a third copy, where
        their dtypes and devices agree; where they do not, the model's are kept in a copy. Inside
        the block this AveragedModel holds the model's weights. The exchange is undone when the
        block ends, also by an exception.

        Args:
            model: as for :meth:`update_parameters`.

        Raises:
            RuntimeError: the average has not been updated yet, is already applied, or was written
                inside the block.
            ValueError, TypeError: as :meth:`update_parameters`.
        """
        if self._applied:
            raise RuntimeError("applied: the average is already applied")
        counted = None if self._binding is None else self._binding.counted
        # Else the device has to be waited for.
        if (counted is None or counted != self._counter_seen()) and self.n_averaged == 0:
            raise RuntimeError("applied: the average has not been updated yet")
        binding = self._bound(model)
        storage = binding.storage
        if storage.problem is not None:
            raise storage.problem
        exchange = _Exchange(storage.groups, 0)
        with torch.no_grad():
            if _rule_of(self.multi_avg_fn or self.avg_fn) is None:
                for group in storage.groups:
                    group.flat.bind(group.sources_of(binding.sources))
            exchange.apply(binding.sources)
        torch.autograd.graph.increment_version(storage.tensors)
        self._applied = True
        versions = [tensor._version for tensor in storage.tensors]
        try:
            yield
        finally:
            written = versions != [tensor._version for tensor in storage.tensors]
            self._applied = False
            with torch.no_grad():
                if binding.watch.holds():
                    exchange.restore()
                else:
                    tensors = binding.sources
                    try:
                        tensors = self._bind(storage, model).sources
                    finally:
                        # A model that no longer fits gets its weights back all the same.
                        exchange.restore_into(tensors)
            torch.autograd.graph.increment_version(storage.tensors)
        if written:
            raise RuntimeError(
                "applied: the average was written while it was applied; the model's weights now "
                "hold what was written"
            )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``torch.nn.Module.load_state_dict``; refused while the average is applied."""
        if self._applied:
            raise RuntimeError("load_state_dict: the average is applied; leave applied() first")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
