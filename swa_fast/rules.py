"""How an average weighs its sources: equally, by a power of their number, exponentially with or
without a warm-up, or the last few alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from . import _layout as layout
from .warmup import Warmup, is_used, short_repr

if TYPE_CHECKING:
    from .by_name import ByName

__all__ = ["EMA", "SWA", "AveragingFunction", "Power", "Rule", "Warmup", "Window"]

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


def _check_start(start: int) -> None:
    if start < 0:
        raise ValueError(f"start: expected at least 0, found {start}")


@dataclass(frozen=True, repr=False)
class SWA:
    r"""Equal weights: the :math:`n+1`-th source weighs :math:`1/(n+1)`.

    Args:
        start: updates before the first one that counts, at least 0; they only copy.

    Raises:
        ValueError: ``start`` below 0.

    Source: Izmailov et al., UAI 2018.
    """

    start: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check_start(self.start)

    def weight(self, n: int) -> float:
        """Weight of the source when ``n`` were averaged before."""
        return 1.0 / (max(n - self.start, 0) + 1)

    def _row(self) -> list[float]:
        if self.start > 0:
            return _row(layout.POWER_LAW, 0.0, 0.0, 0.0, 1.0, self.start)
        return _row(layout.SWA)


# The largest relative width that a power function has, at gamma = (sqrt(5) - 3) / 2.
_WIDEST = math.sqrt((math.sqrt(5) - 1) / 2) ** 5


def _gamma_of(sigma_rel: float) -> float:
    """The largest root of g^3 + 7 g^2 + (16 - t) g + (12 - t), t = sigma_rel^-2."""
    t = sigma_rel**-2
    # With g = x - 7/3 a cubic without a square, whose three roots are real.
    p, q = (16 - t) - 49 / 3, 686 / 27 - 7 * (16 - t) / 3 + (12 - t)
    cosine = 3 * q / (2 * p) * math.sqrt(-3 / p)
    g = 2 * math.sqrt(-p / 3) * math.cos(math.acos(max(-1.0, min(cosine, 1.0))) / 3) - 7 / 3
    slope = 3 * g**2 + 14 * g + (16 - t)
    error = ((g + 7) * g + (16 - t)) * g + (12 - t)
    # One step of Newton, where the root is not a double one.
    return g - error / slope if abs(slope) > 1e-3 else g


@dataclass(frozen=True, repr=False)
class Power:
    r"""Weights by a power of the sources' number: the :math:`n+1`-th weighs

    .. math:: w(n) = 1 - \left(\frac{n}{n+1}\right)^{\gamma+1}

    so that after :math:`t` updates the :math:`i`-th source has the weight
    :math:`(i^{\gamma+1} - (i-1)^{\gamma+1}) / t^{\gamma+1}`: a profile that widens with
    training, at every moment :math:`\propto i^\gamma`. It is :class:`SWA` at :math:`\gamma = 0`,
    the exponential average of post-hoc EMA for :math:`\gamma > 0`, and at
    :math:`\gamma = -1/2` what a run with a rate that decays as :math:`1 - \sqrt{x}` would have
    reached from the same gradients.

    Args:
        gamma: :math:`\gamma > -1`.
        sigma_rel: instead: the profile's standard deviation in units of training, in (0, 0.3002],
            :math:`\sqrt{(\gamma+1) / ((\gamma+2)^2 (\gamma+3))}`; of two gammas the larger one.
        half_life_fraction: instead: the fraction of training over which a weight halves,
            :math:`f > 0`, :math:`\gamma = \ln 2 / f - 1`.
        decay: instead: the decay of the learning rate that the average stands for, ``linear``
            (:math:`\gamma = 0`) or ``minus-sqrt`` (:math:`\gamma = -1/2`).
        start: updates before the first one that counts, at least 0; they only copy.

    Raises:
        ValueError: not exactly one of the first four, or one out of range.

    Sources: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    CVPR 2024; Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging", 2025.
    """

    gamma: float
    start: int

    __repr__ = short_repr

    def __init__(
        self,
        gamma: float | None = None,
        *,
        sigma_rel: float | None = None,
        half_life_fraction: float | None = None,
        decay: str | None = None,
        start: int = 0,
    ) -> None:
        given = {
            "gamma": gamma,
            "sigma_rel": sigma_rel,
            "half_life_fraction": half_life_fraction,
            "decay": decay,
        }
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"{', '.join(given)}: expected exactly one of them, found "
                f"{', '.join(chosen) or 'none'}"
            )
        if sigma_rel is not None:
            if not 0 < sigma_rel <= _WIDEST:
                raise ValueError(
                    f"sigma_rel: expected a number in (0, {_WIDEST:.4f}], found {sigma_rel}"
                )
            gamma = _gamma_of(sigma_rel)
        elif half_life_fraction is not None:
            if not 0 < half_life_fraction < math.inf:
                raise ValueError(
                    f"half_life_fraction: expected a number above 0, found {half_life_fraction}"
                )
            gamma = math.log(2) / half_life_fraction - 1
        elif decay is not None:
            gammas = {"linear": 0.0, "minus-sqrt": -0.5}
            if decay not in gammas:
                raise ValueError(f"decay: expected one of {', '.join(gammas)}, found {decay!r}")
            gamma = gammas[decay]
        assert gamma is not None
        if not -1 < gamma < math.inf:
            raise ValueError(f"gamma: expected a number above -1, found {gamma}")
        _check_start(start)
        object.__setattr__(self, "gamma", float(gamma))
        object.__setattr__(self, "start", start)

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the profile in units of training."""
        g = self.gamma
        return math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))

    def weight(self, n: int) -> float:
        """Weight of the source when ``n`` were averaged before."""
        s = n - self.start
        return 1.0 if s <= 0 else -math.expm1((self.gamma + 1) * math.log1p(-1 / (s + 1)))

    def _row(self) -> list[float]:
        return _row(layout.POWER_LAW, 0.0, 0.0, 0.0, self.gamma + 1, self.start)


@dataclass(frozen=True)
class Window:
    r"""Equal weights for the last ``k`` sources alone (LAWA), :math:`\frac1k \sum_{i=n-k+1}^n b_i`.

    The sources of the window are kept, each in a row of the averages' memory: ``k + 1`` rows in
    all. An update writes one of them, :math:`4 + 4` bytes per fp32 parameter, and forms the mean
    anew from all, :math:`12k` bytes and ``k`` launches, so that no error accumulates: capture
    every so many steps, ``averager.attach(optimizer, every=1000)``, say.

    Args:
        k: at least 1.

    Raises:
        ValueError: ``k`` below 1.

    Sources: Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
    Weight Averaging", 2022; Sanyal et al., "Early Weight Averaging Meets High Learning Rates for
    LLM Pre-training", 2023.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, found {self.k}")

    def _row(self) -> list[float]:
        # After the first update, a copy, the mean is what its members make of it.
        return _row(layout.EXTERNAL)


@dataclass(frozen=True)
class Member:
    """Row ``at`` of the sources that the window in row ``window`` keeps."""

    window: int
    k: int
    at: int

    def _row(self) -> list[float]:
        return _row(layout.RING, 0.0, 0.0, self.k, self.at)


@dataclass(frozen=True)
class Filled:
    """How the mean of a window takes its member ``at``, after the update was counted."""

    at: int

    def _row(self) -> list[float]:
        return _row(layout.FILLED, 0.0, 0.0, 0.0, self.at)


@dataclass(frozen=True, repr=False)
class EMA:
    r"""Exponential weights, :math:`a \leftarrow d\,a + (1-d)\,b`; the first update copies.

    Args:
        decay: :math:`d` in [0, 1]; or a function that an :class:`~swa_fast.Averager` calls with the
            number of updates before each one, for a decay that changes at every step.
        half_life: instead of ``decay``: updates after which a source's weight has halved,
            :math:`d = 2^{-1/h}`, :math:`h > 0`.
        warmup: a :class:`Warmup`, or the name of a preset with another system's formula and
            defaults: ``timm``, ``diffusers``, ``diffusers-inverse-gamma``
            (``use_ema_warmup=True``), ``ema-pytorch`` or ``ultralytics``. None uses the decay
            from the second update on.
        half_life_samples: instead of ``decay``: the half-life in samples, of which ``batch_size``
            pass between two updates, :math:`d = 2^{-\text{batch\_size}/h}`. The average then
            covers as much data at every batch size.
        batch_size: samples between two updates, above 0.
        debias: divide by the weights' sum, as Adam does: the :math:`n+1`-th source weighs
            :math:`(1 - d) / (1 - d^{n+1})`, so the first one is not over-represented.
        start: updates before the first one that counts, at least 0; they only copy.

    Raises:
        ValueError: not exactly one of ``decay``, ``half_life`` and ``half_life_samples``, one out
            of range, an unknown preset, or ``debias`` with a warm-up or a decay of 1.

    Source of the scaling by batch size: Busbridge et al., "How to Scale Your EMA", NeurIPS 2023.
    """

    decay: float
    warmup: Warmup | None
    debias: bool
    start: int
    schedule: Callable[[int], float] | None

    __repr__ = short_repr

    def __init__(
        self,
        decay: float | Callable[[int], float] | None = None,
        *,
        half_life: float | None = None,
        warmup: Warmup | str | None = None,
        half_life_samples: float | None = None,
        batch_size: float | None = None,
        debias: bool = False,
        start: int = 0,
    ) -> None:
        schedule = None
        if callable(decay):
            schedule, first = decay, decay(0)
            if isinstance(first, bool) or not isinstance(first, float | int):
                raise TypeError(f"decay: expected a function that returns a number, found {first}")
            decay = float(first)
        if (half_life_samples is None) != (batch_size is None):
            raise ValueError(
                "half_life_samples, batch_size: expected both or neither, found "
                f"{half_life_samples} and {batch_size}"
            )
        if half_life_samples is not None and batch_size is not None:
            for name, value in (
                ("half_life_samples", half_life_samples),
                ("batch_size", batch_size),
            ):
                if not value > 0:
                    raise ValueError(f"{name}: expected a number above 0, found {value}")
            if decay is None and half_life is None:
                half_life = half_life_samples / batch_size
            else:
                half_life, decay = 1.0, 1.0
        if (decay is None) == (half_life is None):
            raise ValueError(
                "decay, half_life, half_life_samples: expected exactly one of them, found "
                f"{decay}, {half_life} and {half_life_samples}"
            )
        if half_life is not None:
            if not half_life > 0:
                raise ValueError(f"half_life: expected a number above 0, found {half_life}")
            decay = 2.0 ** (-1.0 / half_life)
        assert isinstance(decay, float | int)
        check_decay(decay)
        if isinstance(warmup, str):
            warmup = Warmup(warmup)
        if debias and (warmup is not None or decay == 1.0):
            raise ValueError(
                "debias: expected no warm-up, which makes up for the first source by itself, and "
                f"a decay below 1; found warmup={warmup} and decay={decay}"
            )
        _check_start(start)
        if warmup is not None and warmup.min_decay > decay:
            raise ValueError(f"warmup: its min_decay {warmup.min_decay} exceeds the decay {decay}")
        object.__setattr__(self, "decay", float(decay))
        object.__setattr__(self, "warmup", warmup)
        object.__setattr__(self, "debias", debias)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "schedule", schedule)

    def with_decay(self, decay: float) -> EMA:
        """The same rule with another decay, which is the same for all updates.

        Raises:
            ValueError: ``decay`` outside its range.
        """
        return EMA(float(decay), warmup=self.warmup, debias=self.debias, start=self.start)

    def weight(self, n: int) -> float:
        """Weight of the source when ``n`` were averaged before."""
        if self.schedule is not None:
            return self.with_decay(self.schedule(n)).weight(n)
        w = self.warmup
        s = n - self.start - (0 if w is None else w.update_after_step)
        if w is not None and w.tau is not None:
            if s < 0:
                return 1.0
            return 1.0 - max(-self.decay * math.expm1(-(s + 1) / w.tau), w.min_decay)
        if s <= 0:
            return 1.0
        if w is None:
            return (1.0 - self.decay) / (1.0 - self.decay ** (s + 1) if self.debias else 1.0)
        decay = (1 + s) / (10 + s) if w.gamma is None else 1 - (1 + s / w.gamma) ** -w.power
        return 1.0 - max(min(decay, self.decay), w.min_decay)

    def _row(self) -> list[float]:
        w = self.warmup
        if w is None:
            if self.debias and self.decay > 0:
                log = math.log(self.decay)
                return _row(layout.DEBIASED, self.decay, 0.0, 0.0, log, self.start)
            return _row(layout.CONSTANT, self.decay, 0.0, 0.0, 0.0, self.start)
        after = self.start + w.update_after_step
        if w.tau is not None:
            # The kernels' s begins with 1 at the first update that counts.
            return _row(layout.EXPONENTIAL, self.decay, w.min_decay, w.tau, 0.0, after - 1)
        kind = layout.RATIO if w.gamma is None else layout.INVERSE_GAMMA
        return _row(kind, self.decay, w.min_decay, w.gamma or 0.0, w.power, after)


BUILT_IN = SWA | EMA | Power | Window
Rule = Union[BUILT_IN, "ByName", AveragingFunction]


def with_members(rules: Sequence[Rule]) -> list[Rule | Member]:
    """The rules of all rows: those given, and then one for each source that a window keeps."""
    members = [
        Member(row, rule.k, at)
        for row, rule in enumerate(rules)
        if isinstance(rule, Window)
        for at in range(rule.k)
    ]
    return [*rules, *members]


def row_names(rules: Mapping[str, Rule]) -> list[str]:
    """Names of all rows, in the order of :func:`with_members`."""
    windows = {name: rule for name, rule in rules.items() if isinstance(rule, Window)}
    return [*rules, *(f"{name}[{at}]" for name, rule in windows.items() for at in range(rule.k))]


def rule_row(rule: Rule | Member | Filled) -> list[float]:
    """The rule as a row of the rules tensor; a user's function is nobody's business there."""
    if isinstance(rule, BUILT_IN | Member | Filled):
        return rule._row()
    return _row(layout.EXTERNAL)


def describe_rule(rule: Rule) -> dict[str, Any]:
    """The rule as plain values, for checkpoints."""
    # What is not used is left out, so that checkpoints of older versions say the same.
    if isinstance(rule, BUILT_IN):
        values = {name: v for name, v in asdict(rule).items() if is_used(rule, name)}
        if isinstance(rule, EMA) and rule.warmup is not None and rule.warmup.tau is None:
            del values["warmup"]["tau"]
        if "schedule" in values:
            values["schedule"] = _name_of(values["schedule"])
        return {"rule": type(rule).__name__, **values}
    from .by_name import ByName  # which is made of these rules

    if isinstance(rule, ByName):
        return rule.describe()
    return {"rule": "function", "name": _name_of(rule)}


def _name_of(function: object) -> str:
    kind = type(function)
    return str(getattr(function, "__qualname__", f"{kind.__module__}.{kind.__qualname__}"))


def why_it_stands_still(rule: Rule, dtype: torch.dtype) -> str | None:
    """Why an average of this dtype, rounded to nearest, would stand still."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return None
    resolution = torch.finfo(dtype).eps
    if isinstance(rule, SWA | Power) and dtype in (torch.bfloat16, torch.float16):
        # A difference of the value's own size is then half of what the dtype can tell apart.
        updates = round(2 * (1 + getattr(rule, "gamma", 0.0)) / resolution)
        return (
            f"the weight of a new source in {rule!r} falls with the number of updates: with the "
            f"resolution {resolution:.2g} of {dtype} it would be rounded away, and the average "
            f"stand still, from some {updates} updates on"
        )
    if not isinstance(rule, EMA) or rule.schedule is not None:
        return None
    if rule.decay == 1.0 or 1.0 - rule.decay >= resolution:
        return None
    return (
        f"an EMA with decay {rule.decay} moves by {1.0 - rule.decay:.2g} of the difference at each "
        f"update, which is below the resolution {resolution:.2g} of {dtype}: it would be rounded "
        "away and the average would stand still"
    )
