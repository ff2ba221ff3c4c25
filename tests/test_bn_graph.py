"""``update_bn(graph=True)``: the forward as a CUDA graph, and everything that speaks against it."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swa_fast
from swa_fast.batch_norm.collector import Collector

gpu = pytest.mark.gpu


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3),
        nn.Flatten(1), nn.Linear(3 * 9, 2), nn.BatchNorm1d(2),
    )  # fmt: skip


def batches(sizes: tuple[int, ...] = (4,) * 8) -> list[Tensor]:
    return [torch.randn(n, 2, 5, 5) * (1 + i) + i for i, n in enumerate(sizes)]


def both(
    model: nn.Module, data: list[Any], **options: Any
) -> tuple[swa_fast.BNReport, swa_fast.BNReport, nn.Module, nn.Module]:
    """The pass with and without graph=True, on the GPU."""
    plain = copy.deepcopy(model).cuda()
    captured = copy.deepcopy(plain)
    without = swa_fast.update_bn(data, plain, "cuda", **options)
    report = swa_fast.update_bn(data, captured, "cuda", graph=True, **options)
    return report, without, captured, plain


def assert_equal_states(ours: nn.Module, theirs: nn.Module) -> None:
    for (key, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), key


@gpu
@pytest.mark.parametrize("estimator", ["torch", "weighted", "pooled"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_replayed_forwards_give_the_same_bits(estimator: str, backend: str) -> None:
    # Three by themselves, four like the third, one of another size, one more.
    data = batches((4, 4, 4, 4, 4, 4, 4, 3, 4))
    report, without, ours, theirs = both(net(), data, estimator=estimator, backend=backend)
    assert (report.replayed, report.batches, report.samples) == (5, 9, 35)
    assert without.replayed == 0
    assert (report.mean_error, report.var_error) == (without.mean_error, without.var_error)
    assert_equal_states(ours, theirs)
    assert not any("forward" in m.__dict__ for m in ours.modules())


@gpu
def test_a_replayed_batch_is_one_launch(simulator: Any) -> None:
    counters: list[dict[str, int]] = []

    def loader() -> Any:
        for batch in [b.cuda() for b in batches((4,) * 8)]:
            counters.append(simulator.counters()["total"])
            yield batch

    model = net().cuda()
    simulator.reset()
    assert swa_fast.update_bn(loader(), model, graph=True).replayed == 5
    before, after = counters[-2], counters[-1]
    found = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert found["graph_launches"] == 1
    assert not {"host_syncs", "allocations"} & set(found)


@gpu
def test_models_with_random_masks_own_forwards_and_layers_used_twice() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.own = nn.Linear(50, 6), nn.BatchNorm1d(6), Own(6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.linear(x.flatten(1)))
            z: Tensor = self.own(nn.functional.dropout(self.norm(y), 0.0))
            return z

    report, _, ours, theirs = both(Twice(), batches())
    assert report.replayed == 5
    assert_equal_states(ours, theirs)


@gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_under_autocast(autocast: bool) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        report, _, ours, theirs = both(net(), batches())
        assert torch.is_autocast_cache_enabled()
    assert report.replayed == 5
    assert_equal_states(ours, theirs)


@gpu
def test_a_tolerance_ends_it() -> None:
    data = [torch.randn(64, 2, 5, 5) for _ in range(40)]
    model = net().cuda()
    report = swa_fast.update_bn(data, model, "cuda", graph=True, tolerance=0.5)
    assert report.converged and 0 < report.replayed < 37


class Forward(nn.Module):
    """A model whose forward is the test's."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.around = around

    def forward(self, x: Any) -> Tensor:
        return self.around(self, x)


def straight(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.second(model.first(x) + 1)
    return y


def waits(model: Any, x: Tensor) -> Tensor:
    y = model.first(x)
    return model.second(y * y.abs().max().item())  # type: ignore[no-any-return]


def raises_while_captured(model: Any, x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("not here")
    return straight(model, x)


def catches_everything(model: Any, x: Tensor) -> Tensor:
    try:
        return straight(model, x)
    except BaseException:
        return x


def other_order_while_captured(model: Any, x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        return model.first(model.second(x))  # type: ignore[no-any-return]
    return straight(model, x)


@gpu
@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (waits, "waits for the device"),
        (raises_while_captured, "NotImplementedError: not here"),
        (other_order_while_captured, "different orders"),
    ],
)
def test_what_cannot_be_captured_is_run(
    around: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "swa_fast"):
        report, _, ours, theirs = both(Forward(around), batches())
    assert report.replayed == 0
    (record,) = caplog.records
    assert reason in record.getMessage() and "no forward is captured" in record.getMessage()
    assert_equal_states(ours, theirs)


@gpu
def test_alternating_orders_are_run(caplog: pytest.LogCaptureFixture) -> None:
    def alternating() -> Any:
        turns = itertools.cycle([True, True, False])

        def around(model: Any, x: Tensor) -> Tensor:
            if next(turns):
                return straight(model, x)
            return model.first(model.second(x))  # type: ignore[no-any-return]

        return around

    states = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = Forward(alternating()).cuda()
        report = swa_fast.update_bn(batches(), model, "cuda", graph=graph)
        assert report.replayed == 0
        states.append(model)
    assert_equal_states(*states)
    assert "different orders" in caplog.text


@gpu
def test_a_model_that_catches_the_early_end_is_captured_whole() -> None:
    report, _, ours, theirs = both(Forward(catches_everything), batches())
    assert report.replayed == 5
    assert_equal_states(ours, theirs)


@gpu
def test_options_and_models_that_rule_it_out(caplog: pytest.LogCaptureFixture) -> None:
    def check(model: nn.Module, data: list[Any], reason: str, **options: Any) -> None:
        caplog.clear()
        report, _, ours, theirs = both(model, data, **options)
        assert report.replayed == 0
        assert reason in caplog.text
        assert_equal_states(ours, theirs)

    check(net(), batches(), "call=", call=lambda model, batch: model(batch))
    hooked = net()
    next(hooked.children()).register_forward_hook(_hook)
    check(hooked, batches(), "forward hook")
    wrapped = [{"x": b} for b in batches()]
    check(Forward(_of_dict), wrapped, "not one tensor on a CUDA device")


def _hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
    return None


def _of_dict(model: nn.Module, x: Any) -> Tensor:
    return straight(model, x["x"])


@gpu
def test_a_failing_loader_leaves_the_model_as_it_was() -> None:
    def loader() -> Any:
        yield from [b.cuda() for b in batches((4,) * 6)]
        raise ValueError("end of the tape")

    model = net().cuda()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="tape"):
        swa_fast.update_bn(loader(), model, graph=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_on_the_cpu_it_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    plain, other = net(), net()
    other.load_state_dict(plain.state_dict())
    data = batches()
    swa_fast.update_bn(data, plain)
    assert swa_fast.update_bn(data, other, graph=True).replayed == 0
    assert_equal_states(other, plain)
    assert not caplog.records


@gpu
def test_two_batches_are_seen_whole_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one as it is captured: what happens once in a forward is not taken for what happens
    always."""
    seen: list[bool] = []
    run = Collector._run

    def counting(self: Collector, batch: Any) -> bool:
        seen.append(torch.cuda.is_current_stream_capturing())
        return run(self, batch)

    monkeypatch.setattr(Collector, "_run", counting)
    swa_fast.update_bn(batches(), net().cuda(), "cuda", graph=True)
    assert seen == [False] * 3 + [True]
