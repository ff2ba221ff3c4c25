"""Rules chosen by the names of tensors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from helpers import BACKENDS, Net, need, snapshot, step
from test_hooks import at_every_line
from torch import nn

from swa_fast import EMA, SWA, AveragedModel, Averager, ByName, Power, Window


def expected_rule(name: str) -> str:
    if name.startswith("bn") or "bias" in name:
        return "half"
    return "last" if "empty" in name else "long"


# What follows which rule is decided on the host: without Triton's interpreter, which takes seconds.
@pytest.mark.parametrize(
    ("backend", "device"), [b for b in BACKENDS if b.id != "triton-interpreted"]
)
def test_every_tensor_follows_its_rule(backend: str, device: str) -> None:
    """As the average of that rule alone does, bit by bit."""
    need(backend, device)
    model = Net().to(device)
    rule = ByName({r"^bn|bias": EMA(0.5), "empty": EMA(0.0)}, default=EMA(0.9))
    averager = Averager(
        model, {"mixed": rule, "plain": SWA(), "lawa": Window(2)}, backend=backend,
        buffers="average",
    )  # fmt: skip
    alone = {"half": EMA(0.5), "last": EMA(0.0), "long": EMA(0.9), "plain": SWA()}
    others = Averager(model, {**alone, "lawa": Window(2)}, backend=backend, buffers="average")
    for _ in range(4):
        step(model)
        averager.update()
        others.update()
    assert averager.n_averaged == {"mixed": 4, "plain": 4, "lawa": 4}
    for name, tensor in averager.averages["mixed"].items():
        assert torch.equal(tensor, others.averages[expected_rule(name)][name]), name
    for row in ("plain", "lawa"):
        for name, tensor in averager.averages[row].items():
            assert torch.equal(tensor, others.averages[row][name]), name


def test_attached_applied_saved_and_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    rule = ByName({"bias": EMA(0.5)}, default=SWA())
    averager = Averager(model, {"mixed": rule, "e": EMA(0.9)})
    attachment = averager.attach(optimizer, every=2)
    for n in range(6):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.found_inf = torch.full((1,), float(n == 3))
        optimizer.step()
    assert attachment.steps == 5 and averager.n_averaged == {"mixed": 2, "e": 2}
    live, average = snapshot(model), averager.averages["mixed"]
    with averager.applied("mixed"):
        inside = snapshot(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]) and torch.equal(inside[name], average[name])
    file = io.BytesIO()
    torch.save(averager.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = Averager(model, {"mixed": rule, "e": EMA(0.9)})
    fresh.load_state_dict(state)
    clone = copy.deepcopy(averager)
    clone._selection.module = model
    clone._storage.unbind()
    step(model)
    for each in (averager, fresh, clone):
        each.set_decay(0.25, "e")
        each.update(decay=0.5)
    for each in (fresh, clone):
        assert each.n_averaged == {"mixed": 3, "e": 3} and repr(each) == repr(averager)
        for row in ("mixed", "e"):
            for name, tensor in averager.averages[row].items():
                assert torch.equal(tensor, each.averages[row][name])
    for other in (
        ByName({"bias": EMA(0.25)}, default=SWA()),
        ByName({"bias": EMA(0.5)}, default=Power(1.0)),
        ByName({"bias$": EMA(0.5)}, default=SWA()),
    ):
        with pytest.raises(ValueError, match="rules: expected"):
            Averager(model, {"mixed": other, "e": EMA(0.9)}).load_state_dict(state)


def test_compiled() -> None:
    model = nn.Linear(3, 4)
    averagers = [
        Averager(model, {"m": ByName({"bias": EMA(0.5)}, default=SWA())}) for _ in range(2)
    ]
    compiled = torch.compile(averagers[0].update, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        step(model)
        compiled()
        averagers[1].update()
    for name, tensor in averagers[1].averages["m"].items():
        assert torch.equal(tensor, averagers[0].averages["m"][name])


def test_the_first_pattern_that_is_found_counts() -> None:
    rule = ByName({"weight": EMA(0.0), "1": SWA(), r"\.bias$": EMA(0.5)}, default=Power(1.0))
    names = ["0.weight", "1.weight", "1.bias", "0.bias", "scale"]
    assert [rule.choice(name) for name in names] == [0, 0, 1, 2, 3]
    assert repr(ByName({"b": SWA()}, SWA(start=2))) == "ByName({'b': SWA()}, default=SWA(start=2))"


def test_what_is_refused() -> None:
    for make, error, message in (
        (lambda: ByName({}, SWA()), ValueError, "expected at least one regular expression"),
        (lambda: ByName({"(": SWA()}, SWA()), ValueError, "expected regular expressions, found '"),
        (lambda: ByName({"a": Window(2)}, SWA()), TypeError, r"rules\['a'\]: expected SWA, EMA or"),
        (lambda: ByName({"a": SWA()}, 0.9), TypeError, "default: expected SWA, EMA or Power"),
        (lambda: ByName({"a": SWA()}, EMA(lambda n: 0.5)), TypeError, "default: expected a decay"),
    ):
        with pytest.raises(error, match=message):
            make()  # type: ignore[no-untyped-call]
    model, rule = nn.Linear(2, 2), ByName({"bias": EMA(0.9)}, default=SWA())
    for rules, options, message in (
        ({"m": ByName({"Bias": SWA()}, SWA())}, {}, r"averages\['m'\]: .* follows 'Bias', found n"),
        ({"m": rule}, {"on_nonfinite": "skip"}, "on_nonfinite: expected None beside rules by name"),
        ({"m": rule}, {"dtype": torch.bfloat16}, r"averages\['m'\]: the weight of a new source"),
    ):
        with pytest.raises(ValueError, match=message):
            Averager(model, rules, **options)
    averager = Averager(model, {"m": rule})
    with pytest.raises(ValueError, match="decay: expected the name of an EMA, found 'm'"):
        averager.update(decay={"m": 0.5})
    with pytest.raises(TypeError, match="rule: expected SWA, EMA or Power, found ByName"):
        AveragedModel(model, rule=rule)  # type: ignore[arg-type]


def test_an_exception_before_every_line_of_an_update() -> None:
    """All sets of tensors or none."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        model = nn.Linear(2, 2)
        averager = Averager(model, {"m": ByName({"bias": EMA(0.5)}, default=EMA(0.9))})
        averager.update()
        before = {name: tensor.clone() for name, tensor in averager.averages["m"].items()}
        step(model)

        def check() -> None:
            averages = averager.averages["m"]
            moved = {name: not torch.equal(averages[name], before[name]) for name in before}
            assert set(moved.values()) == {averager.n_averaged["m"] == 2}, moved
            assert len({int(part.engine.n_averaged) for part in averager._storage.parts}) == 1
            averager.update()

        return averager.update, check

    assert at_every_line(make, "storage.py") > 10
