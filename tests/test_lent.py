"""An averager that takes the weights of another model than its own."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, Net, need, snapshot, step
from test_hooks import at_every_line
from torch import nn

from swa_fast import EMA, SWA, Averager, ByName, Window

RULES: dict[str, Any] = {"s": SWA(), "e": EMA(0.5), "w": Window(2)}


@pytest.mark.parametrize(
    ("backend", "device"), [b for b in BACKENDS if b.id != "triton-interpreted"]
)
def test_another_model(backend: str, device: str) -> None:
    """Between updates from its own: as if its own had had those weights."""
    need(backend, device)
    own, expected = Net().to(device), Net().to(device)
    other = copy.deepcopy(own)
    averager = Averager(own, RULES, backend=backend)
    reference = Averager(expected, RULES, backend=backend)
    for n, source in enumerate((own, other, other, own, other)):
        step(source)
        if n == 2:
            averager.set_decay(0.25)
            reference.set_decay(0.25)
            _ = averager.averages  # which are watched from now on
        if n == 3:
            source.scalar.data = source.scalar.data.clone()
        expected.load_state_dict(source.state_dict())
        averager.update(source=None if source is own else source, decay=0.75 if n == 4 else None)
        reference.update(decay=0.75 if n == 4 else None)
        for row, averages in reference.averages.items():
            for name, tensor in averages.items():
                assert torch.equal(averager.averages[row][name], tensor), (n, row, name)
    live = snapshot(own)
    with averager.applied("e"):
        pass
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, live[name])


def test_no_new_table_for_a_module_that_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = nn.Linear(2, 2), nn.Linear(2, 2)
    averager = Averager(own, {"m": ByName({"bias": EMA(0.5)}, default=SWA())})
    averager.update(source=other)
    averager.update()
    plans = []
    plan = type(averager._storage.parts[0].engine).plan
    monkeypatch.setattr("swa_fast.engine.Engine.plan", lambda *a: plans.append(a) or plan(*a))
    averager.update(source=other)
    averager.update()
    assert not plans
    other.weight.data = other.weight.data.clone()
    averager.update(source=other)
    assert plans
    assert averager.n_averaged == {"m": 5}
    gone = weakref.ref(other)
    plans.clear()
    del other
    gc.collect()
    assert gone() is None


def test_lists_wrappers_copies_and_counts() -> None:
    own = nn.Linear(2, 2)
    averager = Averager(own, {"last": EMA(0.0)}, update_every=2)
    other = nn.DataParallel(nn.Linear(2, 2))
    averager.update(source=other)
    assert averager.n_averaged == {"last": 0}
    averager.update(source=other)
    for name, tensor in other.module.named_parameters():
        assert torch.equal(averager.averages["last"][name], tensor)
    averager = copy.deepcopy(averager)
    for value in (1.0, 2.0):
        pairs = [("weight", torch.full((2, 2), value)), ("bias", torch.zeros(2))]
        averager.update(source=pairs)
    assert averager.averages["last"]["weight"].unique().tolist() == [2.0]
    assert averager.state_dict()["cadence"]["calls"] == 4
    sparse = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for module, value in zip(sparse, (1.0, 2.0), strict=True):
        module.register_buffer("odd", (torch.eye(3) * value).to_sparse())
    averager = Averager(sparse[0], {"last": EMA(0.0)})
    averager.update(source=sparse[1])
    assert averager.averages["last"]["odd"].to_dense().sum() == 6.0
    averager.update()
    assert averager.averages["last"]["odd"].to_dense().sum() == 3.0
    tensors = [torch.zeros(3)]
    listed = Averager(tensors, {"last": EMA(0.0)})
    listed.update(source=[torch.ones(3)])
    assert listed.averages["last"]["0"].tolist() == [1.0] * 3


def test_what_is_refused() -> None:
    own = nn.Linear(2, 2)
    averager = Averager(own, {"last": EMA(0.0)}, on_nonfinite="raise")
    averager.update()
    before = snapshot(own)
    for source, message in (
        (nn.Linear(3, 2), r"weight: shape \(2, 2\) in the average, \(2, 3\) in the model"),
        (nn.Linear(2, 2, bias=False), "bias: in the average, not in the model"),
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            "weight: torch.float32 in the average, torch.complex64",
        ),
        ([], "weight: in the average, not in the model"),
    ):
        with pytest.raises(ValueError, match=message):
            averager.update(source=source)
    bad = nn.Linear(2, 2)
    bad.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite now: bias"):
        averager.update(source=bad)
    compiled = torch.compile(lambda: averager.update(source=bad), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="no decay or source can be given"):
        compiled()
    with averager.applied("last"), pytest.raises(RuntimeError, match="applied"):
        averager.update(source=bad)
    assert averager.n_averaged == {"last": 1}
    for name, tensor in before.items():
        assert torch.equal(averager.averages["last"][name], tensor)


def test_an_exception_before_every_line() -> None:
    """The update is whole or nothing, and the next one is of the averager's own model again."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        own, other = nn.Linear(2, 2), nn.Linear(2, 2)
        averager = Averager(own, {"last": EMA(0.0), "e": EMA(0.5)})
        averager.update()
        before = averager.averages["e"]["weight"].clone()

        def check() -> None:
            moved = averager.n_averaged["e"] == 2
            expected = (before + other.weight.detach()) / 2 if moved else before
            torch.testing.assert_close(averager.averages["e"]["weight"], expected)
            last = (other if moved else own).bias.detach()
            assert torch.equal(averager.averages["last"]["bias"], last)
            averager.update()
            assert torch.equal(averager.averages["last"]["bias"], own.bias.detach())

        return lambda: averager.update(source=other, decay={"e": 0.5}), check

    assert at_every_line(make) > 100
