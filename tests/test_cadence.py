"""Which calls of an averager's update do something, and averages that begin with the initial
weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast import EMA, SWA, Averager, Window


def last(every: int = 1, start: int = 0, **options: Any) -> tuple[Tensor, Averager]:
    weight = torch.zeros(3)
    rules = {"last": EMA(0.0), "mean": SWA()}
    return weight, Averager([("w", weight)], rules, update_every=every, start=start, **options)


@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (1, 2), (3, 2)])
@pytest.mark.parametrize("how", ["call", "step", "fused step", "compiled"])
def test_which_calls_update(every: int, start: int, how: str) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    averager = Averager([("w", parameter)], {"last": EMA(0.0)}, update_every=every, start=start)
    if how in ("call", "compiled"):
        update = averager.update
        if how == "compiled":
            update = torch.compile(update, backend="eager", fullgraph=True)
    else:
        optimizer = torch.optim.SGD([parameter], lr=0.0, fused=how == "fused step")
        averager.attach(optimizer)

        def update() -> None:
            parameter.grad = torch.zeros(3)
            if how == "fused step":
                optimizer.found_inf = torch.zeros(1)
            optimizer.step()

    expected, seen = 0, 0.0
    for call in range(1, 10):
        with torch.no_grad():
            parameter.fill_(call)
        update()
        if call > start and (call - start) % every == 0:
            expected, seen = expected + 1, float(call)
        assert averager.n_averaged == {"last": expected}
        assert averager.averages["last"]["w"].unique().tolist() == [seen]


@pytest.mark.parametrize("how", ["state", "deepcopy", "save"])
def test_the_count_is_resumed(how: str) -> None:
    weight, whole = last(3, 2)
    averager = last(3, 2)[1]
    averager._selection._listed = [("w", weight, True)]
    for call in range(1, 12):
        weight.fill_(call)
        whole.update()
        averager.update()
        if how == "state":
            file = io.BytesIO()
            torch.save(averager.state_dict(), file)
            file.seek(0)
            averager = Averager(
                [("w", weight)], {"last": EMA(0.0), "mean": SWA()}, update_every=3, start=2
            )
            averager.load_state_dict(torch.load(file, weights_only=True))
        else:
            if how == "deepcopy":
                averager = copy.deepcopy(averager)
            else:
                file = io.BytesIO()
                torch.save(averager, file)
                file.seek(0)
                averager = torch.load(file, weights_only=False)
            weight = averager._selection._listed[0][1]
            whole._selection._listed = averager._selection._listed
            whole._storage.unbind()
    assert whole.n_averaged == averager.n_averaged == {"last": 3, "mean": 3}
    for name in ("last", "mean"):
        assert torch.equal(whole.averages[name]["w"], averager.averages[name]["w"])
    assert averager.state_dict()["cadence"] == {"every": 3, "start": 2, "calls": 11}


def test_states_with_and_without_a_count() -> None:
    counted, plain = last(3)[1], last()[1]
    assert "cadence" not in plain.state_dict()
    counted.update()
    for averager, other, found in ((counted, plain, "found None"), (plain, counted, "expected N")):
        with pytest.raises(ValueError, match=f"cadence: .*{found}"):
            averager.load_state_dict(other.state_dict())
        averager.load_state_dict(other.state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"cadence: expected .*'every': 3.* found .*'every': 2"):
        counted.load_state_dict(last(2)[1].state_dict())
    assert counted.state_dict()["cadence"]["calls"] == 1
    counted.load_state_dict({**last(2)[1].state_dict(), "cadence": {"calls": 5}}, strict=False)
    assert counted.state_dict()["cadence"]["calls"] == 5
    for wrong in (3, [], {"every": 3, "start": 0}, {"every": 3, "start": 0, "calls": -1}):
        for strict in (True, False):
            with pytest.raises(ValueError, match="cadence: expected a mapping"):
                counted.load_state_dict({**counted.state_dict(), "cadence": wrong}, strict=strict)


def test_what_is_refused() -> None:
    for arguments, message in (
        ({"update_every": 0}, "update_every: expected an integer of at least 1, found 0"),
        ({"update_every": True}, "update_every: expected an integer of at least 1, found True"),
        ({"start": -1}, "start: expected an integer of at least 0, found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Averager([torch.zeros(2)], {"a": SWA()}, **arguments)
    parameter = nn.Parameter(torch.zeros(3))
    averager = Averager([parameter], {"a": SWA()}, update_every=2)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with pytest.raises(ValueError, match="beside the averager's own update_every=2 and start=0"):
        averager.attach(optimizer, every=2)
    averager.update()
    averager.update()
    with averager.applied("a"), pytest.raises(RuntimeError, match="applied"):
        averager.update()
    assert averager.state_dict()["cadence"]["calls"] == 2


@pytest.mark.parametrize("how", ["update", "load_state_dict"])
def test_an_exception_before_every_line(how: str) -> None:
    """A call is counted if and only if its update took place, and a state is loaded as a whole."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        weight, averager = last(2)
        state = copy.deepcopy(averager.state_dict())
        for call in range(1, 4):
            weight.fill_(call)
            averager.update()
        weight.fill_(4)

        def check() -> None:
            calls = averager.state_dict()["cadence"]["calls"]
            assert averager.n_averaged["mean"] == calls // 2
            assert averager.averages["last"]["w"].tolist() == [2.0 * (calls // 2)] * 3
            assert calls in ((3, 4) if how == "update" else (3, 0))

        if how == "update":
            return averager.update, check
        return lambda: averager.load_state_dict(state), check

    assert at_every_line(make) > 20


@pytest.mark.parametrize("rule", [EMA(0.75), SWA(), EMA(0.9, warmup="timm"), EMA(lambda n: 0.5)])
def test_averages_begin_with_the_initial_weights(rule: Any) -> None:
    """As if the first update had been at construction."""
    model = nn.Linear(2, 3)
    initial = Averager(model, {"a": rule, "w": Window(2)}, count_initial=True)
    updated = Averager(model, {"a": rule, "w": Window(2)})
    updated.update()
    assert initial.n_averaged == {"a": 1, "w": 1}
    with initial.applied("a"):
        pass
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        initial.update()
        updated.update()
        for name in ("a", "w"):
            for key, tensor in updated.averages[name].items():
                assert torch.equal(initial.averages[name][key], tensor)


def test_the_first_update_of_an_average_from_the_initial_weights_is_by_its_rule() -> None:
    weight = torch.full((3,), 8.0)
    averager = Averager([weight], {"e": EMA(0.75)}, count_initial=True)
    weight.fill_(4.0)
    averager.update()
    assert averager.averages["e"]["0"].tolist() == [7.0] * 3


@pytest.mark.gpu
def test_what_could_not_be_counted_is_not_captured() -> None:
    weight = torch.zeros(40, device="cuda")
    averager = Averager([weight], {"f": lambda averages, sources, n: None}, update_every=2)
    averager.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.add_(1)  # because an empty graph is warned of
        with pytest.raises(RuntimeError, match="replays of a CUDA graph"):
            averager.update()
    averager.update()
    assert averager.n_averaged == {"f": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_calls_are_counted_on_the_device(backend: str) -> None:
    weight = torch.zeros(40, device="cuda")
    averager = Averager([weight], {"last": EMA(0.0)}, backend=backend, update_every=3)
    averager.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.add_(1)
        averager.update()
    for _ in range(6):
        graph.replay()
    assert averager.state_dict()["cadence"]["calls"] == 7
    assert averager.n_averaged == {"last": 2}
    assert float(averager.averages["last"]["0"][0]) == 5
    averager.update()
    averager.update()
    assert averager.n_averaged == {"last": 3}
