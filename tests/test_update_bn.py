"""update_bn beside torch's, its estimators, and what it does when things go wrong."""

from __future__ import annotations

import builtins
import copy
import logging
import math
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, extended
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils

import swa_fast
from swa_fast import precise_bn
from swa_fast.batch_norm import batches as batches_module
from swa_fast.batch_norm import convergence, layers, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ESTIMATORS = ["torch", "weighted", "pooled"]


class Shared(nn.Module):
    """One BatchNorm layer used twice in a forward, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.unused = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(3 * self.bn(x) + 1)


class Residual(nn.Module):
    """ReLUs of every kind behind BatchNorm layers, and outputs that others use too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn1, self.bn2, self.bn3, self.bn4, self.bn5, self.bn6 = (
            nn.BatchNorm2d(6) for _ in range(6)
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)), inplace=True)
        y = self.bn2(x)
        x = x + self.act(y) + y  # the ReLU is not the only one to use y
        x = self.act(self.bn3(x)) - 0.1
        x = self.bn4(x).relu().mul_(2)
        y = self.bn5(x)
        x = torch.cat([y, F.relu(y)], 0)
        return F.relu(input=self.bn6(x)).mean((2, 3))


class OwnForward(nn.BatchNorm2d):
    """Does more than BatchNorm, as the BatchNorm-and-activation layers of model libraries."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(1),
        nn.Linear(6 * 36, 5), nn.BatchNorm1d(5, momentum=None), nn.Dropout(0.0),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (conv_net, (3, 8, 8)),
    "shared": (Shared, (4,)),
    "residual": (Residual, (3, 8, 8)),
    "own_forward": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), OwnForward(6), nn.ReLU(), OwnForward(6)),
        (3, 8, 8),
    ),
    "not_affine": (lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False, eps=0.1)), (4,)),
    "one_dimensional": (lambda: nn.Sequential(nn.BatchNorm1d(4)), (4, 7)),
    "three_dimensional": (lambda: nn.Sequential(nn.BatchNorm3d(2)), (2, 3, 4, 5)),
    "untracked": (lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), (4,)),
}


def layers_of(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def assert_clean(model: nn.Module) -> None:
    """Nothing of the pass is left behind."""
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def drifting_batches(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(n, *shape) * (1 + i) + i for i, n in enumerate(sizes)]


def of_module(module: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None and module.running_var is not None
    return module.running_mean, module.running_var


# ------------------------------------------------------------------------------- torch's behaviour


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_same_as_torch(name: str, device: str) -> None:
    make, shape = MODELS[name]
    ours = make()
    theirs, exact = copy.deepcopy(ours).to(device), copy.deepcopy(ours).double()
    ours.to(device)
    labelled = [(x, torch.zeros(len(x))) for x in drifting_batches(shape, (16, 16, 16, 5))]
    swa_fast.update_bn(labelled, ours, device)
    if name == "own_forward" and device == "cpu":
        # The pass runs in channels-last, where torch's own layers sum less exactly.
        labelled = [(x.to(memory_format=torch.channels_last), y) for x, y in labelled]
    swa_utils.update_bn(labelled, theirs, device)
    swa_utils.update_bn([x.double() for x, _ in labelled], exact)
    names = [key for key in ours.state_dict() if not key.endswith("num_batches_tracked")]
    for kind in ("running_mean", "running_var"):
        lists = [
            [model.state_dict()[key] for key in names if key.endswith(kind)]
            for model in (ours, theirs, exact)
        ]
        assert_as_accurate(lists[0], lists[1], [extended(t) for t in lists[2]], kind)
    for key in set(ours.state_dict()) - set(names):
        assert torch.equal(ours.state_dict()[key], theirs.state_dict()[key]), key
    for ours_bn, theirs_bn in zip(layers_of(ours), layers_of(theirs), strict=True):
        assert ours_bn.momentum == theirs_bn.momentum
    assert_clean(ours)


@pytest.mark.parametrize(
    ("arguments", "mean", "variance"),
    [
        ({}, 7.5, 19.444444),
        ({"estimator": "torch"}, 7.5, 19.444444),
        ({"estimator": "weighted"}, 6.0, 13.333333),
        ({"estimator": "pooled", "unbiased": False}, 6.0, 29.0),
        ({"estimator": "pooled"}, 6.0, 32.222222),
    ],
    ids=str,
)
def test_known_values(arguments: dict[str, Any], mean: float, variance: float) -> None:
    """One channel, batches of different sizes."""
    model = nn.BatchNorm1d(1)
    batches = [[1.0, 2, 3, 4], [2.0, 4, 6, 8], [10.0, 20]]
    report = swa_fast.update_bn([torch.tensor(b).view(-1, 1) for b in batches], model, **arguments)
    assert model.running_mean.item() == pytest.approx(mean)
    assert model.running_var.item() == pytest.approx(variance, rel=1e-6)
    assert model.num_batches_tracked.item() == 3
    assert (report.batches, report.samples) == (3, 10)
    assert report.layers == ("(the model itself)",)


def test_modes_and_momenta_are_restored() -> None:
    model = conv_net().train()
    model[1].eval()
    model[6].eval()
    modes = [m.training for m in model.modules()]
    swa_fast.update_bn([torch.randn(4, 3, 8, 8)], model)
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum == 0.1 and model[5].momentum is None
    assert_clean(model)


def test_running_statistics_stay_the_same_tensors_of_the_same_dtype() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).bfloat16()
    before = dict(model.named_buffers())
    swa_fast.update_bn([torch.randn(8, 3).bfloat16()], model)
    assert all(after is before[name] for name, after in model.named_buffers())
    assert model[0].running_mean.dtype == torch.bfloat16
    assert not model[0].running_mean.is_inference() and model[0].num_batches_tracked == 1


# --------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("data", ["shuffled", "drifting", "far"])
@pytest.mark.parametrize("device", DEVICES)
def test_pooled_is_exact(device: str, data: str, dtype: torch.dtype) -> None:
    values = torch.randn(24, 3, 5, 6, dtype=torch.float64)
    if data == "drifting":
        values += torch.arange(24).view(-1, 1, 1, 1) / 4
    elif data == "far":
        values += 1e4
    values = values.to(dtype)
    batches = [batch.to(device) for batch in values.split([7, 7, 7, 3])]
    model = nn.BatchNorm2d(3).to(device)
    for unbiased in (True, False):
        swa_fast.update_bn(batches, model, estimator="pooled", unbiased=unbiased)
        channels = extended(values).swapaxes(0, 1).reshape(3, -1)
        mean, variance = (extended(t) for t in of_module(model))
        np.testing.assert_allclose(mean, channels.mean(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, channels.var(1, ddof=int(unbiased)), rtol=1e-5)


def test_pooled_does_not_depend_on_the_batches() -> None:
    model = conv_net()
    deep, one = copy.deepcopy(model[1:2]), copy.deepcopy(model[1:2])
    x = torch.randn(30, 6, 4, 4) + torch.arange(30).view(-1, 1, 1, 1)
    swa_fast.update_bn(x.split([1, 2, 3, 4, 20]), deep, estimator="pooled")
    swa_fast.update_bn([x], one, estimator="pooled")
    for ours, expected in zip(of_module(deep[0]), of_module(one[0]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_backends_agree(estimator: str) -> None:
    model = Residual()
    batches = drifting_batches((3, 8, 8), (8, 8, 5))
    reference = copy.deepcopy(model)
    report = swa_fast.update_bn(batches, reference, estimator=estimator, backend="reference")
    assert report.backend == "reference"
    assert swa_fast.update_bn(batches, model, estimator=estimator).backend in ("cpu", "reference")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- batches


class TakesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = batch["x"]
        return self.bn(x[0] if isinstance(x, list | tuple) else x)


class Movable:
    """A user's batch object, of which only ``to`` is known."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.moved_to: list[torch.device] = []

    def to(self, device: torch.device) -> Movable:
        self.moved_to.append(device)
        return self


Pair = namedtuple("Pair", "x y")
COLUMNS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("batch", "device"),
    [
        ({"x": COLUMNS, "name": "a"}, None),
        ({"x": COLUMNS, "name": "a"}, "cpu"),
        (OrderedDict(x=[COLUMNS, None]), "cpu"),
        ([{"x": (COLUMNS, 3)}, torch.zeros(2)], "cpu"),
        (UserDict({"x": COLUMNS}), None),
    ],
    ids=["dict", "dict, device", "list in OrderedDict", "dict and label", "mapping"],
)
def test_structured_batches(batch: Any, device: str | None) -> None:
    model = TakesDict()
    report = swa_fast.update_bn([batch], model, device)
    assert model.bn.running_mean.tolist() == [2.0, 3.0]
    assert report.samples == 2


def test_tensors_in_any_structure_are_moved() -> None:
    seen: list[Any] = []
    x = torch.randn(3, 2, device="cpu")
    batch = Pair({"a": [x, ("b", x)]}, 3)
    model = nn.BatchNorm1d(2)

    def call(model: nn.Module, moved: Any) -> None:
        seen.append(moved)
        model(x)

    swa_fast.update_bn([batch], model, "cpu", call=call)
    (moved,) = seen
    assert isinstance(moved, Pair) and moved.y == 3 and moved.x["a"][1][0] == "b"
    meta = batches_module.move(batch, torch.device("meta"), False)
    assert meta.x["a"][0].is_meta and meta.x["a"][1][1].is_meta


def test_batch_object_that_can_be_moved() -> None:
    class Takes(TakesDict):
        def forward(self, batch: Any) -> Tensor:
            return self.bn(batch.x)

    model, batch = Takes(), Movable(COLUMNS)
    report = swa_fast.update_bn([batch], model, "cpu")
    assert batch.moved_to == [torch.device("cpu")] and report.samples == 2
    assert model.bn.running_mean.tolist() == [2.0, 3.0]


def test_call_gets_the_whole_batch_and_the_inner_model() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def encode(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.bn(x * scale)

    averaged = swa_fast.AveragedModel(TwoInputs())
    batches = [(COLUMNS, torch.tensor(2.0))]
    swa_fast.update_bn(batches, averaged, call=lambda model, batch: model.encode(*batch))
    assert averaged.module.bn.running_mean.tolist() == [4.0, 6.0]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ("text", "found str in batch 1"),
        (["a", COLUMNS], "found a list of Tensor, str in batch 1"),
        ([], "found an empty list in batch 1"),
        ({"x": "a", "y": 3}, "found a dict of int, str in batch 1"),
    ],
    ids=str,
)
def test_batch_without_a_tensor(batch: Any, found: str) -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(TypeError, match=f"loader: expected batches .* {found}"):
        swa_fast.update_bn([COLUMNS, batch], model)
    assert model.num_batches_tracked == 0


# ------------------------------------------------------------------------------ layers and wrappers


@pytest.mark.parametrize("wrap", [lambda m: m, swa_fast.AveragedModel, swa_utils.AveragedModel])
def test_frozen_layers_stay_frozen(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = conv_net().train()
    plain[1].eval()
    plain[1].running_mean.fill_(3)
    model = wrap(plain)
    frozen, live = layers_of(model)
    seen: list[bool] = []
    frozen.register_forward_hook(lambda module, args, y: seen.append(bool((y < 0).all())))
    report = swa_fast.update_bn([0.01 * torch.randn(4, 3, 8, 8)] * 2, model)
    assert report.frozen == ("1",) and report.layers == ("5",)
    assert frozen.running_mean.tolist() == [3] * 6 and frozen.num_batches_tracked == 0
    assert seen == [True, True]  # normalised by its own mean of 3
    assert live.num_batches_tracked == 2
    assert [layer.training for layer in (frozen, live)] == [False, True]


def test_model_in_eval_mode_is_updated_as_a_whole() -> None:
    model = conv_net().eval()
    report = swa_fast.update_bn([torch.randn(4, 3, 8, 8)], model)
    assert report.layers == ("1", "5") and report.frozen == ()
    assert not any(module.training for module in model.modules())


def test_a_models_own_train_may_keep_layers_frozen() -> None:
    class Detector(nn.Sequential):
        def train(self, mode: bool = True) -> Detector:
            super().train(mode)
            self[0].eval()
            return self

    model = Detector(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    assert swa_fast.update_bn([COLUMNS], model).frozen == ("0",)


def test_all_frozen_is_said_and_the_loader_not_read(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2).eval())
    model.training = True
    with caplog.at_level(logging.WARNING, "swa_fast"):
        report = swa_fast.update_bn(broken_loader(), model)
    assert report.frozen == ("0",) and report.batches == 0
    assert "all 1 BatchNorm layers are in eval mode" in caplog.text


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_emulated_bf16_is_advised_against_once(
    has_bf16: bool, dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run._warn_of_bf16.cache_clear()
    monkeypatch.setattr(run, "_has_bf16", lambda: has_bf16)
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    batches = [torch.randn(8, 4)]
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with caplog.at_level(logging.WARNING, "swa_fast"), autocast:
        for _ in range(2):
            swa_fast.update_bn(batches, model)
    slow = dtype == torch.bfloat16 and not has_bf16
    assert caplog.text.count("for which this CPU has no instructions") == slow


def test_unused_layers_keep_their_statistics() -> None:
    model = Shared()
    model.unused.running_mean.fill_(7)
    report = swa_fast.update_bn([torch.randn(8, 4)], model)
    assert report.layers == ("bn",) and report.unused == ("unused",)
    assert model.unused.running_mean.tolist() == [7] * 4
    assert model.bn.num_batches_tracked == 2


def test_layer_used_in_some_batches_only() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.large = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            return self.large(y) if len(x) > 4 else y

    ours = Sometimes()
    theirs = copy.deepcopy(ours)
    batches = drifting_batches((2,), (4, 4, 4, 8, 4, 8))
    swa_fast.update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    assert ours.large.num_batches_tracked == 2
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])


def test_lazy_modules() -> None:
    def make(lazy: bool) -> nn.Module:
        return nn.Sequential(
            nn.LazyConv2d(4, 3) if lazy else nn.Conv2d(3, 4, 3),
            nn.LazyBatchNorm2d() if lazy else nn.BatchNorm2d(4),
            nn.ReLU(),
        )

    ours, theirs = make(True), make(False)
    batches = drifting_batches((3, 6, 6), (4, 4, 3))
    report = swa_fast.update_bn(iter(batches), ours, max_batches=3)
    assert report.batches == 3 and report.layers == ("1",)
    theirs.load_state_dict(
        {**theirs.state_dict(), "0.weight": ours[0].weight, "0.bias": ours[0].bias}
    )
    swa_utils.update_bn(batches, theirs)
    torch.testing.assert_close(of_module(ours[1]), of_module(theirs[1]))
    assert ours[1].num_batches_tracked == 3


def test_sync_batch_norm_without_other_ranks() -> None:
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(conv_net())
    theirs = copy.deepcopy(ours)
    batches = drifting_batches((3, 8, 8), (8, 8, 4))
    assert swa_fast.update_bn(batches, ours).backend in ("cpu", "reference")
    swa_utils.update_bn(batches, theirs)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sync_batch_norm_keeps_its_own_forward(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranks need several GPUs: here a layer only believes that there are others."""
    monkeypatch.setattr(layers, "_synchronises", lambda layer: isinstance(layer, nn.SyncBatchNorm))
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(conv_net())
    theirs = copy.deepcopy(ours)
    batches = drifting_batches((3, 8, 8), (8, 8, 4))
    if estimator != "torch":
        with pytest.raises(ValueError, match=r"layer 1: SyncBatchNorm .* needs group="):
            swa_fast.update_bn(batches, ours, estimator=estimator)
        return
    with pytest.raises(ValueError, match=r"layer 1: SyncBatchNorm .* tolerance="):
        swa_fast.update_bn(batches, ours, tolerance=0.1)
    swa_fast.update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])
    assert [layer.momentum for layer in layers_of(ours)] == [0.1, None]


@pytest.mark.parametrize("part", ["whole", "submodule", "in place", "averaged"])
def test_compiled_model(part: str) -> None:
    ours = conv_net()
    theirs = copy.deepcopy(ours)
    batches = drifting_batches((3, 8, 8), (16, 16, 5))
    compiled = ours
    if part == "whole":
        compiled = torch.compile(ours, backend="eager")
    elif part == "submodule":
        ours[1] = torch.compile(ours[1], backend="eager")
    elif part == "averaged":
        compiled = swa_fast.AveragedModel(torch.compile(ours, backend="eager"))
        ours = compiled.module._orig_mod
    else:
        ours.compile(backend="eager")
    with torch.no_grad():
        compiled(batches[0])
    swa_fast.update_bn(batches, compiled)
    swa_utils.update_bn(batches, theirs)
    for value, expected in zip(
        ours.state_dict().values(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected)
    with torch.no_grad():
        compiled(batches[0])  # and it still runs


@pytest.mark.parametrize("wrapper", ["data_parallel", "averaged", "torch_averaged"])
def test_wrapped_model(wrapper: str) -> None:
    model = conv_net()
    expected = copy.deepcopy(model)
    batches = drifting_batches((3, 8, 8), (8, 8))
    wrap = {
        "data_parallel": nn.DataParallel,
        "averaged": swa_fast.AveragedModel,
        "torch_averaged": swa_utils.AveragedModel,
    }[wrapper]
    wrapped = wrap(model)
    before = state(model)
    report = swa_fast.update_bn(batches, wrapped)
    assert report.layers == ("1", "5")
    swa_utils.update_bn(batches, expected)
    for inner, outer in zip(layers_of(wrapped), layers_of(expected), strict=True):
        torch.testing.assert_close(of_module(inner), of_module(outer))
    if wrapper != "data_parallel":
        assert_same_state(model, before)


def test_averaged_model_can_be_updated_afterwards() -> None:
    model = conv_net()
    averaged = swa_fast.AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
        swa_fast.update_bn([torch.randn(8, 3, 8, 8)], averaged)
    assert averaged.module[1].num_batches_tracked == 1 and averaged.n_averaged == 2


# ---------------------------------------------------------------------------------- how it computes


def test_autocast_is_the_callers() -> None:
    model = conv_net()
    theirs = copy.deepcopy(model)
    seen: list[torch.dtype] = []
    model[2].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    batches = [torch.randn(32, 3, 8, 8) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        swa_fast.update_bn(batches, model)
        swa_utils.update_bn(batches, theirs)
    assert set(seen) == {torch.bfloat16}
    for ours, expected in zip(layers_of(model), layers_of(theirs), strict=True):
        torch.testing.assert_close(of_module(ours), of_module(expected), rtol=2e-2, atol=2e-2)


def test_no_autograd_graph() -> None:
    model = conv_net()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, y: seen.append(y))
    swa_fast.update_bn([torch.randn(4, 3, 8, 8)], model)
    assert seen[0].grad_fn is None and not seen[0].requires_grad
    model(torch.randn(4, 3, 8, 8)).sum().backward()  # ordinary tensors everywhere


class SeesFormat(nn.Module):
    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.flatten = flatten
        self.channels_last: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.channels_last.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.flatten(self.bn(self.conv(x)))


def test_images_are_channels_last_on_the_cpu() -> None:
    batches = [torch.randn(4, 3, 6, 6)] * 2
    model = SeesFormat(lambda x: x.flatten(1))
    swa_fast.update_bn(batches, model)
    swa_fast.update_bn(batches, model, channels_last=False)
    assert model.channels_last == [True, True, False, False]
    # By view(), which needs the other format.
    model = SeesFormat(lambda x: x.view(len(x), -1))
    swa_fast.update_bn(batches, model)
    assert model.channels_last == [True, False, False]
    assert model.bn.num_batches_tracked == 2
    expected = nn.Sequential(copy.deepcopy(model.conv), nn.BatchNorm2d(4))
    swa_utils.update_bn(batches, expected)
    torch.testing.assert_close(of_module(model.bn), of_module(expected[1]))


def test_a_call_that_turns_gradients_on() -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)

    ours, theirs = conv_net(), conv_net()
    theirs.load_state_dict(ours.state_dict())
    batches = drifting_batches((3, 8, 8), (4, 4, 4))
    swa_fast.update_bn(batches, ours, call=call)
    swa_utils.update_bn(batches, theirs)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_is_replaced_between_batches(name: str) -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            setattr(self.first, name, nn.Parameter(torch.full((3,), float(self.forwards))))
            return self.second(self.first(x))

    ours, theirs = Changes(), Changes()
    batches = drifting_batches((3,), (8, 8, 8))
    swa_fast.update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])


def test_inputs_of_every_batch_are_checked() -> None:
    model = nn.BatchNorm1d(3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"x: expected dtype .*, found int64"):
        swa_fast.update_bn([torch.randn(4, 3), torch.ones(4, 3, dtype=torch.int64)], model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -------------------------------------------------------------------------- how much of the loader


def test_max_batches_reads_no_more() -> None:
    model = nn.BatchNorm1d(2)
    batches = iter([COLUMNS] * 5)
    report = swa_fast.update_bn(batches, model, max_batches=2)
    assert report.batches == 2 and model.num_batches_tracked == 2
    assert len(list(batches)) == 3


# ----------------------------------------------------------------------------------- the report


def test_report() -> None:
    model = Shared()
    batches = drifting_batches((4,), (8, 8, 4))
    report = swa_fast.update_bn(batches, model, estimator="pooled")
    assert (report.estimator, report.batches, report.samples) == ("pooled", 3, 20)
    assert report.seconds > 0
    text = str(report)
    for part in ("1 layers from 20 samples in 3 batches", "estimator pooled", "unused: unused"):
        assert part in text
    assert repr(report).startswith("BNReport(estimator='pooled'")
    one = swa_fast.update_bn(batches[:1], nn.BatchNorm1d(4))
    assert one.mean_error is None and one.var_error is None and "error" not in str(one)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    swa_fast.update_bn([COLUMNS] * 3, nn.BatchNorm1d(2), progress=True)
    assert "BatchNorm statistics" in (text := capsys.readouterr().err) and "3/3" in text
    swa_fast.update_bn(iter([COLUMNS] * 3), nn.BatchNorm1d(2), progress=True)
    assert "3batch" in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_tqdm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match="pip install tqdm"):
        swa_fast.update_bn([COLUMNS], nn.BatchNorm1d(2), progress=True)


# ------------------------------------------------------------------------------------- bad input


def broken_loader() -> Iterator[Tensor]:
    yield torch.randn(4, 3, 8, 8)
    raise OSError("disk gone")


def interrupted_loader() -> Iterator[Tensor]:
    yield torch.randn(4, 3, 8, 8)
    raise KeyboardInterrupt("by hand")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (broken_loader, OSError, "disk gone"),
        (interrupted_loader, KeyboardInterrupt, "by hand"),
        (lambda: [], ValueError, "loader: expected at least one batch, found none"),
        # A last batch of one sample has no variance.
        (
            lambda: [torch.randn(4, 3, 8, 8), torch.randn(1, 3, 8, 8)],
            ValueError,
            r"layer 5: expected more than 1 value per channel, found input of shape \(1, 5\) in "
            "batch 1",
        ),
        (lambda: [torch.randn(4, 2, 8, 8)], RuntimeError, "channels"),
        (lambda: [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 9, 8)], RuntimeError, "mat1"),
        (lambda: [torch.randn(4, 3, 8, 8), "text"], TypeError, "found str in batch 1"),
        (
            lambda: [torch.randn(4, 3, 8, 8), torch.full((4, 3, 8, 8), math.nan)],
            FloatingPointError,
            r"layer 1: expected finite activations, .* first of 2",
        ),
        (lambda: [torch.full((4, 3, 8, 8), math.inf)], FloatingPointError, "layer 1"),
    ],
    ids=[
        "loader raises", "interrupt", "empty", "batch of one", "wrong channels", "wrong size",
        "no tensor", "nan", "inf",
    ],
)  # fmt: skip
@pytest.mark.parametrize("own_forward", [False, True])
def test_failure_leaves_the_model_as_it_was(
    loader: Callable[[], Any], error: type[BaseException], message: str, own_forward: bool
) -> None:
    model = conv_net().eval()
    if own_forward:
        model[1].__class__ = OwnForward
    swa_fast.update_bn([torch.randn(4, 3, 8, 8)], model)
    before, buffers = state(model), dict(model.named_buffers())
    with pytest.raises(error, match=message):
        swa_fast.update_bn(loader(), model, "cpu")
    assert_same_state(model, before)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.1 and model[5].momentum is None
    assert_clean(model)


def test_batch_of_one_is_fine_for_pooled() -> None:
    model = nn.BatchNorm1d(1)
    batches = [torch.tensor(b).view(-1, 1) for b in ([1.0, 2.0], [6.0])]
    swa_fast.update_bn(batches, model, estimator="pooled")
    assert model.running_mean.item() == pytest.approx(3.0)
    assert model.running_var.item() == pytest.approx(7.0)
    with pytest.raises(ValueError, match="more than 1 value per channel in the whole pass"):
        swa_fast.update_bn(batches[1:], model, estimator="pooled")
    assert model.running_var.item() == pytest.approx(7.0)


def test_nan_in_a_later_layer_names_that_layer_at_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    batches = iter([COLUMNS] * 3)
    with pytest.raises(FloatingPointError, match=r"layer 2: .* first of 1"):
        swa_fast.update_bn(batches, model)
    assert len(list(batches)) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"estimator": "mean"}, ValueError, "estimator: expected one of torch, weighted, pooled"),
        ({"unbiased": False}, ValueError, "unbiased=False: expected estimator='pooled'"),
        ({"max_batches": 0}, ValueError, "max_batches: expected 1 or more, found 0"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a positive number, found 0.0"),
        ({"tolerance": math.nan}, ValueError, "tolerance: expected a positive number"),
        ({"call": 3}, TypeError, "call: expected a function, found int"),
        ({"backend": "tpu"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, swa_fast.BackendError, "serves CUDA tensors"),
        ({"group": True}, ValueError, "group: expected an initialised torch.distributed"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(error, match=message):
        swa_fast.update_bn(broken_loader(), model, **arguments)
    assert model.num_batches_tracked == 0


def test_model_without_batch_norm_does_not_read_the_loader() -> None:
    model = nn.Linear(3, 3)
    before = state(model)
    report = swa_fast.update_bn(broken_loader(), model)
    assert report.batches == 0 and report.layers == ()
    assert "no BatchNorm layers" in str(report)
    assert_same_state(model, before)


# ----------------------------------------------------------------------------------- precise_bn


def test_precise_bn_is_biased_pooled_and_leaves_modes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval(), nn.Dropout(0.5).eval())
    batches = [torch.randn(n, 2) + n for n in (3, 4, 5, 9)]
    assert precise_bn.get_bn_modules(model) == [model[0]]
    report = precise_bn.update_bn_stats(model, batches, num_iters=3)
    values = torch.cat(batches[:3]).double()
    mean, variance = of_module(model[0])
    torch.testing.assert_close(mean.double(), values.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), values.var(0, correction=0), rtol=1e-6, atol=0)
    assert model[1].num_batches_tracked == 0 and report.frozen == ("1",)
    assert [module.training for module in model] == [True, False, False]


def test_precise_bn_hands_the_model_the_whole_batch() -> None:
    class Takes(TakesDict):
        def forward(self, batch: Any) -> Tensor:
            return self.bn(batch[0])

    model = Takes()
    precise_bn.update_bn_stats(model, [(COLUMNS, 1)], num_iters=1)
    assert model.bn.running_mean.tolist() == [2.0, 3.0]


def test_precise_bn_refuses_a_short_loader() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = state(model)
    with pytest.raises(AssertionError, match="num_iters = 3 batches, found 2"):
        precise_bn.update_bn_stats(model, [COLUMNS] * 2, num_iters=3)
    assert_same_state(model, before)
    with pytest.raises(ValueError, match="num_iters: expected 1 or more"):
        precise_bn.update_bn_stats(model, [COLUMNS], num_iters=0)
    with pytest.raises(ValueError, match="progress: expected None or 'tqdm'"):
        precise_bn.update_bn_stats(model, [COLUMNS], num_iters=1, progress="bar")


def test_precise_bn_without_layers_in_training_mode_reads_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    assert precise_bn.get_bn_modules(model) == []
    assert precise_bn.update_bn_stats(model, broken_loader()).batches == 0


def test_precise_bn_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    precise_bn.update_bn_stats(nn.BatchNorm1d(2), [COLUMNS] * 3, num_iters=2, progress="tqdm")
    assert "2/2" in capsys.readouterr().err


# --------------------------------------------------------------------------- counted on a GPU


def counted(update: Callable[[Any, nn.Module], Any], model: nn.Module) -> tuple[Any, Any]:
    """The simulator's counters when the loader has been read, and after the whole function."""
    gpusim = pytest.importorskip("gpusim")
    if not gpusim.active():
        pytest.skip("counts of the simulated GPU")
    batches = [torch.randn(4, 3, 8, 8) for _ in range(5)]
    during: list[Any] = []

    def loader() -> Iterator[Tensor]:
        yield from batches
        during.append(gpusim.counters())

    gpusim.reset()
    update(loader(), model)
    return during[0], gpusim.counters()


def launches(counters: Any, kernel: str) -> int:
    return sum(c["launches"] for name, c in counters["kernels"].items() if kernel in name)


@pytest.mark.gpu
def test_pass_waits_for_nothing_and_merges_in_one_launch_per_batch() -> None:
    """Five batches, four layers, the inputs coming from pageable memory."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3),
            nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(1), nn.Linear(96, 5),
            nn.BatchNorm1d(5),
        ).cuda()  # fmt: skip

    during, after = counted(lambda x, m: swa_utils.update_bn(x, m, "cuda"), make())
    assert during["total"]["host_syncs"] == 25  # each layer and each copy of a batch
    torchs_operators = during["total"]["aten_ops"]

    during, after = counted(lambda x, m: swa_fast.update_bn(x, m, "cuda"), make())
    assert during["total"]["host_syncs"] == 0
    # To raise on NaN, and on buffers that something unseen has written to.
    assert after["total"]["host_syncs"] == 2
    assert launches(after, "merge") == 5
    assert launches(after, "statistics") == 20
    assert launches(after, "normalise") == 20
    total = after["total"]["kernel_launches"] + after["total"]["aten_ops"]
    assert after["total"]["kernel_launches"] == 5 + 20 + 20
    assert total < torchs_operators
    assert "aten::relu" not in after["aten"]  # both are fused

    during, after = counted(lambda x, m: swa_fast.update_bn(x, m, "cuda", tolerance=1e-9), make())
    assert during["total"]["host_syncs"] == 0


@pytest.mark.gpu
def test_tolerance_is_noticed_on_a_gpu() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).cuda()
    batches = [torch.randn(32, 4, device="cpu") for _ in range(80)]
    report = swa_fast.update_bn(batches, model, "cuda", tolerance=0.5)
    assert 10 <= report.batches < 80 and report.converged


@pytest.mark.gpu
def test_the_event_behind_the_errors_is_one_of_their_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one GPU: the stream that it is recorded on is looked up by the errors' own device."""
    asked: list[Any] = []
    current = torch.cuda.current_stream

    def current_stream(device: Any = None) -> torch.cuda.Stream:
        asked.append(device)
        return current(device)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    errors = torch.tensor([0.5, 0.25]).cuda()
    found, event = convergence._copy_to_host(errors)
    assert event is not None and event.device == errors.device == torch.device("cuda", 0)
    assert asked == [errors.device]
    event.synchronize()
    assert found.is_pinned() and found.tolist() == [0.5, 0.25]


@pytest.mark.gpu
def test_nan_on_a_gpu_restores_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).cuda()
    before = state(model)
    for arguments in ({}, {"tolerance": 0.1}):
        with pytest.raises(FloatingPointError, match="layer 0"):
            swa_fast.update_bn([torch.full((8, 4), math.nan)] * 9, model, "cuda", **arguments)
        assert_same_state(model, before)
