"""What :class:`~swa_fast.Averager` is given, looked at before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import _backends, _ops
from ._layout import MAX_AVERAGES
from .by_name import ByName
from .rules import BUILT_IN, Rule, row_names, with_members

__all__ = ["check_averages", "check_overlap", "check_settings"]


def check_averages(averages: Mapping[str, Rule], on_nonfinite: str | None) -> None:
    """Raises TypeError or ValueError unless these are rules that one averager can have."""
    for name, rule in averages.items():
        if not isinstance(rule, BUILT_IN | ByName) and not callable(rule):
            raise TypeError(
                f"averages[{name!r}]: expected SWA, EMA, Power, Window, ByName or a function, "
                f"found {type(rule).__name__}"
            )
    rows = with_members(list(averages.values()))
    if not rows or len(rows) > MAX_AVERAGES:
        raise ValueError(
            f"averages: expected 1 to {MAX_AVERAGES} rules, found {len(rows)}"
            + (" (a Window counts as k + 1)" if len(rows) > len(averages) else "")
        )
    others = [rule for rule in averages.values() if not isinstance(rule, BUILT_IN)]
    if on_nonfinite is not None and others:
        why = (
            "rules by name, whose tensors are looked at and updated one set after the other"
            if isinstance(others[0], ByName)
            else "a user's function, which runs before the check"
        )
        raise ValueError(f"on_nonfinite: expected None beside {why}; found {on_nonfinite!r}")
    if len(set(row_names(averages))) < len(rows):
        raise ValueError(
            "averages: expected names other than those of a window's rows, such as NAME[0]; "
            f"found {', '.join(row_names(averages))}"
        )


def check_settings(
    dtype: torch.dtype | None,
    backend: str | None,
    buffers: str,
    rounding: str,
    on_nonfinite: str | None,
    excluded: str,
) -> None:
    """Raises TypeError or ValueError unless each is one that there is, and they go together."""
    if dtype is not None and dtype not in _ops.AVERAGE_DTYPES:
        raise TypeError(f"dtype: expected None or one of {_ops.AVERAGE_DTYPES}, found {dtype}")
    _backends.check_name(backend)
    for argument, value, expected in (
        ("buffers", buffers, ("copy", "average", "skip")),
        ("rounding", rounding, ("nearest", "stochastic")),
        ("on_nonfinite", on_nonfinite, (None, "skip", "raise")),
        ("excluded", excluded, ("skip", "copy")),
    ):
        if value not in expected:
            raise ValueError(f"{argument}: expected one of {expected}, found {value!r}")
    if rounding == "stochastic" and dtype != torch.bfloat16:
        raise ValueError(f"rounding='stochastic': expected dtype torch.bfloat16, found {dtype}")


def check_overlap(
    overlap: bool,
    device: int | str | torch.device | None,
    averages: Mapping[str, Rule],
    on_nonfinite: str | None,
) -> bool:
    """Raises ValueError unless updates can be left to a thread of the host, if that is wanted."""
    if not overlap:
        return False
    if device is None or torch.empty(0, device=device).device.type != "cpu":
        raise ValueError(f"overlap: expected device='cpu' beside it, found {device!r}")
    for name, rule in averages.items():
        if not isinstance(rule, BUILT_IN | ByName) or getattr(rule, "schedule", None) is not None:
            raise ValueError(f"overlap: expected no function in averages[{name!r}], found {rule!r}")
    if on_nonfinite == "raise":
        raise ValueError("overlap: expected on_nonfinite=None or 'skip', found 'raise'")
    return True
