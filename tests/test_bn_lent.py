"""Layers and models that call BatchNorm by themselves, or write running statistics by hand."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast


def batches(*shape: int, count: int = 5) -> list[Tensor]:
    return [torch.randn(8, *shape) * (1 + i) + i for i in range(count)]


def assert_like_torch(ours: nn.Module, data: list[Any], **options: Any) -> swa_fast.BNReport:
    theirs = copy.deepcopy(ours)
    report = swa_fast.update_bn(data, ours, **options)
    swa_utils.update_bn(data, theirs)
    for (key, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)
    return report


def assert_refused(model: nn.Module, data: list[Any], match: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    with pytest.raises(ValueError, match=match):
        swa_fast.update_bn(data, model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert not any("forward" in module.__dict__ for module in model.modules())


# ------------------------------------------------------------------- subclasses with F.batch_norm


class Split(nn.BatchNorm1d):
    """Holds other layers, which normalise a part of the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.others = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.split([4, 2, len(x) - 6])
        parts = [super().forward(first), *(m(p) for m, p in zip(self.others, rest, strict=True))]
        return torch.cat(parts)


class HardWired(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1,
            self.eps,
        )  # fmt: skip
        return F.leaky_relu(y)


class ByTorch(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1,
            self.eps, False,
        )  # fmt: skip


class Ghost(nn.BatchNorm1d):
    """Parts of the batch side by side: statistics have splits times as many values."""

    splits = 2

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(channels * self.splits))
        self.register_buffer("running_var", torch.ones(channels * self.splits))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        self.num_batches_tracked += 1
        momentum = self.momentum or 1.0 / int(self.num_batches_tracked)
        y = F.batch_norm(
            x.reshape(-1, c * self.splits), self.running_mean, self.running_var,
            self.weight.repeat(self.splits), self.bias.repeat(self.splits), True, momentum,
            self.eps,
        )  # fmt: skip
        return y.view(n, c)


@pytest.mark.parametrize("kind", [Split, Ghost])
def test_subclasses_of_their_own_making(kind: type[nn.BatchNorm1d]) -> None:
    report = assert_like_torch(nn.Sequential(nn.Linear(3, 4), kind(4), nn.ReLU()), batches(3))
    assert "1" in report.layers


@pytest.mark.parametrize("estimator", ["torch", "weighted", "pooled"])
@pytest.mark.parametrize("kind", [HardWired, ByTorch])
def test_a_hard_wired_momentum_does_not_matter(kind: type[nn.BatchNorm1d], estimator: str) -> None:
    data = batches(4)
    plain, model = nn.BatchNorm1d(4), kind(4)
    for x in data:
        model(3 * x)
    swa_fast.update_bn(data, plain, estimator=estimator)
    swa_fast.update_bn(data, model, estimator=estimator)
    for value, expected in zip(
        model.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected)


def test_parts_of_a_batch_count_with_their_size() -> None:
    """The whole batch is not what the outer layer has seen."""
    data = batches(4)
    model = Split(4)
    swa_fast.update_bn(data, model, estimator="pooled")
    seen = torch.cat([x[:4] for x in data])
    torch.testing.assert_close(model.running_mean, seen.mean(0))
    torch.testing.assert_close(model.running_var, seen.var(0))
    seen = torch.cat([x[6:] for x in data])
    torch.testing.assert_close(model.others[1].running_var, seen.var(0))


# ------------------------------------------------------------- models that call layers otherwise


class Calls(nn.Module):
    def __init__(self, call: Callable[[nn.BatchNorm1d, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.bn, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.bn, self.first(x)))  # type: ignore[no-any-return]


def _arguments(bn: nn.BatchNorm1d, x: Tensor) -> tuple[Any, ...]:
    return x, bn.running_mean, bn.running_var, bn.weight, bn.bias


def by_its_class(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return nn.BatchNorm1d.forward(bn, x)


def by_function(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return F.batch_norm(*_arguments(bn, x), training=True, momentum=0.1, eps=bn.eps)


def in_a_thread(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(by_function(bn, x.detach()).detach()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("call", [by_its_class, by_function, in_a_thread])
def test_layers_that_are_called_otherwise(call: Callable[..., Tensor]) -> None:
    data = batches(3)
    ours = Calls(call)
    plain = copy.deepcopy(ours)
    plain.call = nn.BatchNorm1d.__call__
    report = swa_fast.update_bn(data, ours)
    assert report.layers == ("bn", "last")
    swa_fast.update_bn(data, plain)
    for value, expected in zip(
        ours.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected)


def reads(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    before = bn.running_mean.clone()
    y = bn(x)
    return y + before - 2 * bn.running_mean + bn.running_var.sqrt()


def normalises_by_them(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    bn(x)
    return F.batch_norm(*_arguments(bn, x), training=False)


class ReadsItself(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        y: Tensor = super().forward(x)
        return y * (1 + self.running_mean.abs())


@pytest.mark.parametrize("call", [reads, normalises_by_them, "own"])
def test_statistics_that_are_read_in_the_pass_are_those_of_torchs(call: Any) -> None:
    model = Calls(nn.BatchNorm1d.__call__ if call == "own" else call)
    if call == "own":
        model.bn = ReadsItself(4)
    assert_like_torch(model, batches(3))


# ------------------------------------------------------------------------ statistics kept by hand


class ByHand(nn.BatchNorm1d):
    """As before F.batch_norm was, or where it did not do what was wanted."""

    rate: float | None = None  # None for the layer's momentum
    how = "iadd"

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        mean, var = x.mean(0), x.var(0)
        rate = self.momentum if self.rate is None else self.rate
        assert rate is not None
        with torch.no_grad():
            if self.how == "iadd":
                self.running_mean += rate * (mean - self.running_mean)
                self.running_var += rate * (var - self.running_var)
            elif self.how == "in two steps":
                self.running_mean.mul_(1 - rate).add_(mean, alpha=rate)
                self.running_var.mul_(1 - rate).add_(var, alpha=rate)
            elif self.how == "data":
                self.running_mean.data.lerp_(mean, rate)
                self.running_var.data.lerp_(var, rate)
            else:
                self.running_mean = (1 - rate) * self.running_mean + rate * mean
                self.running_var = (1 - rate) * self.running_var + rate * var
        return (x - mean) / (var + self.eps).sqrt()


@pytest.mark.parametrize("how", ["iadd", "in two steps", "data", "new tensors"])
def test_statistics_kept_by_hand(how: str) -> None:
    data = batches(4)
    layer, plain = ByHand(4), nn.BatchNorm1d(4)
    layer.how = how
    model = nn.Sequential(layer, nn.Dropout(0.0))
    buffers = dict(model.named_buffers())
    swa_fast.update_bn(data, model)
    swa_fast.update_bn(data, plain)
    for value, expected in zip(
        layer.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected)
    assert all(value is buffers[name] for name, value in model.named_buffers())
    layer.rate = 0.1
    assert_refused(model, data, "layer 0: .* ByHand uses a momentum of its own")


class BySlices(nn.BatchNorm1d):
    """F.batch_norm on parts of the buffers, which does not tell that it has written to them."""

    rate: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        rate = self.momentum if self.rate is None else self.rate
        parts = [
            F.batch_norm(
                x[:, part], self.running_mean[part], self.running_var[part], None, None, True, rate
            )
            for part in (slice(0, 2), slice(2, 4))
        ]
        return torch.cat(parts, 1)


def test_parts_of_the_buffers() -> None:
    data = batches(4)
    layer, plain = BySlices(4), nn.BatchNorm1d(4)
    swa_fast.update_bn(data, layer)
    swa_fast.update_bn(data, plain)
    for value, expected in zip(
        layer.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected)
    layer.rate = 0.1
    assert_refused(layer, data, "a momentum of its own")


def test_a_layer_that_updates_in_two_ways_is_refused() -> None:
    class Clamps(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            assert self.running_var is not None
            self.running_var.clamp_(min=0.5)
            return y

    assert_refused(nn.Sequential(Clamps(4)), batches(4), "layer 0: .* does both")


def _normalise(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)


def by_a_script(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return torch.jit.script(_normalise)(x, bn.running_mean, bn.running_var)  # type: ignore[no-any-return]


def parts_of_a_layers(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    assert bn.running_mean is not None and bn.running_var is not None
    return F.batch_norm(x[:, :2], bn.running_mean[:2], bn.running_var[:2], training=True).repeat(
        1, 2
    )


def writes(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    bn.reset_running_stats()
    return bn(x)  # type: ignore[no-any-return]


def replaces(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    bn.running_mean = x.mean(0)
    return bn(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [by_a_script, parts_of_a_layers, writes, replaces])
def test_updates_that_the_pass_cannot_see_are_refused(call: Callable[..., Tensor]) -> None:
    assert_refused(Calls(call), batches(3), "layer bn: expected running statistics that")


@pytest.mark.filterwarnings("ignore")  # torch calls TorchScript deprecated, and doubts the trace
@pytest.mark.parametrize("how", ["scripted", "scripted part", "traced part"])
def test_layers_of_torchscript_are_refused(how: str) -> None:
    part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    if how == "traced part":
        scripted = torch.jit.trace(part.train(), torch.randn(4, 3))
    else:
        scripted = torch.jit.script(part)
    model = scripted if how == "scripted" else nn.Sequential(scripted, nn.BatchNorm1d(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    match = r"layer (0\.)?1: .* TorchScript.* before torch.jit.script"
    with pytest.raises(ValueError, match=match):
        swa_fast.update_bn(batches(3), model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["traced in eval mode", "scripted, frozen", "scripted, no layer"])
def test_parts_of_torchscript_that_keep_no_statistics(how: str) -> None:
    part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model = nn.Sequential(part, nn.BatchNorm1d(4)).train()
    part.eval()
    if how == "scripted, no layer":
        model[0] = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()))
    elif how == "scripted, frozen":
        model[0] = torch.jit.script(part)
    else:
        model[0] = torch.jit.trace(part, torch.randn(4, 3))
        model.eval()
    report = swa_fast.update_bn(batches(3), model)
    assert report.layers == ("1",)
    assert model[1].num_batches_tracked == 5


def test_inference_mode_of_the_caller() -> None:
    with torch.inference_mode():
        data = batches(4)
    model, plain = ByHand(4), nn.BatchNorm1d(4)
    with torch.inference_mode():
        swa_fast.update_bn(data, model)
        swa_fast.update_bn(data, plain)
    torch.testing.assert_close(model.running_var, plain.running_var)
    assert not model.running_mean.is_inference()


def test_an_own_forward_costs_no_second_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """F.batch_norm itself is not called."""
    model = HardWired(4)
    monkeypatch.setattr(torch, "batch_norm", None)
    swa_fast.update_bn(batches(4), model)
