"""An averager that is moved, converted, and has averages added and removed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Net, snapshot, step
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast import EMA, SWA, Averager, BackendError, ByName, Power, Window


def values(averager: Averager) -> dict[str, Any]:
    """Everything that is saved, as copies."""
    return copy.deepcopy(averager.state_dict())


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {k: v for k, v in found.items() if k != "averages"} == {
        k: v for k, v in expected.items() if k != "averages"
    }
    assert list(found["averages"]) == list(expected["averages"])
    for row, averages in expected["averages"].items():
        for name, tensor in averages.items():
            assert tensor.dtype == found["averages"][row][name].dtype
            assert torch.equal(found["averages"][row][name], tensor), (row, name)


def test_averages_come_and_go() -> None:
    """As if each had been kept by an averager of its own, from where it was added."""
    torch.manual_seed(0)
    model = Net()
    rules: dict[str, Any] = {"s": SWA(), "w": Window(2)}
    later: dict[str, Any] = {
        "e": EMA(0.5), "w2": Window(3), "m": ByName({"bias": EMA(0.0)}, default=SWA()),
        "f": EMA(lambda n: 0.5),
    }  # fmt: skip
    averager = Averager(model, rules)
    alone = {name: Averager(model, {name: rule}) for name, rule in rules.items()}
    for name, rule in [*later.items(), ("", None)]:
        step(model)
        averager.update()
        for each in alone.values():
            each.update()
        if rule is not None:
            averager.add(name, rule)
            alone[name] = Averager(model, {name: rule})
            assert averager.n_averaged[name] == 0
            for key, tensor in averager.averages[name].items():
                assert torch.equal(tensor, model.state_dict()[key])
    for gone in ("w", "e", "m"):
        averager.remove(gone)
        del alone[gone]
        step(model)
        averager.update()
        for name, each in alone.items():
            each.update()
            assert averager.n_averaged[name] == each.n_averaged[name]
            for key, tensor in each.averages[name].items():
                assert torch.equal(averager.averages[name][key], tensor), (name, key)
    assert list(averager.averages) == ["s", "w2", "f"]
    live = snapshot(model)
    with averager.applied("w2"):
        pass
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[key])
    fresh = Averager(model, {"s": SWA(), "w2": Window(3), "f": later["f"]})
    fresh.load_state_dict(averager.state_dict(), strict=False)


def test_what_is_kept_through_a_change() -> None:
    """Attached optimisers, counts of calls and of skipped updates, stochastic rounding."""
    parameter = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}
    options |= {"on_nonfinite": "skip", "update_every": 2, "count_initial": True}
    changed, plain = (Averager([parameter], {"e": EMA(0.9)}, **options) for _ in range(2))
    attachments = [changed.attach(optimizer), plain.attach(optimizer)]

    def steps(count: int, value: float = 1.0) -> None:
        for _ in range(count):
            parameter.grad = torch.full((5,), value)
            optimizer.found_inf = torch.zeros(1)
            optimizer.step()

    steps(3)
    with torch.no_grad():
        kept = parameter.clone()
        steps(1, math.nan)
        parameter.copy_(kept)
    changed.add("p", EMA(0.5))
    changed.to("cpu")
    steps(3)
    changed.remove("p")
    steps(2)
    assert [attachment.steps for attachment in attachments] == [9, 9]
    assert changed.skipped_updates == 1
    assert_same(values(changed), values(plain))
    clone = copy.deepcopy(changed)
    assert_same(values(clone), values(plain))


def test_compiled_updates_follow() -> None:
    model = nn.Linear(3, 3)
    averager = Averager(model, {"s": SWA()})
    compiled = torch.compile(averager.update, backend="aot_eager", fullgraph=True)
    compiled()
    averager.add("last", EMA(0.0))
    averager.to(dtype=torch.float64)
    for _ in range(2):
        step(model)
        compiled()
    assert averager.n_averaged == {"s": 3, "last": 2}
    assert torch.equal(averager.averages["last"]["weight"], model.weight.detach().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_converted(dtype: torch.dtype) -> None:
    model = Net()
    model.register_buffer("wide", torch.randn(3, dtype=torch.float64))
    rules: dict[str, Any] = {"e": EMA(0.5), "w": Window(2)}
    averager = Averager(model, rules)
    for _ in range(3):
        step(model)
        averager.update()
    before = values(averager)
    assert averager.to(dtype=dtype) is averager
    for row, averages in values(averager)["averages"].items():
        for name, tensor in averages.items():
            kept = before["averages"][row][name]
            converts = kept.dtype == torch.float32
            assert tensor.dtype == (dtype if converts else kept.dtype)
            assert torch.equal(tensor, kept.to(tensor.dtype))
    fresh = Averager(model, rules, dtype=dtype)
    fresh.load_state_dict(averager.state_dict())
    step(model)
    averager.update()
    fresh.update()
    assert_same(values(averager), values(fresh))


def refused() -> dict[str, tuple[Callable[[Averager], object], type[Exception], str]]:
    return {
        "name": (lambda a: a.add("s", SWA()), ValueError, "expected another than s, b, found 's'"),
        "rule": (lambda a: a.add("x", 0.9), TypeError, "expected SWA, EMA"),
        "many": (lambda a: a.add("x", Window(15)), ValueError, "expected 1 to 16 rules, found 18"),
        "rows": (lambda a: a.add("x", Window(5)) or a.add("x[0]", SWA()), ValueError, "a window"),
        "still": (lambda a: a.add("x", EMA(1 - 1e-9)), ValueError, "stand still"),
        "pattern": (lambda a: a.add("x", ByName({"y": SWA()}, SWA())), ValueError, "follows 'y'"),
        "unknown": (lambda a: a.remove("x"), KeyError, "expected one of s, b, found 'x'"),
        "only": (lambda a: a.remove("s") or a.remove("b"), ValueError, "found the only 'b'"),
        "dtype": (lambda a: a.to(dtype=torch.int32), TypeError, "dtype: expected None or one of"),
        "swa": (lambda a: a.to(dtype=torch.bfloat16), ValueError, r"averages\['s'\]: the weight"),
        "meta": (lambda a: a.to("meta"), ValueError, "expected one with memory, found meta"),
        "where": (lambda a: a.to("nowhere"), RuntimeError, "nowhere"),
    }


@pytest.mark.parametrize("name", list(refused()))
def test_what_is_refused(name: str) -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, {"s": SWA(), "b": Power(1.0)})
    averager.update()
    call, error, message = refused()[name]
    with pytest.raises(error, match=message):
        call(averager)
    averager.update()
    assert set(averager.n_averaged.values()) <= {0, 2, 1}
    with averager.applied("b"):
        for inside in (lambda: averager.to("cpu"), lambda: averager.add("y", SWA()),
                       lambda: averager.remove("b")):  # fmt: skip
            with pytest.raises(RuntimeError, match="the average 'b' is applied"):
                inside()


def test_a_model_that_does_not_fit_and_a_rounding_that_does_not_go() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, {"e": EMA(0.5)}, dtype=torch.bfloat16, rounding="stochastic")
    with pytest.raises(ValueError, match=r"rounding='stochastic': expected dtype torch.bfloat16"):
        averager.to(dtype=torch.float32)
    model.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="bias: shape"):
        averager.add("s", EMA(0.9))
    model.bias = None
    with pytest.raises(ValueError, match="bias: in the average, not in the model"):
        averager.to(dtype=torch.bfloat16)
    if not torch.cuda.is_available():
        other = Averager(nn.Linear(2, 2), {"e": EMA(0.5)}, backend="cpu")
        with pytest.raises((BackendError, AssertionError, RuntimeError)):
            other.to("cuda")
        other.update()


@pytest.mark.parametrize("how", ["add", "remove", "to"])
def test_an_exception_before_every_line(how: str) -> None:
    """All of the change or nothing, and the averager goes on in either case."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        model = nn.Linear(2, 2)
        rules: dict[str, Any] = {"e": EMA(0.5), "s": SWA()}
        averager, reference = Averager(model, rules), Averager(model, rules)
        for _ in range(2):
            averager.update()
            reference.update()
            step(model)
        call: Callable[[], object]
        if how == "add":
            call = lambda: averager.add("n", EMA(0.9))  # noqa: E731
        elif how == "remove":
            call = lambda: averager.remove("s")  # noqa: E731
        else:
            call = lambda: averager.to("cpu", dtype=torch.float64)  # noqa: E731

        def check() -> None:
            for _ in range(2):
                names = list(averager.averages)
                assert names in (["e", "s"], ["e"] if how == "remove" else ["e", "s", "n"])
                tensors: dict[str, Tensor] = reference.averages["e"]
                for name, tensor in tensors.items():
                    found = averager.averages["e"][name]
                    torch.testing.assert_close(found, tensor.to(found.dtype))
                assert averager.n_averaged["e"] == reference.n_averaged["e"]
                averager.update()
                reference.update()

        return call, check

    # What other files do, they do to the averager that is made, not to this one.
    assert at_every_line(make, "_changes.py") > 25


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton"])
def test_moved_between_devices(backend: str | None) -> None:
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    rules: dict[str, Any] = {"s": SWA(), "w": Window(2)}
    averager, expected = Averager(model, rules), Averager(reference, rules)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    averager.attach(optimizer, every=2)
    for where in ("cpu", "cuda", "cuda", "cpu"):
        model.to(where)
        averager.to(where)
        step(model)
        reference.load_state_dict(model.state_dict())
        optimizer.step()
        optimizer.step()
        expected.update()
        assert averager.n_averaged == expected.n_averaged
        for row, averages in expected.averages.items():
            for name, tensor in averages.items():
                found = averager.averages[row][name]
                assert found.device.type == where
                torch.testing.assert_close(found.cpu(), tensor)
