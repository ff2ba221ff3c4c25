"""Learning-rate schedules against the values of the paper's own code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch.optim.swa_utils
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Optimizer

import swa_fast
from swa_fast.schedules import (
    DelayedSWALR,
    cosine_cycle_lr,
    cosine_lr,
    cyclic_lr,
    fge_lr,
    fge_member,
    first_capture,
    paper_lr,
    paper_swa_lr,
    step_lr,
)

# lr, total epochs, {epoch: rate}: the conventional runs.
CONVENTIONAL = {
    "VGG-16": (
        0.05,
        200,
        {
            0: 0.05,
            100: 0.05,
            101: 0.04938125,
            140: 0.02525,
            160: 0.012875,
            179: 0.00111875,
            180: 0.0005,
            199: 0.0005,
        },
    ),
    "PreResNet": (
        0.1,
        150,
        {
            0: 0.1,
            75: 0.1,
            76: 0.09835,
            100: 0.05875,
            120: 0.02575,
            134: 0.00265,
            135: 0.001,
            149: 0.001,
        },
    ),
    "WRN": (
        0.1,
        200,
        {
            0: 0.1,
            100: 0.1,
            101: 0.0987625,
            140: 0.0505,
            160: 0.02575,
            179: 0.0022375,
            180: 0.001,
            199: 0.001,
        },
    ),
}

# lr, swa_lr, start, {epoch: rate}: the SWA runs.
SWA = {
    "VGG-16": (
        0.05,
        0.01,
        161,
        {0: 0.05, 80: 0.05, 81: 0.0496894, 120: 0.0254658, 144: 0.0105590, 145: 0.01, 299: 0.01},
    ),
    "PreResNet, CIFAR-100": (
        0.1,
        0.05,
        126,
        {0: 0.1, 63: 0.1, 64: 0.0990079, 100: 0.0632937, 113: 0.0503968, 114: 0.05, 224: 0.05},
    ),
    "PreResNet, CIFAR-10": (
        0.1,
        0.01,
        126,
        {0: 0.1, 63: 0.1, 64: 0.0982143, 100: 0.0339286, 113: 0.0107143, 114: 0.01, 224: 0.01},
    ),
    "WRN": (
        0.1,
        0.05,
        161,
        {0: 0.1, 80: 0.1, 81: 0.0996118, 120: 0.0693323, 144: 0.0506988, 145: 0.05, 299: 0.05},
    ),
    "WRN, lower rate": (
        0.1,
        0.01,
        161,
        {0: 0.1, 80: 0.1, 81: 0.0993012, 120: 0.0447981, 144: 0.0112578, 145: 0.01, 299: 0.01},
    ),
}


@pytest.mark.parametrize("name", CONVENTIONAL)
def test_conventional_rates(name: str) -> None:
    lr, total, rates = CONVENTIONAL[name]
    for epoch, rate in rates.items():
        found = paper_lr(epoch, lr=lr, total=total, final_lr=0.01 * lr)
        assert found == pytest.approx(rate, rel=1e-9), epoch


@pytest.mark.parametrize("name", SWA)
def test_swa_rates(name: str) -> None:
    lr, swa_lr, start, rates = SWA[name]
    for epoch, rate in rates.items():
        found = paper_swa_lr(epoch, lr=lr, swa_lr=swa_lr, start=start)
        assert found == pytest.approx(rate, abs=5.1e-8), epoch


@given(
    lr=st.floats(1e-4, 1.0),
    share=st.floats(0.001, 1.0),
    total=st.integers(1, 400),
)
def test_rates_fall_from_the_first_to_the_last(lr: float, share: float, total: int) -> None:
    final = share * lr
    rates = [paper_lr(e, lr=lr, total=total, final_lr=final) for e in range(total + 3)]
    assert rates[0] == lr
    assert rates[-1] == final
    assert all(a >= b or a == pytest.approx(b, rel=1e-12) for a, b in pairwise(rates))


@pytest.mark.parametrize(
    ("epochs", "fraction", "expected"),
    [
        (200, 0.8, 161),
        (150, 125 / 150, 126),
        (40, 0.75, 31),
        (3, 0.75, 3),
        (1, 0.75, 1),
        (100, 0.29, 30),  # 0.29 * 100 is 28.999999999999996
        (10, 1.0, 11),
        (10, 0.0, 1),
        (150, 199 / 150, 200),
    ],
)
def test_first_capture(epochs: int, fraction: float, expected: int) -> None:
    assert first_capture(epochs, fraction) == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"epoch": -1}, "epoch"),
        ({"lr": 0.0}, "lr"),
        ({"total": 0}, "total"),
        ({"final_lr": float("nan")}, "final_lr"),
    ],
)
def test_bad_rates(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .* found"):
        paper_lr(**{"epoch": 1, "lr": 0.1, "total": 10, "final_lr": 0.01, **arguments})


@pytest.mark.parametrize(("epochs", "fraction"), [(0, 0.5), (10, -0.1), (10, float("nan"))])
def test_bad_first_capture(epochs: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"^(epochs|fraction): expected .* found"):
        first_capture(epochs, fraction)


@pytest.mark.parametrize(
    ("lr_max", "lr_min", "cycle", "rates"),
    [
        (0.05, 0.001, 4, {1: 0.03775, 2: 0.0255, 3: 0.01325, 4: 0.001, 5: 0.03775}),
        (
            0.05,
            0.001,
            1173,
            {1: 0.04995822677, 2: 0.04991645354, 1172: 0.00104177323, 1173: 0.001,
             1174: 0.04995822677},
        ),
        (
            0.05,
            0.0005,
            1955,
            {1: 0.04997468031, 2: 0.04994936061, 1954: 0.00052531969, 1955: 0.0005,
             1956: 0.04997468031},
        ),
        (
            1e-3,
            1e-5,
            5005,
            {1: 9.998021978e-4, 2: 9.996043956e-4, 5004: 1.019780220e-5, 5005: 1e-5,
             5006: 9.998021978e-4},
        ),
    ],
)  # fmt: skip
def test_cyclic_rates(lr_max: float, lr_min: float, cycle: int, rates: dict[int, float]) -> None:
    for iteration, rate in rates.items():
        found = cyclic_lr(iteration, lr_max=lr_max, lr_min=lr_min, cycle=cycle)
        assert found == pytest.approx(rate, rel=0, abs=5.1e-12)  # the digits that are given
    assert cyclic_lr(3 * cycle, lr_max=lr_max, lr_min=lr_min, cycle=cycle) == lr_min


def test_cycles_of_one_iteration_use_the_least_rate() -> None:
    assert cyclic_lr(7, lr_max=0.1, lr_min=0.01, cycle=1) == 0.01


def test_fge_rates() -> None:
    for epoch, rate in ((0, 0.05), (0.5, 0.02525), (1, 0.0005), (1.5, 0.02525), (2, 0.05)):
        found = fge_lr(epoch, lr_max=0.05, lr_min=5e-4, cycle=2)
        assert found == pytest.approx(rate, rel=1e-12)
    assert [e for e in range(1, 9) if fge_member(e, cycle=4)] == [2, 6]
    assert [e for e in range(1, 6) if fge_member(e, cycle=2)] == [1, 3, 5]


def test_cosine_rates() -> None:
    assert cosine_lr(0, lr=0.2, total=1800) == 0.2
    assert cosine_lr(900, lr=0.2, total=1800) == pytest.approx(0.1)
    assert cosine_lr(1800, lr=0.2, total=1800) == pytest.approx(0, abs=1e-17)
    for epoch, rate in ((0, 0.0060307), (50, 0.0034074), (99, 0.0015497), (100, 0.0060307)):
        found = cosine_cycle_lr(epoch, lr=0.2, total=1800, cycle=100)
        assert found == pytest.approx(rate, rel=1e-4)


def test_step_rates() -> None:
    rates = [step_lr(e, lr=0.5, total=300) for e in (0, 149, 150, 224, 225, 400)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (cyclic_lr, {"iteration": 0, "lr_max": 1, "lr_min": 1, "cycle": 1}, "iteration"),
        (cyclic_lr, {"iteration": 1, "lr_max": 1, "lr_min": 1, "cycle": 0}, "cycle"),
        (cyclic_lr, {"iteration": 1, "lr_max": 1, "lr_min": 2, "cycle": 1}, "lr_min"),
        (cyclic_lr, {"iteration": 1, "lr_max": 0, "lr_min": 0, "cycle": 1}, "lr_max"),
        (fge_lr, {"epoch": 0, "lr_max": 1, "lr_min": 1, "cycle": 3}, "cycle"),
        (fge_lr, {"epoch": -1, "lr_max": 1, "lr_min": 1, "cycle": 2}, "epoch"),
        (cosine_lr, {"epoch": 11, "lr": 1, "total": 10}, "epoch"),
        (cosine_lr, {"epoch": 1, "lr": 0, "total": 10}, "lr"),
        (cosine_cycle_lr, {"epoch": 0, "lr": 1, "total": 10, "cycle": 6}, "cycle"),
        (cosine_cycle_lr, {"epoch": -1, "lr": 1, "total": 10, "cycle": 2}, "epoch"),
        (step_lr, {"epoch": -1, "lr": 1, "total": 10}, "epoch"),
        (step_lr, {"epoch": 0, "lr": 1, "total": 0}, "total"),
    ],
)
def test_bad_arguments_of_other_schedules(
    function: Callable[..., float], arguments: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .* found"):
        function(**arguments)


def test_swalr_is_torchs() -> None:
    assert swa_fast.SWALR is torch.optim.swa_utils.SWALR


def sgd(*rates: float, tensor: bool = False) -> SGD:
    """One parameter group for each rate."""
    return SGD(
        [
            {"params": [nn.Parameter(torch.ones(1))], "lr": torch.tensor(r) if tensor else r}
            for r in rates
        ]
    )


def rates_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def go(optimizer: Optimizer, *schedules: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
    """One epoch; the rates after it."""
    optimizer.step()
    for schedule in schedules:
        schedule.step()
    return rates_of(optimizer)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [1, 3, 10])
def test_delayed_goes_as_torchs_once_it_goes(strategy: str, epochs: int) -> None:
    ours, theirs = sgd(0.1, 0.3), sgd(0.1, 0.3)
    arguments = {"anneal_epochs": epochs, "anneal_strategy": strategy}
    ours_at, theirs_at = DelayedSWALR(ours, 0.05, **arguments), None
    theirs_at = swa_fast.SWALR(theirs, 0.05, **arguments)
    for _ in range(epochs + 2):
        assert go(ours, ours_at) == pytest.approx(go(theirs, theirs_at), rel=1e-12)
    assert rates_of(ours) == [0.05, 0.05]  # exactly, where torch's comes close


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_delayed_leaves_rates_alone_before_it_starts(epochs: int) -> None:
    optimizer, alone = sgd(0.1, 0.3), sgd(0.1, 0.3)
    step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    other = torch.optim.lr_scheduler.ExponentialLR(alone, 0.9)
    delayed = DelayedSWALR(optimizer, [0.01, 0.02], start=4, anneal_epochs=epochs)
    assert rates_of(optimizer) == [0.1, 0.3]
    for _ in range(3):
        assert go(optimizer, step, delayed) == go(alone, other)
    start = go(alone, other)
    seen = [go(optimizer, step, delayed) for _ in range(epochs + 2)]
    alpha = [min(1, (1 - math.cos(math.pi * min(1, (k + 1) / max(1, epochs)))) / 2)
             for k in range(epochs + 2)]  # fmt: skip
    expected = [[r + a * (s - r) for r, s in zip(start, (0.01, 0.02), strict=True)] for a in alpha]
    for found, right in zip(seen, expected, strict=True):
        assert found == pytest.approx(right, rel=1e-12)
    assert seen[-1] == [0.01, 0.02]


def test_delayed_takes_groups_that_are_added_later() -> None:
    optimizer = sgd(0.1)
    delayed = DelayedSWALR(optimizer, 0.05, start=2, anneal_epochs=4, anneal_strategy="linear")
    go(optimizer, delayed)
    new = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.4}
    optimizer.add_param_group(new)
    assert go(optimizer, delayed) == pytest.approx([0.0875, 0.3125])
    own = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.2, "swa_lr": 0.1}
    optimizer.add_param_group(own)
    assert go(optimizer, delayed) == pytest.approx([0.075, 0.225, 0.15])
    go(optimizer, delayed)
    assert go(optimizer, delayed) == [0.05, 0.05, 0.1]
    assert delayed.get_last_lr() == [0.05, 0.05, 0.1]


def test_delayed_wants_a_rate_for_each_group() -> None:
    optimizer = sgd(0.1)
    delayed = DelayedSWALR(optimizer, [0.05], anneal_epochs=4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.4})
    optimizer.step()
    with pytest.raises(ValueError, match=r"^swa_lr: found 1 rates, none for group 1"):
        delayed.step()
    assert rates_of(optimizer) == [0.1, 0.4]
    optimizer = sgd(0.1)
    optimizer.param_groups[0]["swa_lr"] = 0.5  # left behind by an earlier schedule
    delayed = DelayedSWALR(optimizer, 0.05, anneal_epochs=1)
    assert go(optimizer, delayed) == [0.05]


@pytest.mark.parametrize("way", ["last_epoch", "state, optimizer first", "state, schedule first"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6, 9])
def test_delayed_goes_on(way: str, stop: int) -> None:
    def added(optimizer: Optimizer) -> None:
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(1))], "lr": 0.2, "swa_lr": 0.02}
        )

    options = {"start": 3, "anneal_epochs": 5}
    whole = sgd(0.1)
    schedule = DelayedSWALR(whole, 0.05, **options)
    expected = []
    for epoch in range(10):
        expected.append(go(whole, schedule))
        if epoch == 3:
            added(whole)
        if epoch + 1 == stop:
            states = copy.deepcopy((whole.state_dict(), schedule.state_dict()))
    again = sgd(0.1)
    if stop > 3:
        added(again)
    if way == "last_epoch":
        again.load_state_dict(states[0])
        # Being made is the next call, as for torch's schedules.
        schedule = DelayedSWALR(again, 0.05, **options, last_epoch=stop)
        found = [rates_of(again)]
    else:
        if way == "state, optimizer first":
            again.load_state_dict(states[0])
        schedule = DelayedSWALR(again, 0.05, **options)
        if way == "state, schedule first":
            again.load_state_dict(states[0])
        schedule.load_state_dict(states[1])
        found = [go(again, schedule)]
    while len(found) < 10 - stop:
        if stop + len(found) == 4:
            added(again)
        found.append(go(again, schedule))
    assert found == expected[stop:]


def test_delayed_does_not_guess_where_it_began() -> None:
    optimizer = sgd(0.1)
    with pytest.raises(ValueError, match=r"^last_epoch: 5 is amid the annealing; load the opt"):
        DelayedSWALR(optimizer, 0.05, start=3, anneal_epochs=5, last_epoch=5)
    assert rates_of(optimizer) == [0.1]
    DelayedSWALR(optimizer, 0.05, start=3, anneal_epochs=5, last_epoch=7)  # it has arrived
    assert rates_of(optimizer) == [0.05]


def test_delayed_writes_rates_that_are_tensors_in_place() -> None:
    optimizer = sgd(0.1, tensor=True)
    rate = optimizer.param_groups[0]["lr"]
    delayed = DelayedSWALR(optimizer, 0.05, start=2, anneal_epochs=2, anneal_strategy="linear")
    assert go(optimizer, delayed) == pytest.approx([0.1])
    assert go(optimizer, delayed) == pytest.approx([0.075])
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"start": 0}, "start"),
        ({"start": 1.5}, "start"),
        ({"anneal_epochs": -1}, "anneal_epochs"),
        ({"anneal_strategy": "exp"}, "anneal_strategy"),
        ({"swa_lr": -0.1}, "swa_lr"),
        ({"swa_lr": float("nan")}, "swa_lr"),
        ({"swa_lr": [0.1, 0.2]}, "swa_lr"),
    ],
)
def test_bad_arguments_of_the_delayed_schedule(arguments: dict[str, Any], name: str) -> None:
    optimizer = sgd(0.1)
    with pytest.raises(ValueError, match=f"^{name}: expected .* found"):
        DelayedSWALR(optimizer, **{"swa_lr": 0.05, **arguments})
    assert optimizer.param_groups[0].keys() == sgd(0.1).param_groups[0].keys()
