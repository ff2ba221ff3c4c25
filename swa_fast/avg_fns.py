"""The averaging functions of ``torch.optim.swa_utils``, with one launch for lists of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _backends, _ops
from ._by_torch import by_rule
from ._graphs import keep_for_graph
from ._memory import Slot, dense_strides
from .engine import Engine, Plan
from .rules import EMA, SWA, Rule, check_decay, steady_row

__all__ = [
    "AvgFn",
    "MultiAvgFn",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "multi_average_",
    "rule_of",
]

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


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

    def __call__(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        if not isinstance(num_averaged, Tensor):
            # Beside the averages, so that it is written there and nothing waits for a copy.
            device = averaged[0].device if len(averaged) > 0 else None
            num_averaged = torch.full((), num_averaged, dtype=torch.int64, device=device)
        average = _traced_average if torch.compiler.is_compiling() else multi_average_
        with torch.no_grad():
            average(list(averaged), list(current), num_averaged, self.decay)


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


def rule_of(function: AvgFn | MultiAvgFn | None) -> Rule | None:
    """The kernel's rule for one of our averaging functions, or None for a user's function."""
    if function is None:
        return SWA()
    if isinstance(function, _AvgFn | _MultiAvgFn):
        return SWA() if function.decay is None else EMA(function.decay)
    return None


class _Bound:
    """Lists of tensors, and the tables through which they are averaged.

    It holds no tensor: who calls an averaging function brings the lists, and where their memory is
    what it was, the tables serve again.
    """

    def __init__(
        self,
        averaged: Sequence[Tensor],
        current: Sequence[Tensor],
        parts: Sequence[tuple[Engine, Plan]],
    ) -> None:
        self.calls = []
        for engine, plan in parts:
            table, any_count = plan.update, torch.zeros_like(engine.n_averaged)
            self.calls.append(
                (plan.backend, engine.device, any_count, plan.rules, table.words, table.pairs,
                 table.short)
            )  # fmt: skip
        self._extension = _backends.cpu_library()
        self._facts = self._extension.facts(averaged, current)

    def serves(self, averaged: list[Tensor], current: list[Tensor]) -> bool:
        same: bool = self._extension.hold(self._facts, averaged, current)
        return same

    def average(self, num_averaged: Tensor | None) -> None:
        """One launch for each device. None: the rule does not depend on the count."""
        for backend, device, any_count, rules, words, pairs, short in self.calls:
            n = any_count if num_averaged is None else num_averaged.to(device)
            _ops.update_(backend, [], [], n, None, rules, words, pairs, None, False, short)


# By the first tensors' addresses; the tables used last come last.
_bound: dict[tuple[object, ...], _Bound] = {}
_MOST_BOUND = 32


def _parts_of(
    averaged: Sequence[Tensor], current: Sequence[Tensor], decay: float | None
) -> list[tuple[Engine, Plan]]:
    """An engine for each device of the averages, and how it reads the sources.

    Raises:
        ValueError, TypeError: the lists do not fit.
    """
    by_device: dict[torch.device, list[int]] = {}
    slots = []
    for i, (average, source) in enumerate(zip(averaged, current, strict=True)):
        for what, ours, theirs in (
            ("shape", tuple(average.shape), tuple(source.shape)),
            ("device", average.device, source.device),
        ):
            if ours != theirs:
                raise ValueError(
                    f"pair {i}: the average has {what} {ours}, the source has {what} {theirs}"
                )
        if average.layout != torch.strided:
            raise TypeError(
                f"pair {i}: the average has layout {average.layout}, expected torch.strided"
            )
        numeric = average.is_floating_point() or average.is_complex()
        slots.append(
            Slot(f"pair {i}", numeric, average.dtype, tuple(average.shape), dense_strides(average))
        )
        by_device.setdefault(average.device, []).append(i)
    parts = []
    for device, members in by_device.items():
        engine = Engine(
            [slots[i] for i in members],
            [[averaged[i] for i in members]],
            [SWA()],
            device,
            counted=False,
        )
        if decay is not None:
            engine.rules = torch.tensor([steady_row(decay)], dtype=torch.float64, device="cpu")
        parts.append((engine, engine.plan([current[i] for i in members])))
    return parts


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def multi_average_(
    averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor, decay: float | None
) -> None:
    r"""Moves every tensor of a list towards its source, in place: one launch for each device.

    .. math::
        a \leftarrow a + w\,(b - a) \qquad w = \begin{cases} 1/(n+1) & \text{decay is None (SWA)} \\
                                 1 - \text{decay} & \text{otherwise (EMA)} \end{cases}

    computed in float32 (float64 when either tensor of a pair is float64) and rounded once; complex
    tensors as pairs of reals; integers and booleans are copied, because a count or a mask has no
    meaningful mean. Lists whose tensors lie where they did in an earlier call are read through the
    tables of that call, without a copy to the device. Lists with DTensors or other wrappers of
    tensors are averaged by torch's own operators.

    Args:
        averaged: tensors :math:`a`, written.
        current: tensors :math:`b`, one for each average, of its shape and on its device.
        num_averaged: one int64 :math:`n`; on the averages' device it is read there, without a
            synchronisation. Not changed.
        decay: in [0, 1], or None for equal weights.

    Raises:
        TypeError: a dtype or layout that is not averaged, or an ``num_averaged`` that is not one
            int64.
        ValueError: lists, shapes or devices that do not match.

    All arguments are checked before the first write.
    """
    if len(averaged) != len(current):
        raise ValueError(
            f"averaged and current: expected two lists of equal length, found {len(averaged)} and "
            f"{len(current)} tensors"
        )
    if num_averaged.dtype != torch.int64 or num_averaged.numel() != 1:
        raise TypeError(
            f"num_averaged: expected one int64, found {tuple(num_averaged.shape)} "
            f"{num_averaged.dtype}"
        )
    if len(averaged) == 0:
        return
    key = (
        decay,
        os.environ.get("SWA_FAST_BACKEND"),
        len(averaged),
        _address(averaged[0]),
        _address(current[-1]),
    )
    count = num_averaged if decay is None else None
    bound = _bound.pop(key, None)
    if bound is None or not bound.serves(averaged, current):
        if any(map(is_traceable_wrapper_subclass, (*averaged, *current))):
            rule = SWA() if decay is None else EMA(decay)
            names = [f"pair {i}" for i in range(len(averaged))]
            # The first update, too: who calls an averaging function may have copied before.
            n = int(num_averaged) if decay is None else 1
            results = by_rule(rule, n, names, averaged, current)
            for average, result in zip(averaged, results, strict=True):
                average.copy_(result)
            return
        parts = _parts_of(averaged, current, decay)
        if _backends.cpu_library() is None or not all(plan.direct for _, plan in parts):
            for engine, plan in parts:
                if count is not None:
                    engine.n_averaged = count.to(engine.device)
                engine.update(plan)
            torch.autograd.graph.increment_version(averaged)
            return
        bound = _Bound(averaged, current, parts)
    _bound[key] = bound
    while len(_bound) > _MOST_BOUND:
        _bound.pop(next(iter(_bound)), None)
    if averaged[0].is_cuda and torch.cuda.is_current_stream_capturing():
        keep_for_graph(bound)
    bound.average(count)
    # The kernels write to addresses: without this, autograd would not notice that a tensor it saved
    # for backward has changed.
    torch.autograd.graph.increment_version(averaged)


_traced_average = _ops.define("multi_average_", multi_average_, ("averaged",))
