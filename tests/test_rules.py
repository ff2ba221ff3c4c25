"""The rules: weights on every device, presets, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BACKENDS, Net, is_averaged, need, snapshot, step
from torch import Tensor, nn

from swa_fast import EMA, SWA, AveragedModel, Averager, Power, Warmup, Window
from swa_fast.rules import describe_rule

backends = pytest.mark.parametrize("backend, device", BACKENDS)


@backends
@pytest.mark.parametrize(
    "rule",
    [
        SWA(), EMA(0.0), EMA(0.75), EMA(1.0), EMA(half_life=3), EMA(0.95, warmup="timm"),
        EMA(0.9, warmup="diffusers"), EMA(0.9999, warmup="diffusers-inverse-gamma"),
        EMA(0.8, warmup=Warmup(gamma=2.5, power=0.75, min_decay=0.3, update_after_step=4)),
        EMA(0.9, warmup=Warmup(gamma=None, update_after_step=3)),
        SWA(start=3), EMA(0.6, start=4), EMA(0.7, warmup="timm", start=2), Power(0), Power(-0.5),
        Power(6.94), Power(sigma_rel=0.2, start=3), Power(half_life_fraction=0.05),
        EMA(0.9, debias=True), EMA(0.999999, debias=True, start=2), EMA(0.0, debias=True),
        EMA(0.9, warmup=Warmup("ultralytics", tau=3)),
        EMA(0.9, warmup=Warmup("ultralytics", tau=3, min_decay=0.4, update_after_step=2), start=1),
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


def test_preset_against_ultralytics_formula() -> None:
    """ModelEMA(decay=0.9999, tau=2000): its updates are counted before the decay is asked for, and
    its average starts as a copy of the model."""
    rule = EMA(0.9999, warmup="ultralytics")
    for n in (0, 1, 2, 100, 2000, 10**5):
        theirs = 0.9999 * (1 - math.exp(-(n + 1) / 2000))
        assert 1 - rule.weight(n) == pytest.approx(theirs, abs=1e-15)
    source = torch.ones(2, dtype=torch.float64)
    averager = Averager([source], {"a": EMA(0.9, warmup=Warmup("ultralytics", tau=2))})
    source.fill_(3.0)
    averager.update()
    first = 0.9 * (1 - math.exp(-1 / 2))
    assert averager.averages["a"]["0"].tolist() == pytest.approx([first + (1 - first) * 3] * 2)
    assert Warmup("ema-pytorch") == Warmup(1.0, 2 / 3, 0.0, 100)


def test_power_is_written_in_several_ways() -> None:
    for sigma, gamma in (
        (0.05, 16.972198602303), (0.10, 6.937203937602), (0.15, 3.557868774899),
        (0.20, 1.826213779896), (0.25, 0.719823958001),
    ):  # fmt: skip
        assert Power(sigma_rel=sigma).gamma == pytest.approx(gamma, abs=1e-11)
        assert Power(gamma).sigma_rel == pytest.approx(sigma, abs=1e-12)
    assert Power(0).sigma_rel == pytest.approx(0.288675, abs=5e-7)
    assert Power(decay="minus-sqrt") == Power(-0.5)
    assert Power(decay="linear") == Power(gamma=0)
    assert Power(-0.5).sigma_rel == pytest.approx(0.298142, abs=5e-7)
    assert Power(half_life_fraction=0.05).gamma == pytest.approx(12.863, abs=5e-4)
    assert Power(half_life_fraction=0.05).sigma_rel == pytest.approx(0.0629, abs=5e-5)
    # What torchtitan's decay is up to O(1 / n^2), and edm2's ramp-up.
    assert 1 - Power(half_life_fraction=0.05).weight(100) == pytest.approx(0.87055, abs=1e-3)
    assert Power(math.log(2) / 0.09 - 1).sigma_rel == pytest.approx(0.1024, abs=5e-5)
    assert Power(sigma_rel=0.30028).gamma == pytest.approx((math.sqrt(5) - 3) / 2, abs=0.02)
    for n in (0, 1, 2, 5, 10**6):
        assert Power(0).weight(n) == pytest.approx(SWA().weight(n), rel=1e-15)


def weights_of(rule: object, count: int) -> list[float]:
    """Of the sources in a rule's average of so many."""
    weights: list[float] = []
    for n in range(count):
        weights = [(1 - rule.weight(n)) * w for w in weights] + [rule.weight(n)]
    return weights


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.7, 6.94])
def test_power_weighs_by_the_closed_form(gamma: float) -> None:
    for t in (1, 4, 8, 60):
        g = gamma + 1
        expected = [(i**g - (i - 1) ** g) / t**g for i in range(1, t + 1)]
        assert weights_of(Power(gamma), t) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_minus_sqrt_is_a_decay_of_the_learning_rate() -> None:
    """Merge weights by their digits; and with gradients that do not depend on the weights, the
    average is where a run with the decayed rate arrives."""
    assert weights_of(Power(decay="minus-sqrt"), 4) == pytest.approx(
        [0.5, 0.20710678, 0.15891862, 0.1339746], abs=1e-8
    )
    assert weights_of(Power(decay="minus-sqrt"), 8) == pytest.approx(
        [0.35355339, 0.14644661, 0.11237244, 0.09473435, 0.08346263, 0.07545599, 0.06938894,
         0.06458565], abs=1e-8,
    )  # fmt: skip
    for decay, factor in (("minus-sqrt", lambda x: 1 - math.sqrt(x)), ("linear", lambda x: 1 - x)):
        steps = 9
        constant = torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True)
        decayed = constant.detach().clone()
        averager = Averager([constant], {"merged": Power(decay=decay)})
        optimizer = torch.optim.SGD([constant], lr=0.1)
        for i in range(steps):
            averager.update()
            gradient = torch.tensor([1.0, -2.0, float(i)], dtype=torch.float64)
            constant.grad = gradient
            optimizer.step()
            if i < steps - 1:
                decayed -= 0.1 * factor((i + 1) / steps) * gradient
        merged = averager.averages["merged"]["0"]
        torch.testing.assert_close(merged, decayed, rtol=1e-13, atol=1e-13)


def test_ema_by_samples_scales_with_the_batch() -> None:
    base = EMA(half_life_samples=2000, batch_size=2)
    assert base.decay == EMA(half_life=1000).decay
    assert EMA(half_life_samples=2000, batch_size=16).decay == pytest.approx(base.decay**8)
    life = math.log(0.5) / math.log(0.999)
    scaled = EMA(half_life_samples=life * 32, batch_size=32 * 8).decay
    assert scaled == pytest.approx(0.992027944, abs=1e-9)


def test_debiased_is_adams() -> None:
    rule, moment, values = EMA(0.9, debias=True), 0.0, [3.0, -1.0, 4.0, 1.0, 5.0]
    average = 7.0
    for n, value in enumerate(values):
        moment = 0.9 * moment + 0.1 * value
        average += rule.weight(n) * (value - average)
        assert average == pytest.approx(moment / (1 - 0.9 ** (n + 1)), rel=1e-14)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_window_is_the_mean_of_the_last(backend: str, device: str, dtype: torch.dtype) -> None:
    """Beside another average, with copied buffers and tied, strided and complex tensors."""
    need(backend, device)
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and dtype != torch.float32:
        pytest.skip("Triton's interpreter is slow, and truncates to bfloat16")
    model = Net().to(device)
    averager = Averager(
        model, {"lawa": Window(3), "ema": EMA(0.5), "one": Window(1)}, dtype=dtype, backend=backend
    )
    seen: list[dict[str, Tensor]] = []
    for n in range(5 if interpreted else 7):
        step(model)
        averager.update()
        seen = [*seen, snapshot(model)][-3:]
        for name, found in averager.averages["lawa"].items():
            stored = [each[name] for each in seen]
            if not is_averaged(name, stored[0], "copy"):
                assert torch.equal(found, stored[-1].to(found.dtype)), (n, name)
                continue
            one = averager.averages["one"][name]
            assert torch.equal(one, stored[-1].to(found.dtype)), (n, name)
            # Equal weights one after the other, of sources in the averages' dtype.
            wide = torch.complex128 if found.is_complex() else torch.float64
            exact = torch.stack([each.to(found.dtype).to(wide) for each in stored]).mean(0)
            scale = max(float(s.abs().max()) for s in stored) if found.numel() else 0.0
            real = torch.float32 if found.is_complex() else found.dtype
            error = (found.to(wide) - exact).abs().max().item() if found.numel() else 0.0
            assert error <= 3 * torch.finfo(real).eps * scale, (n, name)
    assert averager.n_averaged == dict.fromkeys(("lawa", "ema", "one"), n + 1)


@backends
def test_all_rules_resume_to_the_bit(backend: str, device: str) -> None:
    need(backend, device)
    rules = {
        "power": Power(sigma_rel=0.1), "late": SWA(start=3), "sqrt": Power(-0.5, start=2),
        "debiased": EMA(0.9, debias=True, start=1), "yolo": EMA(0.9, warmup="ultralytics"),
        "lawa": Window(3),
    }  # fmt: skip
    torch.manual_seed(5)
    values = [torch.randn(37) for _ in range(9)]

    def run(averager: Averager, source: Tensor, values: list[Tensor]) -> None:
        for value in values:
            source.copy_(value)
            averager.update()

    source = torch.zeros(37, device=device)
    through = Averager([source], rules, backend=backend)
    run(through, source, values)
    for cut in (4,) if backend == "triton" else (1, 4, 5):
        source = torch.zeros(37, device=device)
        first = Averager([source], rules, backend=backend)
        run(first, source, values[:cut])
        state = first.state_dict()
        resumed = Averager([source], rules, backend=backend)
        resumed.load_state_dict(state)
        run(resumed, source, values[cut:])
        for name in rules:
            assert torch.equal(resumed.averages[name]["0"], through.averages[name]["0"]), name
    other = {**rules, "lawa": Window(4)}
    with pytest.raises(ValueError, match="rules: expected"):
        Averager([source], other, backend=backend).load_state_dict(through.state_dict())


@pytest.mark.parametrize("rule", [Power(6.94), EMA(0.9, debias=True), SWA(start=2)], ids=str)
def test_averaged_model_takes_a_rule(rule: object) -> None:
    model = nn.Linear(5, 3)
    averaged = AveragedModel(model, rule=rule)
    averager = Averager(model, {"a": rule})
    for _ in range(5):
        step(model)
        averaged.update_parameters(model)
        averager.update()
    for name, tensor in averaged.module.state_dict().items():
        assert torch.equal(tensor, averager.averages["a"][name])
    with pytest.raises(AssertionError, match="at most one"):
        AveragedModel(model, avg_fn=lambda a, b, n: a, rule=rule)
    with pytest.raises(TypeError, match="rule: expected SWA, EMA or Power, found Window"):
        AveragedModel(model, rule=Window(2))


def test_checkpoints_of_older_versions_name_the_same_rules() -> None:
    assert describe_rule(SWA()) == {"rule": "SWA"}
    assert describe_rule(EMA(0.9)) == {"rule": "EMA", "decay": 0.9, "warmup": None}
    warmup = {"gamma": 1.0, "power": 2 / 3, "min_decay": 0.0, "update_after_step": 0}
    assert describe_rule(EMA(0.9, warmup="timm"))["warmup"] == warmup


def test_rules_refuse() -> None:
    for make, message in (
        (lambda: EMA(), "exactly one of them"),
        (lambda: EMA(0.9, half_life=3), "exactly one of them"),
        (lambda: EMA(0.9, half_life_samples=3, batch_size=1), "exactly one of them"),
        (lambda: EMA(half_life_samples=3), "expected both or neither"),
        (lambda: EMA(half_life_samples=3, batch_size=0), "batch_size: expected a number above 0"),
        (lambda: EMA(0.9, debias=True, warmup="timm"), "debias: expected no warm-up"),
        (lambda: EMA(1.0, debias=True), "a decay below 1"),
        (lambda: EMA(0.9, start=-1), "start: expected at least 0, found -1"),
        (lambda: SWA(start=-1), "start: expected at least 0, found -1"),
        (lambda: Power(), "expected exactly one of them, found none"),
        (lambda: Power(1, sigma_rel=0.1), "found gamma, sigma_rel"),
        (lambda: Power(-1), "gamma: expected a number above -1, found -1"),
        (lambda: Power(math.nan), "gamma: expected a number above -1, found nan"),
        (lambda: Power(sigma_rel=0.31), r"sigma_rel: expected a number in \(0, 0.3003\]"),
        (lambda: Power(sigma_rel=0), "sigma_rel: expected a number in"),
        (lambda: Power(half_life_fraction=0), "half_life_fraction: expected a number above 0"),
        (lambda: Power(decay="cosine"), "decay: expected one of linear, minus-sqrt"),
        (lambda: Window(0), "k: expected at least 1, found 0"),
        (lambda: Warmup("tim"), "warmup: expected a Warmup or one of timm, diffusers"),
        (lambda: Warmup(tau=0), "tau: expected a number above 0 or None, found 0"),
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
    for rules, message in (
        ({"a": Window(16)}, r"1 to 16 rules, found 17 \(a Window counts as k \+ 1\)"),
        ({"a": Window(2), "a[0]": SWA()}, "other than those of a window's rows"),
    ):
        with pytest.raises(ValueError, match=message):
            Averager([torch.zeros(2)], rules)
