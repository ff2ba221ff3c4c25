"""How the decay of an exponential average grows to its final value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Warmup", "is_used", "short_repr"]


def short_repr(self: Any) -> str:
    """As a dataclass', without options that are not used."""
    values = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if is_used(self, f.name)]
    return f"{type(self).__name__}({', '.join(values)})"


def is_used(rule: Any, option: str) -> bool:
    return option not in ("start", "debias", "tau", "schedule") or bool(getattr(rule, option))


# The systems' own defaults, where they are not those of Warmup.
_PRESETS: dict[str, dict[str, Any]] = {
    "timm": {},
    "diffusers": {"gamma": None},
    "diffusers-inverse-gamma": {},
    "ema-pytorch": {"update_after_step": 100},
    "ultralytics": {"gamma": None, "tau": 2000.0},
}
_DEFAULTS: dict[str, Any] = {
    "gamma": 1.0,
    "power": 2 / 3,
    "min_decay": 0.0,
    "update_after_step": 0,
    "tau": None,
}


@dataclass(frozen=True, repr=False)
class Warmup:
    r"""How the decay of an :class:`EMA` grows to its final value.

    With :math:`n` updates done before this one and :math:`s = n - \text{update\_after\_step}`:

    .. math::
        d(s) = \begin{cases} 0 & s \le 0 \\
          \operatorname{clip}(1 - (1 + s/\gamma)^{-p},\ d_{\min},\ d) & \text{gamma given} \\
          \operatorname{clip}((1 + s)/(10 + s),\ d_{\min},\ d) & \text{gamma None}
        \end{cases}

    so the average is a copy of the source until :math:`s > 0`. With ``tau``

    .. math:: d(s) = \max(d\,(1 - e^{-(s + 1)/\tau}),\ d_{\min}) \quad s \ge 0

    and 0 before. The first update is then no copy: the averages start from what the weights were
    when they were made, and keep :math:`d(0)` of that.

    Args:
        gamma: :math:`\gamma > 0`, in updates; None selects the second formula. Or the name of a
            preset with another system's formula and defaults, see :class:`EMA`; what is given
            beside it differs from that preset.
        power: :math:`p > 0`; 2/3 suits up to a million updates, 3/4 more.
        min_decay: :math:`d_{\min}` in [0, 1].
        update_after_step: updates that only copy, at least 0.
        tau: :math:`\tau > 0`, in updates; selects the third formula.

    Raises:
        ValueError: an argument outside its range, or an unknown preset.

    Source: timm ``ModelEmaV3(use_warmup=True)``, diffusers ``EMAModel``, ema-pytorch ``EMA`` and
    ultralytics ``ModelEMA``, whose formulas these are; ``n + 1`` here is their step.
    """

    gamma: float | None
    power: float
    min_decay: float
    update_after_step: int
    tau: float | None

    __repr__ = short_repr

    def __init__(
        self,
        gamma: float | str | None = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        tau: float | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "gamma": gamma,
            "power": power,
            "min_decay": min_decay,
            "update_after_step": update_after_step,
            "tau": tau,
        }
        if isinstance(gamma, str):
            if gamma not in _PRESETS:
                raise ValueError(
                    f"warmup: expected a Warmup or one of {', '.join(_PRESETS)}, found {gamma!r}"
                )
            changed = {k: v for k, v in given.items() if k != "gamma" and v != _DEFAULTS[k]}
            given = {**_DEFAULTS, **_PRESETS[gamma], **changed}
        for name in ("gamma", "tau"):
            if given[name] is not None and not given[name] > 0:
                raise ValueError(f"{name}: expected a number above 0 or None, found {given[name]}")
        if not power > 0:
            raise ValueError(f"power: expected a number above 0, found {power}")
        if not 0.0 <= min_decay <= 1.0:
            raise ValueError(f"min_decay: expected a number in [0, 1], found {min_decay}")
        if update_after_step < 0:
            raise ValueError(f"update_after_step: expected at least 0, found {update_after_step}")
        for name, value in given.items():
            object.__setattr__(self, name, value)
