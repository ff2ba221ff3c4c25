"""update_bn beside torch's, and what it does when things go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import assert_as_accurate, extended
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast


class Shared(nn.Module):
    """One BatchNorm layer used twice in a forward, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.unused = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(3 * self.bn(x) + 1)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(1),
        nn.Linear(6 * 36, 5), nn.BatchNorm1d(5, momentum=None), nn.Dropout(0.0),
    )  # fmt: skip


MODELS = {
    "conv": (conv_net, (3, 8, 8)),
    "shared": (Shared, (4,)),
    "one_dimensional": (lambda: nn.Sequential(nn.BatchNorm1d(4)), (4, 7)),
    "three_dimensional": (lambda: nn.Sequential(nn.BatchNorm3d(2)), (2, 3, 4, 5)),
    "untracked": (lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), (4,)),
}


def pair(name: str, device: str = "cpu") -> tuple[nn.Module, nn.Module, list[Tensor]]:
    make, shape = MODELS[name]
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    sizes = (16, 16, 16, 5)
    batches = [torch.randn(n, *shape) * (1 + i) + i for i, n in enumerate(sizes)]
    return ours.to(device), theirs.to(device), batches


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_same_as_torch(name: str, device: str) -> None:
    ours, theirs, batches = pair(name, device)
    labelled = [(x, torch.zeros(len(x))) for x in batches]
    swa_fast.update_bn(labelled, ours, device)
    swa_utils.update_bn(labelled, theirs, device)
    exact = {k: v.double() for k, v in theirs.state_dict().items()}
    for key, value in ours.state_dict().items():
        assert_as_accurate(
            [value.double()], [theirs.state_dict()[key].double()], [extended(exact[key])], key
        )
    for ours_bn, theirs_bn in zip(ours.modules(), theirs.modules(), strict=True):
        assert getattr(ours_bn, "momentum", 0) == getattr(theirs_bn, "momentum", 0)


def test_known_values() -> None:
    """One channel, batches of different sizes: means of batch means and of unbiased variances."""
    model = nn.BatchNorm1d(1)
    batches = [[1.0, 2, 3, 4], [2.0, 4, 6, 8], [10.0, 20]]
    swa_fast.update_bn([torch.tensor(b).view(-1, 1) for b in batches], model)
    assert model.running_mean.item() == pytest.approx(7.5)
    assert model.running_var.item() == pytest.approx(19.444444)
    assert model.num_batches_tracked.item() == 3


def test_every_modules_mode_and_momentum_is_restored() -> None:
    model = conv_net().train()
    model[1].eval()
    model[6].eval()
    modes = [m.training for m in model.modules()]
    swa_fast.update_bn([torch.randn(4, 3, 8, 8)], model)
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum == 0.1 and model[5].momentum is None
    assert not model[1]._forward_pre_hooks and not model[5]._forward_pre_hooks


def broken_loader() -> Iterator[Tensor]:
    yield torch.randn(4, 3, 8, 8)
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (broken_loader, OSError, "disk gone"),
        (lambda: [], ValueError, "loader: expected at least one batch, found none"),
        # A last batch of one sample has no variance: the layer refuses it.
        (lambda: [torch.randn(4, 3, 8, 8), torch.randn(1, 3, 8, 8)], ValueError, "more than 1"),
        (lambda: [torch.randn(4, 2, 8, 8)], RuntimeError, "channels"),
        (lambda: [{"x": torch.randn(4, 3, 8, 8)}], TypeError, "found dict in batch 0"),
    ],
    ids=["loader raises", "empty", "batch of one", "wrong input", "dict"],
)
def test_failure_leaves_the_model_as_it_was(loader, error, message) -> None:
    model = conv_net().eval()
    swa_fast.update_bn([torch.randn(4, 3, 8, 8)], model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        swa_fast.update_bn(loader(), model, "cpu")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.1 and not model[1]._forward_pre_hooks


@pytest.mark.parametrize("part", ["whole", "submodule", "in place"])
def test_compiled_model(part: str) -> None:
    ours, theirs, batches = pair("conv")
    compiled = ours
    if part == "whole":
        compiled = torch.compile(ours, backend="eager")
    elif part == "submodule":
        ours[1] = torch.compile(ours[1], backend="eager")
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


def test_model_without_batch_norm_does_not_read_the_loader() -> None:
    swa_fast.update_bn(broken_loader(), nn.Linear(3, 3))


def test_dict_batches_reach_the_model() -> None:
    class TakesDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.bn(batch["x"])

    model = TakesDict()
    swa_fast.update_bn([{"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}], model)
    assert model.bn.running_mean.tolist() == [2.0, 3.0]


def test_averaged_model_gets_its_own_statistics() -> None:
    model = conv_net()
    averaged = swa_fast.AveragedModel(model)
    averaged.update_parameters(model)
    batches = [torch.randn(8, 3, 8, 8) + 2 for _ in range(3)]
    before = model[1].running_mean.clone()
    swa_fast.update_bn(batches, averaged)
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(averaged.module[1].running_mean, before)
