"""What is saved of an :class:`~swa_fast.Averager`, and the reading of it: everything is looked at
before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cadence import is_count
from ._modules import check_kind, is_loose
from .sharding import Shard

__all__ = ["FORMAT", "Differences", "Loaded", "read_state", "read_weights"]

FORMAT = 1
_KEYS = ("n_averaged", "rounding", "rules", "seed", "skipped_updates", "averages")

Averages = Mapping[str, Mapping[str, Tensor]]


class Differences(NamedTuple):
    """In what a state and the averager that loaded it differ, by names of averages.

    Attributes:
        missing: averages of the averager that the state does not hold: they stay as they were.
        unexpected: averages of the state that the averager does not have: they are left out.
        rules: averages that go on by another rule than the state's.
    """

    missing: list[str]
    unexpected: list[str]
    rules: list[str]


@dataclass
class Loaded:
    """What is to be written."""

    counts: dict[str, int] = field(default_factory=dict)  # updates, by average
    skipped: int = 0
    calls: int | None = None  # of the averager's own cadence; None leaves it
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # averages and their values
    differences: Differences = field(default_factory=lambda: Differences([], [], []))


def _differ(ours: object, theirs: object) -> bool:
    """Also where what was found compares to something else than a bool."""
    try:
        return bool(ours != theirs)
    except (RuntimeError, TypeError, ValueError):
        return True


def _fit(
    where: str, own: Tensor, value: object, convert: bool, shard: Shard | None
) -> tuple[Any, str | None]:
    """What of ``value`` is to be written to ``own``, and why it cannot be."""
    try:
        part = value if shard is None else shard.cut(value)
    except (TypeError, ValueError) as error:
        return None, f"{where} {error}"
    return part, _misfit(where, own, part, convert)


def _misfit(where: str, own: Tensor, value: object, convert: bool) -> str | None:
    if not isinstance(value, Tensor):
        return f"{where} expected a tensor, found {type(value).__name__}"
    if is_loose(own) or is_loose(value):
        same = own.layout == value.layout and own.is_quantized == value.is_quantized
        if not same or own.shape != value.shape or own.dtype != value.dtype:
            return f"{where} expected {_kind(own)}, found {_kind(value)}"
        return None
    try:
        check_kind(where, value)
    except (TypeError, ValueError) as error:
        return str(error)
    converts = convert and own.is_floating_point() and value.is_floating_point()
    if own.shape != value.shape or (own.dtype != value.dtype and not converts):
        return f"{where} expected {_kind(own)}, found {_kind(value)}"
    return None


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" of layout {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout}"


def read_state(
    state: object,
    own: Averages,
    settings: Mapping[str, Any],
    *,
    strict: bool,
    shards: Mapping[str, Shard],
) -> Loaded:
    """What a state holds for the averages ``own``.

    Args:
        state: hopefully a ``state_dict`` of an Averager.
        own: the averages by name.
        settings: ``rules``, ``rounding``, ``seed`` and ``cadence`` of the averager, the last two
            only where they matter.
        strict: whether rules, averages, rounding, seed and dtypes have to agree.
        shards: which of ``own`` are pieces, by name of the tensor.

    Raises:
        ValueError: it does not fit, with everything that does not.
    """
    if not isinstance(state, Mapping) or not all(key in state for key in _KEYS):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"state_dict: expected one of an Averager in format {FORMAT}, found the keys {found}"
        )
    problems: list[str] = []
    if _differ(FORMAT, state.get("format")):
        problems.append(f"format: expected {FORMAT}, found {state.get('format')!r}")
    for key in ("rules", "n_averaged", "averages"):
        if not isinstance(state[key], Mapping):
            problems.append(f"{key}: expected a mapping, found {type(state[key]).__name__}")
    if not is_count(state["skipped_updates"]):
        problems.append(
            f"skipped_updates: expected an integer of 0 or more, found {state['skipped_updates']!r}"
        )
    if problems:
        raise ValueError("state_dict does not fit\n  " + "\n  ".join(problems))
    rules, counts, averages = (state[key] for key in ("rules", "n_averaged", "averages"))
    settings = dict(settings)
    cadence, saved = settings.pop("cadence", None), state.get("cadence")
    calls = saved.get("calls") if isinstance(saved, Mapping) else None
    if saved is not None and not is_count(calls):
        problems.append(f"cadence: expected a mapping with the number of calls, found {saved!r}")
    elif strict:
        kept = None if saved is None else {key: v for key, v in saved.items() if key != "calls"}
        if _differ(cadence, kept):
            problems.append(f"cadence: expected {cadence}, found {kept}")
    for key, expected in settings.items() if strict else ():
        if _differ(expected, state[key]):
            problems.append(f"{key}: expected {expected}, found {state[key]}")
    differences = Differences(
        [name for name in own if name not in averages],
        [str(name) for name in averages if name not in own],
        [n for n, rule in settings["rules"].items() if n in rules and _differ(rule, rules[n])],
    )
    if strict:
        problems += [f"averages: {name!r} is missing" for name in differences.missing]
        problems += [f"averages: {name!r} is unknown" for name in differences.unexpected]
    loaded = Loaded(skipped=state["skipped_updates"], differences=differences)
    loaded.calls = calls if cadence is not None else None
    for average, tensors in own.items():
        if average in differences.missing:
            continue
        # The sources that a window keeps are counted as it is.
        count = counts.get(average if average in settings["rules"] else average.rsplit("[", 1)[0])
        if not is_count(count):
            problems.append(
                f"n_averaged[{average!r}]: expected an integer of 0 or more, found {count!r}"
            )
        else:
            loaded.counts[average] = count
        theirs = averages[average]
        where = f"averages[{average!r}]"
        if not isinstance(theirs, Mapping):
            problems.append(f"{where}: expected a mapping, found {type(theirs).__name__}")
            continue
        problems += [f"{where}: {name} is missing" for name in tensors if name not in theirs]
        problems += [f"{where}: {name} is unknown" for name in theirs if name not in tensors]
        for name, tensor in tensors.items():
            if name in theirs:
                value, problem = _fit(
                    f"{where}: {name}", tensor, theirs[name], not strict, shards.get(name)
                )
                if problem is None:
                    loaded.pairs.append((tensor, value))
                else:
                    problems.append(problem)
    if problems:
        raise ValueError("state_dict does not fit\n  " + "\n  ".join(sorted(problems)))
    return loaded


def read_weights(
    weights: object,
    own: Mapping[str, Tensor],
    averaged: Sequence[str],
    shards: Mapping[str, Shard],
) -> tuple[list[tuple[Tensor, Tensor]], int | None]:
    """Values for one average from another library's weights.

    Args:
        weights: a state dict, with ``module.`` before the names or without, whose ``n_averaged``
            is that of an AveragedModel; or tensors in the order of ``averaged``.
        own: the average.
        averaged: names that have to be there.
        shards: which of ``own`` are pieces, by name.

    Returns:
        The average's tensors and their values, and the count if there is one.

    Raises:
        ValueError: the weights do not fit, with everything that does not.
    """
    count: int | None = None
    if isinstance(weights, Mapping):
        named = dict(weights)
        found = named.pop("n_averaged", None) if "n_averaged" not in own else None
        if isinstance(found, Tensor) and found.numel() == 1 and not is_loose(found):
            found = found.item()
        if found is not None and not is_count(found):
            raise ValueError(f"n_averaged: expected an integer of 0 or more, found {found!r}")
        count = found
        prefix = "module."
        if not any(name in named for name in own):
            named = {str(name).removeprefix(prefix): value for name, value in named.items()}
    elif isinstance(weights, Sequence):
        if len(weights) != len(averaged):
            raise ValueError(
                f"weights: expected {len(averaged)} tensors, one for each that is averaged, found "
                f"{len(weights)}"
            )
        named = dict(zip(averaged, weights, strict=True))
    else:
        raise ValueError(
            f"weights: expected a state dict or a list of tensors, found {type(weights).__name__}"
        )
    problems = [f"{name} is missing" for name in averaged if name not in named]
    problems += [f"{name} is unknown" for name in named if name not in own]
    pairs = []
    for name, value in named.items():
        if name in own:
            part, problem = _fit(str(name), own[name], value, True, shards.get(name))
            if problem is None:
                pairs.append((own[name], part))
            else:
                problems.append(problem)
    if problems:
        raise ValueError("weights do not fit\n  " + "\n  ".join(sorted(problems)))
    return pairs, count
