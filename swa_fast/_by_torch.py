"""Averages by torch's own operators, tensor by tensor: those of users' functions, and those of
tensors that are no run of memory which a kernel could read, such as DTensors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._modules import is_loose
from .rules import EMA, SWA, Power, Rule

__all__ = [
    "Swapped",
    "applied",
    "averaging",
    "by_device_and_dtype",
    "by_rule",
    "odd_one",
    "update_",
]


def is_odd(tensor: Tensor) -> bool:
    """Whether torch alone knows where the values are."""
    return is_traceable_wrapper_subclass(tensor) or is_loose(tensor)


def odd_one(
    own: Iterable[tuple[str, Tensor, bool]], live: Iterable[Tensor] | None = None
) -> str | None:
    """Name and kind of the first such tensor, apart from buffers that are copied as they are.

    Args:
        own: name and tensor of each part of an average, and whether it is a parameter.
        live: the tensors that they are taken from.

    Raises:
        TypeError: one of a pair is a wrapper and the other is none, so that there is no telling
            which of the wrapper's values the average stands for.
    """
    own = list(own)
    tensors = [(name, tensor, parameter) for name, tensor, parameter in own]
    if live is not None:
        for (name, average, parameter), tensor in zip(own, live, strict=True):
            wrapped = map(is_traceable_wrapper_subclass, (average, tensor))
            if parameter and len(set(wrapped)) > 1:
                raise TypeError(
                    f"{name}: the average is a {type(average).__name__}, the model's a "
                    f"{type(tensor).__name__}; make another AveragedModel of the model as it is now"
                )
            tensors.append((name, tensor, parameter))
    for name, tensor, parameter in tensors:
        if is_odd(tensor) and (parameter or not is_loose(tensor)):
            return f"{name} is a {_kind(tensor)}"
    return None


def _kind(tensor: Tensor) -> str:
    if is_traceable_wrapper_subclass(tensor):
        return type(tensor).__name__
    return "quantised tensor" if tensor.is_quantized else f"tensor of layout {tensor.layout}"


def by_device_and_dtype(
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
    if any(map(is_odd, (*targets, *sources))):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return
    # Grouped, because foreach is fused only for lists of one device and dtype.
    for _, group in by_device_and_dtype(targets, sources):
        torch._foreach_copy_(*group)


def averaging(
    rule: Rule | None,
    avg_fn: Callable[..., Tensor] | None,
    multi_avg_fn: Callable[..., None] | None,
    names: Sequence[str],
    n_averaged: Tensor,
) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
    """What makes new averages of old ones, which it leaves alone, and their sources: a rule or, as
    torch calls them, one of a user's functions."""

    def average(averages: list[Tensor], current: list[Tensor]) -> list[Tensor]:
        if rule is not None:
            assert isinstance(rule, SWA | EMA | Power)
            return by_rule(rule, int(n_averaged), names, averages, current)
        results = [average.clone() for average in averages]
        if multi_avg_fn is not None:
            for (device, _), group in by_device_and_dtype(results, current):
                multi_avg_fn(*group, n_averaged.to(device))
            return results
        assert avg_fn is not None
        return [
            avg_fn(result, source, n_averaged.to(result.device))
            for result, source in zip(results, current, strict=True)
        ]

    return average


def by_rule(
    rule: SWA | EMA | Power, n: int, names: Sequence[str], averages: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    r"""The averages after ``n`` updates and one more: :math:`a + (b - a)/(n + 1)` and
    :math:`d\,a + (1 - d)\,b` as in ``torch.optim.swa_utils``, and by any other rule
    :math:`a + w(n)\,(b - a)`. Integers are copied.

    Raises:
        TypeError: torch has no arithmetic for a tensor, which is named.
    """
    w = rule.weight(n)
    result = []
    for name, a, b in zip(names, averages, sources, strict=True):
        try:
            if w == 1.0 or not (a.is_floating_point() or a.is_complex() or a.is_quantized):
                result.append(b)
            elif rule == SWA():
                result.append(a + (b - a) / (n + 1))
            elif isinstance(rule, EMA) and rule == EMA(rule.decay):
                result.append(rule.decay * a + (1 - rule.decay) * b)
            else:
                result.append(a + (b - a) * w)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            odd = a if is_odd(a) else b
            raise TypeError(
                f"{name}: torch does not average a {_kind(odd)} ({str(error).splitlines()[0]})"
            ) from error
    return result


@torch.no_grad()
def update_(
    tensors: Sequence[Tensor],
    sources: Sequence[Tensor],
    averaged: int,
    counter: Tensor,
    average: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
) -> None:
    """One update. Nothing is written before all of it is there, and all or nothing then.

    Args:
        tensors: the averages; written.
        sources: a tensor for each.
        averaged: how many, from the first on, are averaged; the others are copied.
        counter: updates so far; written.
        average: makes new averages of the old ones, which it leaves alone, and their sources. The
            first update copies instead.
    """
    averages = list(tensors[:averaged])
    results = [
        s if s.device == a.device else s.to(a.device)
        for a, s in zip(averages, sources[:averaged], strict=True)
    ]
    if counter != 0:
        results = average(averages, results)
    written = [*tensors, counter]
    before = [tensor.clone() for tensor in written]
    try:
        _copy_all_(averages, results)
        _copy_all_(tensors[averaged:], sources[averaged:])
        counter += 1
    except BaseException:
        _copy_all_(written, before)
        raise


class Swapped:
    """Averages in the place of live tensors, whose values are kept in copies meanwhile. Whatever is
    done can be done again: :meth:`leave` may be called after it was interrupted.

    Args:
        lock: held while tensors are written.
        prepare: checks whether this may be, and returns the live tensors and their averages.
        note: is told whether this is in the model's place.
    """

    def __init__(
        self,
        lock: threading.RLock,
        prepare: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
        note: Callable[[bool], None],
    ) -> None:
        self._lock, self._prepare, self._note = lock, prepare, note
        self._targets: list[Tensor] = []
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def enter(self) -> None:
        with self._lock:
            live, averages = self._prepare()
            targets = [tensor.detach() for tensor in live]
            self._kept = [tensor.clone() for tensor in targets]
            self._targets = targets
            self._note(True)
            _copy_all_(targets, [average.detach() for average in averages])

    @torch.no_grad()
    def leave(self) -> None:
        with self._lock:
            if self._targets:
                _copy_all_(self._targets, self._kept)
                self._note(False)
                self._targets = []


@contextlib.contextmanager
def applied(change: Swapped) -> Iterator[None]:
    """Averages are in the live tensors for the time of a ``with`` block."""
    # Twice, because an interrupt may come while the first is at work.
    try:
        try:
            change.enter()
            yield
        finally:
            change.leave()
    finally:
        change.leave()
