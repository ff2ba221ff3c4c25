"""torchcontrib's optimiser SWA, beside its formula and, where the package is, beside itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from docstrings import code_of
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast.integrations import torchcontrib
from swa_fast.integrations.torchcontrib import SWA


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 20), nn.BatchNorm1d(20), nn.Linear(20, 2)).to(dtype)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others, "lr": 0.03}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    g = torch.Generator().manual_seed(at)
    x = torch.randn(8, 3, generator=g).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_steps_follow_the_formula(dtype: torch.dtype) -> None:
    """swa_lr is in force from the step after swa_start on; averages are of steps 9, 12 and 15."""
    model, plain = net(dtype), net(dtype)
    optimizer, other = SWA(sgd(model), swa_start=6, swa_freq=3, swa_lr=0.01), sgd(plain)
    expected: list[Tensor] = []
    n = 0
    for t in range(1, 16):
        if t > 6:
            for group in other.param_groups:
                group["lr"] = 0.01
        train(model, optimizer, t)
        train(plain, other, t)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)
        if t > 6 and t % 3 == 0:
            current = [p.detach().double() for p in plain.parameters()]
            zeros = expected or [torch.zeros_like(c) for c in current]
            expected = [a + (c - a) / (n + 1) for a, c in zip(zeros, current, strict=True)]
            n += 1
    assert [group["n_avg"] for group in optimizer.param_groups] == [n, n] and n == 3
    live = [p.detach().clone() for p in model.parameters()]
    for p, a in zip(model.parameters(), expected, strict=True):
        average = optimizer.state[p]["swa_buffer"]
        torch.testing.assert_close(average, a.to(average.dtype))
    optimizer.swap_swa_sgd()
    for p, a in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), a.to(dtype))
    optimizer.swap_swa_sgd()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), live, strict=True))


@pytest.mark.parametrize("form", ["ours", "torchcontrib's"])
def test_resumed_exactly(form: str) -> None:
    def run(cut: int | None) -> dict[str, Any]:
        model = net()
        optimizer = SWA(sgd(model), 2, 2, 0.02)
        for t in range(1, 11):
            if t == cut:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                if form != "ours":  # whose averages are known by the parameters' addresses
                    averages = state[1]["swa_state"]
                    state[1]["swa_state"] = {id(a): a for a in averages.values()}
                model = net()
                model.load_state_dict(state[0])
                optimizer = SWA(sgd(model), 2, 2, 0.02)
                optimizer.load_state_dict(state[1])
            train(model, optimizer, t)
        return copy.deepcopy(optimizer.state_dict())

    whole = run(None)
    for cut in (2, 5, 8):
        state = run(cut)
        assert state["param_groups"] == whole["param_groups"]
        for key, value in whole["swa_state"].items():
            assert torch.equal(state["swa_state"][key]["swa_buffer"], value["swa_buffer"])


def test_by_hand_with_groups_that_come_later_schedules_and_scalers() -> None:
    model, late = net(), nn.Parameter(torch.zeros(2))
    optimizer = SWA(sgd(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.015]
    optimizer.update_swa()
    optimizer.add_param_group({"params": [late]})
    with pytest.warns(UserWarning, match="parameter group 2 has no average"):
        optimizer.swap_swa_sgd()
    optimizer.update_swa()
    assert [group["n_avg"] for group in optimizer.param_groups] == [2, 2, 1]
    assert optimizer.state[late]["swa_buffer"].tolist() == [0.0, 0.0]
    steps: list[object] = []
    optimizer.register_step_post_hook(lambda *arguments: steps.append(arguments))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf")):
        scaler.scale(model(torch.ones(2, 3)).sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(steps) == 1 and optimizer.param_groups[0]["step_counter"] == 2
    clone = copy.deepcopy(optimizer)
    clone.update_swa()
    assert [group["n_avg"] for group in optimizer.param_groups] == [2, 2, 1]


def test_bn_update_weighs_samples() -> None:
    model = net()
    batches = [torch.randn(12, 3), torch.randn(4, 3) + 1]
    SWA.bn_update(batches, model)
    means = [model[0](batch).mean(0) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, 0.75 * means[0] + 0.25 * means[1])


def test_what_is_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match="optimizer: expected an Optimizer, found Sequential"):
        SWA(model)  # type: ignore[arg-type]
    for arguments, message in (
        ((-1, 2), "swa_start: expected at least 0, found -1"),
        ((1, 0), "swa_freq: expected at least 1, found 0"),
        ((1, 1, -0.1), "swa_lr: expected at least 0, found -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            SWA(sgd(model), *arguments)
    with pytest.warns(UserWarning, match="swa_start, swa_freq: found only one"):
        optimizer = SWA(sgd(model), 3, swa_lr=0.1)
    assert optimizer.swa_start is None and optimizer.swa_lr is None
    optimizer.update_swa()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    state["swa_state"][1]["swa_buffer"] = torch.zeros(7)
    short = {**before, "swa_state": {0: before["swa_state"][0]}}
    for wrong in (None, {}, state, short):
        with pytest.raises(ValueError, match=r"state_dict: expected|weights do not fit"):
            optimizer.load_state_dict(wrong)  # type: ignore[arg-type]
        for key, value in optimizer.state_dict()["swa_state"].items():
            assert torch.equal(value["swa_buffer"], before["swa_state"][key]["swa_buffer"])


def test_a_swap_with_an_exception_before_every_line() -> None:
    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        model = net()
        optimizer = SWA(sgd(model))
        optimizer.update_swa()
        train(model, optimizer, 1)
        live = [p.detach().clone() for p in model.parameters()]
        averages = [optimizer.state[p]["swa_buffer"].clone() for p in model.parameters()]

        def check() -> None:
            for p, value, average in zip(model.parameters(), live, averages, strict=True):
                assert torch.equal(p, value)
                assert torch.equal(optimizer.state[p]["swa_buffer"], average)

        return optimizer.swap_swa_sgd, check

    assert at_every_line(make, "torchcontrib.py") > 20


def test_the_example() -> None:
    model = net()
    names: dict[str, Any] = {
        "torch": torch, "model": model, "loader": [torch.randn(8, 3) for _ in range(16)],
        "loss": lambda model, batch: model(batch).square().mean(),
    }  # fmt: skip
    for code in code_of(torchcontrib):
        exec(code, names)
    assert names["optimizer"].param_groups[0]["n_avg"] == 1


def test_the_packages_own() -> None:
    """The same rates, averages and counters; its ``zero_grad`` fails under today's torch."""
    theirs = pytest.importorskip("torchcontrib.optim")
    found = []
    for kind in (theirs.SWA, SWA):
        model = net()
        optimizer = kind(sgd(model), 3, 2, swa_lr=0.02)
        for at in range(12):
            model.zero_grad()
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(at))
            model(x).square().mean().backward()
            optimizer.step()
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        state = optimizer.state_dict()
        optimizer.swap_swa_sgd()
        found.append((model.state_dict(), groups, sorted(state)))
    (weights, *others), (own, *ours) = found
    assert others == ours
    for name, value in weights.items():
        torch.testing.assert_close(own[name], value)
