"""How an average weighs its sources: equally, or exponentially with or without a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import _layout as layout

__all__ = ["EMA", "SWA", "AveragingFunction", "Rule", "Warmup"]

# (averages, sources, n_averaged): changes the averages in place.
AveragingFunction = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]


def _row(*columns: float) -> list[float]:
    """A row of the rules tensor, see :data:`swa_fast._layout.KIND`."""
    return [*columns, *[0.0] * (layout.RULE_COLUMNS - len(columns))]


def steady_row(decay: float) -> list[float]:
    """The rule of an average that weighs its source by 1 - decay from the first update on."""
    return _row(layout.CONSTANT, decay, 0.0, 0.0, 0.0, -1.0)


def check_decay(decay: float) -> None:
    """Raises ValueError unless ``decay`` lies in [0, 1]."""
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1], found {decay}")


@dataclass(frozen=True)
class Warmup:
    r"""How the decay of an :class:`EMA` grows to its final value.

    With :math:`n` updates done before this one and :math:`s = n - \text{update\_after\_step}`:

    .. math::
        d(s) = \begin{cases} 0 & s \le 0 \\
          \operatorname{clip}(1 - (1 + s/\gamma)^{-p},\ d_{\min},\ d) & \text{gamma given} \\
          \operatorname{clip}((1 + s)/(10 + s),\ d_{\min},\ d) & \text{gamma None}
        \end{cases}

    so the average is a copy of the source until :math:`s > 0`.

    Args:
        gamma: :math:`\gamma > 0`, in updates; None selects the second formula.
        power: :math:`p > 0`; 2/3 suits up to a million updates, 3/4 more.
        min_decay: :math:`d_{\min}` in [0, 1].
        update_after_step: updates that only copy, at least 0.

    Raises:
        ValueError: an argument outside its range.

    Source: timm ``ModelEmaV3(use_warmup=True)``, diffusers ``EMAModel`` and ema-pytorch ``EMA``,
    whose formulas these are; ``n + 1`` here is their step.
    """

    gamma: float | None = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    update_after_step: int = 0

    def __post_init__(self) -> None:
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma: expected a number above 0 or None, found {self.gamma}")
        if not self.power > 0:
            raise ValueError(f"power: expected a number above 0, found {self.power}")
        if not 0.0 <= self.min_decay <= 1.0:
            raise ValueError(f"min_decay: expected a number in [0, 1], found {self.min_decay}")
        if self.update_after_step < 0:
            raise ValueError(
                f"update_after_step: expected at least 0, found {self.update_after_step}"
            )


# The systems' own defaults.
_PRESETS = {
    "timm": Warmup(gamma=1.0, power=2 / 3, min_decay=0.0, update_after_step=0),
    "diffusers": Warmup(gamma=None, min_decay=0.0, update_after_step=0),
    "diffusers-inverse-gamma": Warmup(gamma=1.0, power=2 / 3),
    "ema-pytorch": Warmup(gamma=1.0, power=2 / 3, min_decay=0.0, update_after_step=100),
}


@dataclass(frozen=True)
class SWA:
    r"""Equal weights: the :math:`n+1`-th source weighs :math:`1/(n+1)`.

    Source: Izmailov et al., UAI 2018.
    """

    def weight(self, n: int) -> float:
        """Weight of the source when ``n`` were averaged before."""
        return 1.0 / (n + 1)

    def _row(self) -> list[float]:
        return _row(layout.SWA)


@dataclass(frozen=True)
class EMA:
    r"""Exponential weights, :math:`a \leftarrow d\,a + (1-d)\,b`; the first update copies.

    Args:
        decay: :math:`d` in [0, 1].
        half_life: instead of ``decay``: updates after which a source's weight has halved,
            :math:`d = 2^{-1/h}`, :math:`h > 0`.
        warmup: a :class:`Warmup`, or the name of a preset with another system's formula and
            defaults: ``timm``, ``diffusers``, ``diffusers-inverse-gamma``
            (``use_ema_warmup=True``) or ``ema-pytorch``. None uses the decay from the second
            update on.

    Raises:
        ValueError: not exactly one of ``decay`` and ``half_life``, one out of range, or an unknown
            preset.
    """

    decay: float
    warmup: Warmup | None

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: float | None = None,
        warmup: Warmup | str | None = None,
    ) -> None:
        if (decay is None) == (half_life is None):
            raise ValueError(
                f"decay, half_life: expected exactly one of the two, found {decay} and {half_life}"
            )
        if half_life is not None:
            if not half_life > 0:
                raise ValueError(f"half_life: expected a number above 0, found {half_life}")
            decay = 2.0 ** (-1.0 / half_life)
        assert decay is not None
        check_decay(decay)
        if isinstance(warmup, str):
            if warmup not in _PRESETS:
                raise ValueError(
                    f"warmup: expected a Warmup or one of {', '.join(_PRESETS)}, found {warmup!r}"
                )
            warmup = _PRESETS[warmup]
        if warmup is not None and warmup.min_decay > decay:
            raise ValueError(f"warmup: its min_decay {warmup.min_decay} exceeds the decay {decay}")
        object.__setattr__(self, "decay", float(decay))
        object.__setattr__(self, "warmup", warmup)

    def weight(self, n: int) -> float:
        """Weight of the source when ``n`` were averaged before."""
        s = n - (0 if self.warmup is None else self.warmup.update_after_step)
        if s <= 0:
            return 1.0
        if self.warmup is None:
            return 1.0 - self.decay
        gamma = self.warmup.gamma
        decay = (1 + s) / (10 + s) if gamma is None else 1 - (1 + s / gamma) ** -self.warmup.power
        return 1.0 - max(min(decay, self.decay), self.warmup.min_decay)

    def _row(self) -> list[float]:
        w = self.warmup
        if w is None:
            return _row(layout.CONSTANT, self.decay)
        kind = layout.RATIO if w.gamma is None else layout.INVERSE_GAMMA
        return _row(kind, self.decay, w.min_decay, w.gamma or 0.0, w.power, w.update_after_step)


Rule = SWA | EMA | AveragingFunction


def rule_row(rule: Rule) -> list[float]:
    """The rule as a row of the rules tensor; a user's function is nobody's business there."""
    return rule._row() if isinstance(rule, SWA | EMA) else _row(layout.EXTERNAL)


def describe_rule(rule: Rule) -> dict[str, Any]:
    """The rule as plain values, for checkpoints."""
    if isinstance(rule, SWA):
        return {"rule": "SWA"}
    if isinstance(rule, EMA):
        warmup = None if rule.warmup is None else asdict(rule.warmup)
        return {"rule": "EMA", "decay": rule.decay, "warmup": warmup}
    kind = type(rule)
    name = getattr(rule, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")
    return {"rule": "function", "name": name}


def why_it_stands_still(rule: Rule, dtype: torch.dtype) -> str | None:
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
