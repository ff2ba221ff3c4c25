"""torch-ema's average on swa_fast, beside torch-ema's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import nn

torch_ema = pytest.importorskip("torch_ema")

from swa_fast.integrations import torch_ema as ours  # noqa: E402

Stock, Fast = torch_ema.ExponentialMovingAverage, ours.ExponentialMovingAverage


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 2))


def move(model: nn.Module, at: int) -> None:
    g = torch.Generator().manual_seed(at)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("counts", [True, False])
def test_as_close_to_the_formula_as_torch_ema(counts: bool) -> None:
    errors = []
    for kind in (Stock, Fast):
        model = net()
        ema = kind(model.parameters(), 0.95, use_num_updates=counts)
        expected = [p.detach().double().clone() for p in model.parameters()]
        for n in range(1, 31):
            move(model, n)
            ema.update()
            d = min(0.95, (1 + n) / (10 + n)) if counts else 0.95
            for a, p in zip(expected, model.parameters(), strict=True):
                a.copy_(d * a + (1 - d) * p.detach().double())
        errors.append(max(float((a.double() - e).abs().max())
                          for a, e in zip(ema.shadow_params, expected, strict=True)))  # fmt: skip
    rounding = torch.finfo(torch.float32).eps * max(float(e.abs().max()) for e in expected)
    assert ema._shadow is not None and errors[1] <= 2 * errors[0] + rounding


@pytest.mark.parametrize("first, second", [(Stock, Fast), (Fast, Stock), (Fast, Fast)])
def test_a_run_goes_on_from_a_saved_state(first: Any, second: Any, tmp_path: Any) -> None:
    whole = net()
    expected = second(whole.parameters(), 0.9)
    half = net()
    ema = first(half.parameters(), 0.9)
    for at in range(5):
        move(half, at)
        ema.update()
    torch.save((half.state_dict(), ema.state_dict()), tmp_path / "a.pt")
    del half, ema
    rest = net()
    weights, state = torch.load(tmp_path / "a.pt", weights_only=True)
    rest.load_state_dict(weights)
    resumed = second(rest.parameters(), 0.9)
    resumed.load_state_dict(state)
    for at in range(10):
        move(whole, at)
        expected.update()
        if at >= 5:
            move(rest, at)
            resumed.update()
    assert resumed.num_updates == expected.num_updates == 10
    for x, y in zip(resumed.shadow_params, expected.shadow_params, strict=True):
        if first is second:
            assert x.equal(y)
        torch.testing.assert_close(x, y)


def test_the_example_of_the_docstring_runs() -> None:
    model, seen = net(), []
    names = {
        "model": model,
        "loader": range(3),
        "train_on": lambda at: move(model, at),
        "evaluate": lambda m: seen.append(next(m.parameters()).detach().clone()),
    }
    (code,) = code_of(ours)
    exec(code, names)
    ema: Any = names["ema"]
    assert seen[0].equal(ema.shadow_params[0]) and not seen[0].equal(next(model.parameters()))
    with pytest.raises(ValueError, match="Number of parameters"):
        ema.update([nn.Parameter(torch.zeros(2))])
