"""A model on an average, called without touching the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import snapshot, step
from torch import nn

from swa_fast import EMA, SWA, Averager


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(model[2].weight.detach())
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"buffers": "skip"}, {"filter": "0"}, {"filter": "0", "excluded": "copy"},
     {"device": "cpu", "buffers": "average"}],
    ids=str,
)  # fmt: skip
def test_as_the_model_with_the_average_in_its_place(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = network(dtype)
    averager = Averager(model, {"e": EMA(0.5), "s": SWA()}, **options)
    view = averager.module("e")
    x = torch.randn(5, 3, dtype=dtype)
    for n in range(3):
        step(model)
        averager.update()
        before, average = snapshot(model), copy.deepcopy(averager.averages["e"])
        with averager.applied("e"):
            expected = model(x)
            assert torch.equal(averager.module("e")(input=x), expected)
        for mode in (True, False):
            model.train(mode)
            result = view(x)
        assert torch.equal(result, expected)
        assert torch.equal(result, model(x)) == (n == 0)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for name, tensor in averager.averages["e"].items():
            assert torch.equal(tensor, average[name]), name


def test_gradients_reach_the_inputs_alone() -> None:
    model = network()
    averager = Averager(model, {"e": EMA(0.5)}, filter="0", count_initial=True)
    x = torch.randn(5, 3, requires_grad=True)
    averager.module("e")(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_sparse_and_wrapped() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_buffer("odd", torch.eye(3).to_sparse())
    averager = Averager(nn.DataParallel(model), {"e": EMA(0.5)}, dtype=torch.float64)
    averager.update()
    averager.update(source=copy.deepcopy(model).requires_grad_(False))
    x = torch.randn(2, 3)
    with averager.applied("e"):
        expected = model(x)
    assert torch.equal(averager.module("e")(x), expected)


def test_no_new_table_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    averager = Averager(model, {"e": EMA(0.5)})
    averager.update()
    averager.module("e")(torch.randn(2, 3))
    monkeypatch.setattr("swa_fast.engine.Engine.plan", None)
    averager.update()


def test_what_is_refused() -> None:
    model = network()
    averager = Averager(model, {"e": EMA(0.5), "s": SWA()})
    with pytest.raises(KeyError, match="expected one of e, s, found 'x'"):
        averager.module("x")
    view = averager.module("s")
    assert repr(view) == "Sequential on the average 's'"
    with pytest.raises(RuntimeError, match="'s' has not been updated yet"):
        view(torch.randn(2, 3))
    averager.update()
    averager.remove("s")
    with pytest.raises(KeyError, match="expected one of e, found 's'"):
        view(torch.randn(2, 3))
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"0\.weight: in the average, not in the model"):
        averager.module("e")(torch.randn(2, 3))
    with pytest.raises(TypeError, match="expected an averager of a module"):
        Averager([torch.zeros(2)], {"e": SWA()}).module("e")
