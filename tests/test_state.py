"""An Averager as an object: seen, saved, copied, shared, loaded, with decays that change."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from helpers import Net, snapshot, step
from torch import Tensor, nn

import swa_fast
from swa_fast import EMA, SWA, AveragedModel, Averager, Power


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def malformed() -> dict[str, dict[str, Any]]:
    averages: dict[str, Any] = {"meta": torch.empty(4, device="meta"), "list": [0.0] * 4}
    averages |= {"sparse": torch.zeros(4).to_sparse(), "shape": torch.zeros(5), "none": None}
    averages |= {"dtype": torch.zeros(4).double(), "complex": torch.zeros(4).cfloat()}
    counts: list[Any] = [None, {}, {"s": 1}, {"s": "x", "e": 1}, {"s": -1, "e": 1}, [1, 1]]
    counts += [{"s": n, "e": 1} for n in (2**63, math.nan, 1.7, True, None, torch.ones(2))]
    return {
        **{f"count {n}": {"n_averaged": n} for n in counts},
        **{f"skipped {n}": {"skipped_updates": n} for n in ("x", -7, None, 1.5, 2**70)},
        **{f"bias {name}": {"bias": value} for name, value in averages.items()},
        **{f"averages {a}": {"averages": a} for a in (None, [], {"e": None, "s": {}})},
        **{f"rules {r}": {"rules": r} for r in (None, {}, torch.ones(2))},
        **{f"format {f}": {"format": f} for f in (None, 2, torch.ones(2))},
        "rounding": {"rounding": torch.ones(3)},
    }


@pytest.mark.parametrize("name", list(malformed()))
def test_a_malformed_state_changes_nothing(name: str) -> None:
    averager = Averager(nn.Linear(4, 4), {"s": SWA(), "e": EMA(0.9)})
    averager.update()
    state = copy.deepcopy(averager.state_dict())
    for tensors in state["averages"].values():
        for tensor in tensors.values():
            tensor.fill_(9)
    change = malformed()[name]
    if "bias" in change:
        state["averages"]["e"]["bias"] = change["bias"]
    else:
        state.update(change)
    before = copy.deepcopy(averager.state_dict())
    with pytest.raises(ValueError, match="state_dict does not fit"):
        averager.load_state_dict(state)
    after = averager.state_dict()
    assert after["n_averaged"] == before["n_averaged"]
    for rule in ("s", "e"):
        for key, value in before["averages"][rule].items():
            assert torch.equal(after["averages"][rule][key], value)
    for none in (None, [], "state"):
        with pytest.raises(ValueError, match="expected one of an Averager"):
            averager.load_state_dict(none)  # type: ignore[arg-type]


def test_a_part_costs_the_part() -> None:
    model = Net()
    averager = Averager(model, {"a": SWA(), "b": EMA(0.5), "c": EMA(0.9)})
    averager.update()
    for part in (averager.averages["b"], averager.averages["b"]["bn.weight"]):
        file = io.BytesIO()
        torch.save(part, file)
        tensors = part.values() if isinstance(part, dict) else [part]
        exact = sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())
        assert len(file.getvalue()) < exact + 6000
    one = copy.deepcopy(averager.averages["b"]["bn.weight"])
    assert one.untyped_storage().nbytes() == one.nbytes


def moves() -> dict[str, Any]:
    def data(t: Tensor) -> None:
        t.data = t.data.clone()

    def strided(t: Tensor) -> None:
        t.data = torch.empty(4, 8)[:, ::2].copy_(t.data)

    return {
        "share_memory_": lambda t: t.share_memory_(),
        "set_": lambda t: t.set_(t.clone()),
        "data": data,
        "strided": strided,
        "negated": lambda t: setattr(t, "data", torch._neg_view(t.data.neg())),
        "swapped": lambda t: torch.utils.swap_tensors(t, t.clone()),
        "resize_": lambda t: t.resize_(2048, 2048),
        "retyped": lambda t: setattr(t, "data", t.data.half()),
        "freed": lambda t: t.untyped_storage().resize_(0),
        "reshaped": lambda t: setattr(t, "data", t.data.view(16)),
    }


@pytest.mark.parametrize("change", list(moves()))
@pytest.mark.parametrize("which", ["average", "source"])
def test_what_moves_is_followed_or_refused(which: str, change: str) -> None:
    model = nn.Linear(4, 4)
    averager = Averager(model, {"s": SWA()})
    fill(model, 0)
    averager.update()
    average = averager.averages["s"]["weight"]
    try:
        with torch.no_grad():
            fill(model, 4)
            moves()[change](average if which == "average" else model.weight)
        averager.update()
    except (RuntimeError, ValueError, TypeError):
        assert change in ("resize_", "retyped", "freed", "reshaped", "swapped")
        return
    assert averager.averages["s"]["weight"].float().mean().item() == 2.0
    assert averager.averages["s"]["bias"].mean().item() == 2.0


def test_shared_averages_are_seen_by_their_copies() -> None:
    """As another process gets them: a pickle of tensors in shared memory is those tensors."""
    from multiprocessing.reduction import ForkingPickler

    model = nn.Linear(4, 4)
    fill(model, 1)
    averager = Averager(model, {"s": SWA()})
    averager.update()
    other = ForkingPickler.loads(bytes(ForkingPickler.dumps(averager)))
    fill(other._selection.module, 3)
    other.update()
    assert averager.averages["s"]["weight"].mean().item() == 2.0
    assert averager.n_averaged == {"s": 2}
    averager.update()
    torch.testing.assert_close(other.averages["s"]["weight"], torch.full((4, 4), 7 / 3))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_copy_is_another_averager(how: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    keeps = {"filter": lambda name, _: "bias" not in name}  # which cannot be pickled
    averager = Averager(model, {"s": SWA(), "e": EMA(0.5)}, trainable_only=True, **keeps)
    averager.update()
    if how == "deepcopy":
        other_model, other = copy.deepcopy((model, averager))
    else:
        file = io.BytesIO()
        torch.save((model, averager), file)
        file.seek(0)
        other_model, other = torch.load(file, weights_only=False)
    before = copy.deepcopy(averager.state_dict())
    fill(other_model, 7)
    other.update()
    assert other.n_averaged == {"s": 2, "e": 2}
    for name, value in before["averages"]["s"].items():
        assert torch.equal(averager.averages["s"][name], value)
    assert not torch.equal(other.averages["s"]["0.weight"], before["averages"]["s"]["0.weight"])
    assert repr(other) == repr(averager)


def test_a_copy_raises_for_what_is_not_finite() -> None:
    weight = torch.zeros(3)
    averager = Averager([weight], {"s": SWA()}, on_nonfinite="raise")
    averager.update()
    weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="1 update"):
        copy.deepcopy(averager).update()
    with pytest.raises(FloatingPointError, match="1 update"):
        averager.update()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "quantised", "nested"])
@pytest.mark.parametrize("drop_in", [False, True])
def test_buffers_without_an_address_are_copied(kind: str, drop_in: bool) -> None:
    model: Any = nn.Linear(3, 3)
    if kind == "sparse":
        buffer = torch.eye(3).to_sparse()
    elif kind == "quantised":
        buffer = torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.quint8)
    else:
        ragged = [torch.rand(2), torch.rand(3)]
        buffer = torch.nested.nested_tensor(ragged, layout=torch.jagged)
    model.register_buffer("odd", buffer)
    average: Any = AveragedModel(model) if drop_in else Averager(model, {"s": SWA()})
    for value in (1, 3):
        fill(model, value)
        average.update_parameters(model) if drop_in else average.update()
    found = average.module.odd if drop_in else average.averages["s"]["odd"]
    assert found is not model.odd and type(found) is type(model.odd)
    weight = average.module.weight if drop_in else average.averages["s"]["weight"]
    assert weight.mean().item() == 2.0
    with average.applied(model) if drop_in else average.applied("s"):
        assert model.weight.mean().item() == 2.0
    assert model.weight.mean().item() == 3.0
    if not drop_in:
        average.load_state_dict(copy.deepcopy(average.state_dict()))


@pytest.mark.filterwarnings("ignore:`torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_scripted_models() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    averager, averaged = Averager(model, {"s": SWA()}), AveragedModel(model)
    for value in (1, 3):
        fill(model, value)
        averager.update()
        averaged.update_parameters(model)
    assert averager.averages["s"]["0.weight"].mean().item() == 2.0
    assert averaged.module.state_dict()["0.weight"].mean().item() == 2.0


def test_the_default_device_does_not_matter() -> None:
    model = nn.Linear(3, 4)
    with torch.device("meta"):
        averager = Averager(model, {"s": SWA(), "e": EMA(lambda n: 0.5)})
        averaged = AveragedModel(model)
        averager.update(decay={"e": 0.25})
        averaged.update_parameters(model)
        averager.load_state_dict(averager.state_dict())
        with averager.applied("s"):
            pass
        with averaged.applied(model):
            pass
    assert averager.averages["e"]["weight"].device.type == "cpu"


def test_freezing_and_unfreezing_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    averager = Averager(model, {"s": SWA()}, trainable_only=True)
    names = set(averager.averages["s"])
    for change in (True, False):
        model.requires_grad_(change)
        model.double()
        averager.update()
        model.float()
        averager.update()
    assert set(averager.averages["s"]) == names == {"1.weight", "1.bias"}


def test_decays_that_change() -> None:
    model = nn.Linear(2, 2)
    decays = [0.5, 0.25, 0.75, 0.125]
    by_rule = Averager(model, {"e": EMA(lambda n: decays[n])})
    by_argument = Averager(model, {"e": EMA(0.9), "s": SWA()})
    by_call = Averager(model, {"e": EMA(0.9, start=0)})
    drop_in = AveragedModel(model)
    expected = torch.zeros(2, 2)
    for n, decay in enumerate(decays):
        step(model)
        by_rule.update()
        by_argument.update(decay=decay)
        by_call.set_decay(decay)
        by_call.update()
        drop_in.multi_avg_fn = swa_fast.get_ema_multi_avg_fn(decay)
        drop_in.update_parameters(model)
        weight = model.weight.detach()
        expected = weight.clone() if n == 0 else decay * expected + (1 - decay) * weight
        if n == 1:  # what is resumed goes on in the schedule
            state = copy.deepcopy(by_rule.state_dict())
            by_rule = Averager(model, {"e": EMA(lambda n: decays[n])})
            by_rule.load_state_dict(state, strict=False)
    found = [a.averages["e"]["weight"] for a in (by_rule, by_argument, by_call)]
    for tensor in (*found, drop_in.module.weight.detach()):
        torch.testing.assert_close(tensor, expected)
    assert by_argument._rules["e"] == EMA(0.9)
    for wrong in (1.5, -0.1, math.nan):
        for refused in (
            lambda wrong=wrong: by_argument.update(decay=wrong),
            lambda wrong=wrong: by_call.set_decay(wrong),
            Averager(model, {"e": EMA(lambda n, wrong=wrong: wrong if n else 0.5)}).update,
        ):
            with pytest.raises(ValueError, match="decay: expected a number in"):
                refused()
                refused()
    with pytest.raises(ValueError, match="the name of an EMA"):
        by_argument.update(decay={"s": 0.5})
    with pytest.raises(KeyError, match="expected one of e, s"):
        by_argument.set_decay(0.5, "x")


def test_resumed_with_other_rules_and_averages() -> None:
    model = nn.Linear(3, 4)
    old = Averager(model, {"e": EMA(0.99, warmup="timm"), "gone": SWA()})
    old.update()
    fill(model, 3)
    old.update()
    state = copy.deepcopy(old.state_dict())
    new = Averager(model, {"e": EMA(0.9), "s": SWA()})
    with pytest.raises(ValueError, match="state_dict does not fit"):
        new.load_state_dict(state)
    differences = new.load_state_dict(state, strict=False)
    assert differences == (["s"], ["gone"], ["e"])
    assert new.n_averaged == {"e": 2, "s": 0}
    assert torch.equal(new.averages["e"]["weight"], state["averages"]["e"]["weight"])
    new.update()
    assert new.averages["s"]["weight"].mean().item() == 3.0
    with pytest.raises(ValueError, match="weight expected"):
        Averager(nn.Linear(5, 4), {"e": EMA(0.9)}).load_state_dict(state, strict=False)


def test_started_from_other_libraries_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    fill(model, 3)
    averaged.update_parameters(model)
    averager = Averager(model, {"s": SWA(), "e": EMA(0.5)})
    averager.load_average("s", averaged.state_dict())
    assert averager.n_averaged == {"s": 2, "e": 0}
    averager.load_average("e", [torch.full_like(p, 5) for p in model.parameters()])
    assert averager.n_averaged == {"s": 2, "e": 1}
    averager.update()
    averaged.update_parameters(model)
    torch.testing.assert_close(
        averager.averages["s"]["0.weight"], averaged.module[0].weight.detach()
    )
    assert averager.averages["e"]["0.weight"].unique().tolist() == [4.0]
    before = snapshot(averaged.module)
    for wrong in ({}, {"0.weight": torch.zeros(2)}, [torch.zeros(3)], None, {"n_averaged": -1}):
        with pytest.raises(ValueError, match=r"weights|n_averaged"):
            averager.load_average("s", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_averaged: expected the number of updates"):
        averager.load_average("s", before)


def test_equal_weights_that_would_stand_still(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2).bfloat16()
    for rule in (SWA(), Power(gamma=1.0)):
        with pytest.raises(ValueError, match="stand still, from some"):
            Averager(model, {"s": rule}, dtype=torch.bfloat16)
        Averager(model, {"s": rule}, dtype=torch.bfloat16, rounding="stochastic")
    assert not caplog.records
    AveragedModel(model)
    assert "stand still, from some 256 updates" in caplog.text
    caplog.clear()
    Averager(nn.Linear(2, 2), {"s": SWA()}, dtype=torch.float16)
    assert "stand still, from some 2048 updates" in caplog.text


def test_a_module_or_its_dictionaries_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    averager, averaged = Averager(model, {"s": SWA()}), AveragedModel(model)
    kept = []
    for value in (1, 3, 5):
        kept.append(model[0]._parameters)  # so that the old one lives on
        model[0]._parameters = copy.deepcopy(model[0]._parameters)
        averaged.module = copy.deepcopy(averaged.module)
        fill(model, value)
        averager.update()
        averaged.update_parameters(model)
    assert averager.averages["s"]["0.weight"].mean().item() == 3.0
    assert averaged.module[0].weight.mean().item() == 3.0
