"""Decays that change on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ._memory import Slot
from .by_name import grouped
from .rules import EMA, Rule, why_it_stands_still

if TYPE_CHECKING:
    from ._cadence import Cadence
    from .storage import Storage

__all__ = ["Decays"]

_log = logging.getLogger("swa_fast")


class Decays:
    """What an averager's exponential averages decay by, at every update."""

    _rules: dict[str, Rule]
    _storage: Storage
    _rounding: str
    _on_nonfinite: str | None
    _cadence: Cadence | None
    # Updates done or tried, which schedules of the decay go by; None: to be asked for.
    _calls: int | None

    def _check_that_all_move(self, rules: Mapping[str, Rule], slots: Sequence[Slot]) -> None:
        """Raises ValueError for an average that would stand still in one of its dtypes."""
        slots, groups = grouped(list(rules.values()), slots)
        found = {(slot.group, slot.dtype): None for slot in slots if slot.averaged}
        for group, dtype in found:
            self._check_that_it_moves(dict(zip(rules, groups[group], strict=True)), dtype)

    def _check_that_it_moves(self, rules: Mapping[str, Rule], dtype: torch.dtype) -> None:
        for name, rule in rules.items() if self._rounding == "nearest" else ():
            reason = why_it_stands_still(rule, dtype)
            if reason is None:
                continue
            message = (
                f"averages[{name!r}]: {reason}; use dtype=torch.float32 or, for bfloat16, "
                "rounding='stochastic'"
            )
            if isinstance(rule, EMA) or dtype != torch.float16:
                raise ValueError(message)
            _log.warning("%s", message)

    def _find_schedules(self) -> None:
        rules = enumerate(self._rules.values())
        self._scheduled = [
            row for row, rule in rules if isinstance(rule, EMA) and rule.schedule is not None
        ]
        # Whether an update has nothing to do before and after but the storage's.
        self._plain = not (self._cadence or self._scheduled or self._on_nonfinite == "raise")

    def _tried(self) -> int:
        raise NotImplementedError

    def _rules_now(self, decay: float | Mapping[str, float] | None) -> dict[int, Rule]:
        """The rules of this update by row, where they are not the averager's own."""
        rules = list(self._rules.values())
        if self._scheduled and self._storage.capturing():
            raise RuntimeError(
                "update: a decay that is a function cannot be captured in a CUDA graph, whose "
                "replays do not call it"
            )
        result: dict[int, Rule] = {}
        for row in self._scheduled:
            rule = rules[row]
            assert isinstance(rule, EMA) and rule.schedule is not None
            result[row] = rule.with_decay(rule.schedule(self._tried()))
        if decay is None:
            return result
        if not isinstance(decay, Mapping):
            decay = {name: decay for name, rule in self._rules.items() if isinstance(rule, EMA)}
        if not decay:
            raise ValueError("decay: expected None, because no average is an EMA")
        for name, value in decay.items():
            row = self._exponential(name, "decay")
            rule = rules[row]
            assert isinstance(rule, EMA)
            result[row] = rule.with_decay(value)
        return result

    def _exponential(self, name: str, argument: str) -> int:
        if name not in self._rules:
            raise KeyError(f"{argument}: expected one of {', '.join(self._rules)}, found {name!r}")
        if not isinstance(self._rules[name], EMA):
            raise ValueError(f"{argument}: expected the name of an EMA, found {name!r}")
        return list(self._rules).index(name)

    def set_decay(self, decay: float, name: str | None = None) -> None:
        """Changes the decay of an exponential average from the next update on, without a new table.
        A captured CUDA graph goes on with the decay that it was captured with.

        Args:
            decay: in [0, 1].
            name: of the average; None takes all that are exponential.

        Raises:
            KeyError: there is no average of that name.
            ValueError: it is not exponential, ``decay`` is outside its range or below its warm-up's
                least one, or the average could not move.
        """
        names = [n for n, rule in self._rules.items() if isinstance(rule, EMA)]
        if name is not None:
            self._exponential(name, "name")
            names = [name]
        if not names:
            raise ValueError("set_decay: expected an average that is an EMA, found none")
        new: dict[str, Rule] = {}
        for each in names:
            rule = self._rules[each]
            assert isinstance(rule, EMA)
            new[each] = rule.with_decay(decay)
        for dtype in {slot.dtype for slot in self._storage.slots if slot.averaged}:
            self._check_that_it_moves(new, dtype)
        with self._storage.lock:
            for each, rule in new.items():
                self._rules[each] = rule
                self._storage.set_rule(list(self._rules).index(each), rule)
            self._find_schedules()
