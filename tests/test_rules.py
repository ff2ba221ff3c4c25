"""The rules: weights on every device, presets, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    BACKENDS,
    need,
)
from torch import nn

from swa_fast import EMA, SWA, Averager, Warmup

backends = pytest.mark.parametrize("backend, device", BACKENDS)


@backends
@pytest.mark.parametrize(
    "rule",
    [
        SWA(), EMA(0.0), EMA(0.75), EMA(1.0), EMA(half_life=3), EMA(0.95, warmup="timm"),
        EMA(0.9, warmup="diffusers"), EMA(0.9999, warmup="diffusers-inverse-gamma"),
        EMA(0.8, warmup=Warmup(gamma=2.5, power=0.75, min_decay=0.3, update_after_step=4)),
        EMA(0.9, warmup=Warmup(gamma=None, update_after_step=3)),
    ],
    ids=str,
)  # fmt: skip
def test_weights_on_the_device_are_the_rule_s(backend: str, device: str, rule: object) -> None:
    """The average of 0, 1, 1, 1, ... in fp64 tells every weight."""
    need(backend, device)
    source = torch.zeros(3, dtype=torch.float64, device=device)
    averager = Averager([source], {"a": rule}, backend=backend)
    expected = 0.0
    for n in range(12):
        averager.update()
        expected += rule.weight(n) * (float(n > 0) - expected)
        found = averager.averages["a"]["0"].tolist()
        assert found == pytest.approx([expected] * 3, rel=1e-12, abs=0), n
        source.fill_(1.0)


def test_presets_are_the_other_systems_formulas() -> None:
    """Written out from their documentation; step is theirs, n + 1 here."""

    def inverse_gamma(step: int, decay: float, after: int) -> float:
        s = max(0, step - after - 1)
        return 0.0 if s <= 0 else min(1 - (1 + s / 1.0) ** -(2 / 3), decay)

    def ratio(step: int, decay: float) -> float:
        s = max(0, step - 1)
        return 0.0 if s <= 0 else min((1 + s) / (10 + s), decay)

    for n in (0, 1, 2, 9, 99, 100, 101, 5000, 10**6):
        for decay in (0.9, 0.9999):
            for preset, theirs in (
                ("timm", inverse_gamma(n + 1, decay, 0)),
                ("diffusers-inverse-gamma", inverse_gamma(n + 1, decay, 0)),
                ("ema-pytorch", inverse_gamma(n + 1, decay, 100)),
                ("diffusers", ratio(n + 1, decay)),
            ):
                assert 1 - EMA(decay, warmup=preset).weight(n) == pytest.approx(theirs, abs=1e-15)


def test_preset_against_timm() -> None:
    timm = pytest.importorskip("timm.utils.model_ema", exc_type=ImportError)
    theirs = timm.ModelEmaV3(nn.Linear(1, 1), decay=0.999, use_warmup=True)
    for n in range(2000):
        found = 1 - EMA(0.999, warmup="timm").weight(n)
        assert found == pytest.approx(theirs.get_decay(n + 1), abs=2**-52)


@pytest.mark.parametrize("preset", ["diffusers", "diffusers-inverse-gamma"])
def test_preset_against_diffusers(preset: str) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    theirs = training_utils.EMAModel(
        [nn.Parameter(torch.zeros(1))], decay=0.999, use_ema_warmup=preset != "diffusers"
    )
    for n in range(2000):
        found = 1 - EMA(0.999, warmup=preset).weight(n)
        assert found == pytest.approx(theirs.get_decay(n + 1), abs=2**-52)


def test_preset_against_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch", exc_type=ImportError)
    model = nn.Linear(1, 1)
    theirs = ema_pytorch.EMA(model, beta=0.999, update_every=1)
    for n in range(300):
        theirs.update()
        expected = theirs.get_current_decay()
        found = 1 - EMA(0.999, warmup="ema-pytorch").weight(n)
        assert found == pytest.approx(float(expected), abs=1e-6), n  # theirs is fp32


def test_rules_refuse() -> None:
    for make, message in (
        (lambda: EMA(), "exactly one of the two"),
        (lambda: EMA(0.9, half_life=3), "exactly one of the two"),
        (lambda: EMA(1.5), r"decay: expected a number in \[0, 1\], found 1.5"),
        (lambda: EMA(math.nan), "decay"),
        (lambda: EMA(half_life=0), "half_life: expected a number above 0, found 0"),
        (lambda: EMA(0.9, warmup="tim"), "warmup: expected a Warmup or one of timm, diffusers"),
        (lambda: EMA(0.5, warmup=Warmup(min_decay=0.6)), "min_decay 0.6 exceeds the decay 0.5"),
        (lambda: Warmup(gamma=0), "gamma"),
        (lambda: Warmup(power=-1), "power"),
        (lambda: Warmup(min_decay=2), "min_decay"),
        (lambda: Warmup(update_after_step=-1), "update_after_step"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
