"""Which trajectories the methods need, with the rates and captures of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from swa_fast.schedules import budget_epoch
from swa_fast.train.config import TrainConfig
from swa_fast.train.methods import Trajectory, plan
from swa_fast.train.presets import PRESETS, flop, scaled

STEPS = 391  # of CIFAR at batch 128


def trajectories(preset: str, **changes: Any) -> dict[str, Trajectory]:
    options = {**PRESETS[preset].options, "data_dir": ".", **changes}
    return {t.name: t for t in plan(TrainConfig.from_options(options))}


def captures(trajectory: Trajectory, end: int) -> int:
    """Captures within the first ``end`` epochs, the initial one included."""
    (captured,) = trajectory.captures.values()
    assert captured is not None
    return sum(captured(epoch) for epoch in range(trajectory.begin, end + 1))


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("cifar100-vgg16", {200: 40, 250: 90, 300: 140}),
        ("cifar10-wrn28-10", {200: 40, 250: 90, 300: 140}),
        ("cifar100-preresnet164", {150: 25, 188: 63, 225: 100}),
    ],
)
def test_captures_of_the_paper_at_a_constant_rate(preset: str, counts: dict[int, int]) -> None:
    swa = trajectories(preset)["swa"]
    assert (swa.begin, swa.end) == (0, max(counts))
    assert sorted(swa.marks["swa"].values()) == sorted(counts)
    assert {end: captures(swa, end) for end in counts} == counts
    first = min(e for e in range(1, swa.end) if swa.captures["swa"](e))  # type: ignore[misc]
    assert first == {200: 161, 150: 126}[min(counts)]


def test_rates_of_the_paper_at_a_constant_rate() -> None:
    """The tables of the protocol's runs, through the presets."""
    for preset, name, rates in (
        ("cifar100-vgg16", "sgd", {100: 0.05, 101: 0.04938125, 140: 0.02525, 199: 0.0005}),
        ("cifar10-preresnet164", "sgd", {75: 0.1, 76: 0.09835, 134: 0.00265, 135: 0.001}),
        ("cifar100-vgg16", "swa", {80: 0.05, 81: 0.0496894, 120: 0.0254658, 299: 0.01}),
        ("cifar100-preresnet164", "swa", {63: 0.1, 64: 0.0990079, 113: 0.0503968, 224: 0.05}),
        ("cifar10-preresnet164", "swa", {64: 0.0982143, 100: 0.0339286, 114: 0.01}),
        ("cifar100-wrn28-10", "swa", {81: 0.0996118, 144: 0.0506988, 145: 0.05}),
        ("cifar100-wrn28-10-lower", "swa", {81: 0.0993012, 144: 0.0112578, 145: 0.01}),
    ):
        trajectory = trajectories(preset)[name]
        for epoch, rate in rates.items():
            for step in (0, STEPS - 1):  # constant within an epoch
                found = trajectory.rate(epoch, step, STEPS)
                assert found == pytest.approx(rate, rel=1e-5), (preset, name, epoch)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("vgg16", (0.05, 5e-4, 200)),
        ("preresnet164", (0.1, 3e-4, 150)),
        ("preresnet110", (0.1, 3e-4, 150)),
        ("wrn28-10", (0.1, 5e-4, 200)),
    ],
)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_recipes_of_the_paper(
    dataset: str, network: str, expected: tuple[float, float, int]
) -> None:
    config = TrainConfig.from_options(PRESETS[f"{dataset}-{network}"].options)
    assert (config.lr, config.weight_decay, config.epochs) == expected
    assert (config.batch_size, config.momentum, config.nesterov) == (128, 0.9, False)


def test_pyramidnet() -> None:
    found = trajectories("cifar100-pyramidnet272")
    sgd, swa = found["sgd"], found["swa-cyclic"]
    assert [sgd.rate(e, 0, STEPS) for e in (0, 149, 150, 224, 225)] == pytest.approx(
        [0.5, 0.5, 0.05, 0.05, 0.005]
    )
    assert (swa.begin, swa.end, sgd.end, sgd.branches) == (300, 450, 300, (300,))
    # Cycles of 3 epochs, 1,173 iterations.
    assert swa.rate(300, 0, STEPS) == pytest.approx(0.04995822677, rel=1e-9)
    assert swa.rate(300, 1, STEPS) == pytest.approx(0.04991645354, rel=1e-9)
    assert swa.rate(302, STEPS - 2, STEPS) == pytest.approx(0.00104177323, rel=1e-8)
    assert swa.rate(302, STEPS - 1, STEPS) == 0.001
    assert swa.rate(303, 0, STEPS) == pytest.approx(0.04995822677, rel=1e-9)
    # 25 and 50 captures, and the trained network's weights.
    assert (captures(swa, 375), captures(swa, 450)) == (26, 51)
    assert swa.marks["swa-cyclic"] == {1.25: 375, 1.5: 450}


def test_shake_shake() -> None:
    found = trajectories("cifar10-shakeshake26-2x64d")
    sgd, swa = found["sgd"], found["swa-cyclic"]
    assert sgd.rate(900, 0, STEPS) == pytest.approx(0.1)
    assert sgd.rate(0, 0, STEPS) == 0.2
    assert sgd.rate(1799, STEPS - 1, STEPS) < 1e-6
    for passed, rate in ((0, 0.0060307), (50, 0.0034074), (99, 0.0015497), (100, 0.0060307)):
        assert swa.rate(1800 + passed, 0, STEPS) == pytest.approx(rate, rel=1e-4)
    assert swa.rate(1850, 200, STEPS) == pytest.approx(
        0.1 * (1 + math.cos(math.pi * (1650 + 200 / STEPS) / 1800))
    )
    # 4 and 9 captures, and the trained network's weights.
    assert (captures(swa, 2250), captures(swa, 2700)) == (5, 10)


def test_imagenet() -> None:
    (swa,) = trajectories("imagenet-resnet50").values()
    assert (swa.begin, swa.end) == (0, 10)
    assert swa.marks["swa-cyclic"] == {0.5: 5, 1.0: 10}
    assert (captures(swa, 5), captures(swa, 10)) == (6, 11)
    for step, rate in ((0, 9.998021978e-4), (1, 9.996043956e-4), (5003, 1.019780220e-5)):
        assert swa.rate(0, step, 5005) == pytest.approx(rate, rel=1e-9)
    assert swa.rate(9, 5004, 5005) == 1e-5


def test_fge() -> None:
    found = trajectories("cifar100-vgg16")
    fge = found["fge"]
    assert (fge.begin, fge.end, found["sgd"].branches) == (156, 200, (156,))
    taken = [e for e in range(156, 201) if fge.captures["fge"](e)]  # type: ignore[misc]
    assert taken == list(range(157, 201, 2)) and len(taken) == 22
    assert fge.captures["fge-average"] == fge.captures["fge"]
    # The least rate of a triangle is reached where a member is taken.
    assert fge.rate(156, 0, STEPS) == 0.01
    assert fge.rate(157, 0, STEPS) == pytest.approx(5e-4)
    assert fge.rate(158, 0, STEPS) == 0.01
    wide = trajectories("cifar100-wrn28-10")["fge"]
    taken = [e for e in range(176, 201) if wide.captures["fge"](e)]  # type: ignore[misc]
    assert taken == [178, 182, 186, 190, 194, 198]
    assert wide.rate(177, 0, STEPS) == pytest.approx(0.5 * (0.05 + 5e-4))


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("cifar100-pyramidnet272", (50, 51)),
        ("cifar10-shakeshake26-2x64d", (9, 10)),
        ("imagenet-resnet50", (10, 11)),
        ("cifar100-preresnet164-cyclic-0.05", (5, 6)),
    ],
)
def test_cyclical_averages_with_and_without_the_initial_weights(
    preset: str, counts: tuple[int, int]
) -> None:
    for initial, count in zip((False, True), counts, strict=True):
        swa = trajectories(preset, include_initial=initial)["swa-cyclic"]
        captured = swa.captures["swa-cyclic"]
        assert captured is not None and captured(swa.begin) == initial
        assert captures(swa, swa.end) == count


def test_study_of_the_learning_rate() -> None:
    cyclic = trajectories("cifar100-preresnet164-cyclic-0.05")
    assert cyclic["sgd"].branches == (125,) and cyclic["swa-cyclic"].begin == 125
    assert captures(cyclic["swa-cyclic"], 150) == 5
    assert cyclic["swa-cyclic"].rate(129, STEPS - 1, STEPS) == 0.0005
    constant = trajectories("cifar100-preresnet164-constant-0.001")["swa"]
    assert (constant.begin, captures(constant, 150)) == (125, 25)
    assert constant.rate(125, 0, STEPS) == 0.001


def test_fixed_rate_from_scratch() -> None:
    (swa,) = trajectories("cifar100-wrn28-10-fixed").values()
    assert (swa.begin, swa.end, captures(swa, 300)) == (0, 300, 161)
    assert {swa.rate(e, 0, STEPS) for e in (0, 150, 299)} == {0.05}
    (other,) = trajectories("cifar100-preresnet164-fixed").values()
    assert (other.end, captures(other, 225)) == (225, 26)


def test_methods_share_the_conventional_run() -> None:
    options = {"methods": ("ema", "swa-cyclic"), "cycle_epochs": 1, "epochs": 8}
    sgd, cyclic = plan(TrainConfig.from_options(options))
    assert (sgd.name, sgd.end, sgd.branches) == ("sgd", 8, (6,))
    assert sgd.captures == {"ema": None} and sgd.marks == {"ema": {1.0: 8}}
    # Without a result of its own it ends where the others begin.
    (sgd, _) = plan(TrainConfig.from_options({**options, "methods": ("swa-cyclic",)}))
    assert (sgd.end, sgd.marks, sgd.reported) == (6, {}, frozenset())
    assert cyclic.begin == 6


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.1, 0.01, 0.001])
def test_presets_keep_their_shape_at_every_scale(name: str, scale: float) -> None:
    """Rates, captures and members by hand: nothing is captured before the rate is the paper's, four
    captures (or all) are in the first average that is reported, and FGE's cycle is even."""
    preset = PRESETS[name]
    where = {} if preset.options["dataset"] == "digits" else {"data_dir": "."}
    options = {**scaled(preset.options, scale), **where}
    config = TrainConfig.from_options(options)
    whole = {t.name: t for t in plan(TrainConfig.from_options({**preset.options, **where}))}
    found = plan(config)
    keys = {
        (method, budget) for t in found for method, marks in t.marks.items() for budget in marks
    }
    if config.pretrained is not None:
        keys.add((None, 0.0))  # type: ignore[arg-type]
    if scale == 1.0:  # FGE's of two and three budgets are of as many runs
        assert {key for key in preset.published if key[1] <= 1.5} <= keys
    assert [t.name for t in found] == list(whole)
    for trajectory in found:
        name = trajectory.name
        assert trajectory.begin < trajectory.end
        for epoch in range(trajectory.begin, min(trajectory.end, 30)):
            assert 0 < trajectory.rate(epoch, 0, 3) <= 0.5
        if name == "sgd":
            continue
        counts = []
        for one in (trajectory, whole[name]):
            captured = one.captures[name]
            assert captured is not None
            end = min(one.marks[name].values())
            counts.append([e for e in range(one.begin + 1, end + 1) if captured(e)])
        least = len(counts[1]) // 3 if name == "fge" else len(counts[1])
        assert len(counts[0]) >= min(4, least), counts
        if name == "swa":
            for epoch in counts[0]:
                assert trajectory.rate(epoch - 1, 0, 3) == pytest.approx(config.swa_lr, rel=1e-12)
        if name == "swa-cyclic":  # the last step before a capture has the least rate of its cycle
            lows = [trajectory.rate(epoch - 1, 2, 3) for epoch in counts[0]]
            assert lows == pytest.approx([trajectory.rate(counts[0][0] - 1, 2, 3)] * len(lows))
        if name == "fge":
            assert config.fge_cycle % 2 == 0
            for epoch in counts[0]:  # the triangle's foot is the next epoch's first step
                assert trajectory.rate(epoch, 0, 3) == pytest.approx(config.fge_lr_min)


@pytest.mark.parametrize(
    ("preset", "method", "expected"),
    [
        ("cifar10-vgg16", "swa", 2.8e16),
        ("cifar10-preresnet164", "swa", 1.7e16),
        ("cifar10-preresnet110", "swa", 1.1e16),
        ("cifar10-wrn28-10", "swa", 5.4e17),
        ("imagenet-resnet50", "swa-cyclic", 3.1e17),
    ],
)
def test_cost_of_training(preset: str, method: str, expected: float) -> None:
    """Published multiply-adds x 6 x images x epochs."""
    options = {**PRESETS[preset].options, "methods": (method,), "data_dir": "."}
    with torch.device("cpu"):
        assert flop(TrainConfig.from_options(options)) == pytest.approx(expected, rel=0.03)


def test_captures_are_counted_from_the_first() -> None:
    """Every third epoch from the first after the start on; a budget that ends with it counts."""
    options = {"methods": ("swa",), "epochs": 10, "swa_start": 0.5, "swa_every": 3}
    config = TrainConfig.from_options({**options, "budgets": (0.5, 0.6, 1.0), "device": "cpu"})
    (swa,) = plan(config)
    captured = swa.captures["swa"]
    assert captured is not None
    assert [epoch for epoch in range(11) if captured(epoch)] == [6, 9]
    assert swa.marks["swa"] == {0.6: 6, 1.0: 10}


def test_budgets_end_after_whole_epochs() -> None:
    assert [budget_epoch(150, b) for b in (1.0, 1.25, 1.5)] == [150, 188, 225]
    assert budget_epoch(200, 1.25) == 250
    for epochs, budget in ((0, 1.0), (1, 0.0), (1, math.nan)):
        with pytest.raises(ValueError, match=r"epochs|budget"):
            budget_epoch(epochs, budget)
