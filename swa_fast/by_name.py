"""Rules chosen by the names of tensors: :class:`ByName`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._memory import Slot
from .rules import EMA, SWA, Power, Rule, describe_rule

__all__ = ["ByName", "check_patterns", "grouped"]


@dataclass(frozen=True, repr=False)
class ByName:
    r"""Different rules for different tensors of one average, chosen by their names.

    Args:
        rules: a rule for each regular expression; a tensor follows the first whose expression is
            found in its name (of a tied tensor, in the first of its names).
        default: the rule of all others.

    All are :class:`~swa_fast.SWA`, :class:`~swa_fast.EMA` or :class:`~swa_fast.Power`, with a decay
    that is a number; ``EMA(0.0)`` keeps a tensor's last values. Tensors that are copied, such as
    integers, are copied all the same. An update launches once for every set of rules that tensors
    have in common, instead of once for all.

    Raises:
        TypeError: another rule.
        ValueError: no rule, or no regular expression.

    Example::

        ByName({r"^embed\.": EMA(0.9999), "bias": EMA(0.9)}, default=EMA(0.999))
    """

    patterns: tuple[str, ...]
    rules: tuple[SWA | EMA | Power, ...]  # those of the patterns, and last the default

    def __init__(self, rules: Mapping[str, SWA | EMA | Power], default: SWA | EMA | Power) -> None:
        if not rules:
            raise ValueError("rules: expected at least one regular expression, found none")
        for where, rule in (
            *((f"rules[{p!r}]", r) for p, r in rules.items()),
            ("default", default),
        ):
            if not isinstance(rule, SWA | EMA | Power):
                raise TypeError(f"{where}: expected SWA, EMA or Power, found {type(rule).__name__}")
            if isinstance(rule, EMA) and rule.schedule is not None:
                raise TypeError(f"{where}: expected a decay that is a number, found a function")
        for pattern in rules:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"rules: expected regular expressions, found {pattern!r} ({error})"
                ) from None
        object.__setattr__(self, "patterns", tuple(rules))
        object.__setattr__(self, "rules", (*rules.values(), default))

    def __repr__(self) -> str:
        chosen = ", ".join(f"{p!r}: {r!r}" for p, r in zip(self.patterns, self.rules, strict=False))
        return f"ByName({{{chosen}}}, default={self.rules[-1]!r})"

    def choice(self, name: str) -> int:
        """Which of :attr:`rules` a tensor of this name follows."""
        found = (i for i, pattern in enumerate(self.patterns) if re.search(pattern, name))
        return next(found, len(self.patterns))

    def describe(self) -> dict[str, Any]:
        """Plain values, for checkpoints. The order of the patterns counts."""
        rules = [describe_rule(rule) for rule in self.rules]
        return {
            "rule": "ByName",
            "rules": [[p, rule] for p, rule in zip(self.patterns, rules, strict=False)],
            "default": rules[-1],
        }


def check_patterns(rules: Mapping[str, Rule], slots: Sequence[Slot]) -> None:
    """Raises ValueError if there is a pattern that no averaged tensor follows."""
    for average, rule in rules.items():
        if not isinstance(rule, ByName):
            continue
        chosen = {rule.choice(slot.name) for slot in slots if slot.averaged}
        for i, pattern in enumerate(rule.patterns):
            if i not in chosen:
                raise ValueError(
                    f"averages[{average!r}]: expected an averaged tensor that follows {pattern!r}, "
                    "found none"
                )


def grouped(rules: Sequence[Rule], slots: Sequence[Slot]) -> tuple[list[Slot], list[list[Rule]]]:
    """The slots with the group of those that follow the same rules, and each group's rules. Slots
    that are copied belong to the first."""
    by_name = [rule for rule in rules if isinstance(rule, ByName)]
    choices: dict[tuple[int, ...], int] = {}
    result = []
    for slot in slots:
        group = 0
        if slot.averaged:
            choice = tuple(rule.choice(slot.name) for rule in by_name)
            group = choices.setdefault(choice, len(choices))
        result.append(replace(slot, group=group))

    def of(choice: Sequence[int]) -> list[Rule]:
        rest = iter(choice)
        return [rule.rules[next(rest)] if isinstance(rule, ByName) else rule for rule in rules]

    return result, [of(choice) for choice in choices] or [list(rules)]
