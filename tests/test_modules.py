"""Which model is averaged: of wrappers that forward attributes, of what torch.compile made, and of
children that are called as wrappers are. All tensors of it, and no others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast import SWA, AveragedModel, Averager


class Forwards(nn.Module):
    """A wrapper with layers of its own that answers for the network inside: so do those of PEFT,
    Fabric and RL libraries."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.net(x))
        return y


class Keeps(nn.Module):
    """Its children are called as those of torch's wrappers are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._orig_mod, self.module, self.head = net, nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.module(self._orig_mod(x)))
        return y


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def compiled() -> nn.Module:
    return torch.compile(net(), backend="eager")  # type: ignore[no-any-return]


def by_peft(inside: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=r"0\.(_orig_mod\.)?0")
        wrapped: nn.Module = peft.get_peft_model(nn.Sequential(inside, nn.ReLU()), config)
    return wrapped


def by_fabric(inside: nn.Module) -> nn.Module:
    fabric = pytest.importorskip("lightning.fabric")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = fabric.Fabric(accelerator="cpu", devices=1).setup(inside)
    return module


def by_lightning(inside: nn.Module) -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = inside, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.net(x))

    return Lit()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "forwards": Forwards,
    "children's names": Keeps,
    "peft": by_peft,
    "fabric": by_fabric,
    "lightning": by_lightning,
}


def move(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


@pytest.mark.parametrize("inside", [net, compiled])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_tensor_of_a_wrapped_model(wrapper: str, inside: Callable[[], nn.Module]) -> None:
    model = WRAPPERS[wrapper](inside())
    averager = Averager(model, {"swa": SWA()})
    averaged, by_torch = AveragedModel(model), swa_utils.AveragedModel(copy.deepcopy(model))
    for by in (0, 0.5, 2.5):
        move(model, by)
        averager.update()
        averaged.update_parameters(model)
        by_torch.update_parameters(model)
    expected = dict(by_torch.module.named_parameters())
    assert len(expected) >= 4
    ours = dict(averaged.module.named_parameters())
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(averager.averages["swa"][name], expected[name].detach())
    with averager.applied("swa"):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected[name])


@pytest.mark.parametrize("inside", [net, compiled])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_batch_norm_of_a_wrapped_model(wrapper: str, inside: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    ours = WRAPPERS[wrapper](inside())
    # Fabric's cannot be copied.
    torch.manual_seed(1)
    theirs = WRAPPERS[wrapper](inside())
    theirs.load_state_dict(ours.state_dict())
    batches = [torch.randn(16, 3) for _ in range(3)]
    swa_fast.update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


def flattened(model: nn.LSTM) -> nn.LSTM:
    """As cuDNN wants them, one weight behind the other in one storage: flatten_parameters() does it
    on a GPU."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    at = 0
    for parameter in model.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return model


def places(model: nn.Module) -> list[int]:
    first = next(model.parameters()).data_ptr()
    return [p.data_ptr() - first for p in model.parameters()]


def test_weights_of_recurrent_networks_stay_where_cudnn_wants_them() -> None:
    model = flattened(nn.LSTM(3, 5, num_layers=2))
    expected, start = places(model), next(model.parameters()).data_ptr()
    averaged, averager = AveragedModel(model), Averager(model, {"swa": SWA()})
    averaged.update_parameters(model)
    inside = flattened(averaged.module)  # torch's copy of such a network lies apart
    for by in (0, 1, 2):
        move(model, by)
        averaged.update_parameters(model)
        averager.update()
    with averager.applied("swa"):
        assert places(model) == expected
    with averaged.applied(model):
        torch.testing.assert_close(dict(model.named_parameters()), dict(inside.named_parameters()))
        assert places(model) == expected
    averaged.load_state_dict(averaged.state_dict())
    for network in (model, inside):
        assert places(network) == expected
        assert len({p.untyped_storage().data_ptr() for p in network.parameters()}) == 1
        # What the forward reads are the parameters themselves.
        assert all(a is b for a, b in zip(network._flat_weights, network.parameters(), strict=True))
    assert next(model.parameters()).data_ptr() == start
    x = torch.randn(2, 4, 3)
    with torch.no_grad(), averaged.applied(model):
        torch.testing.assert_close(model(x)[0], averaged(x)[0])
