"""Forwards that take derivatives through BatchNorm layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import swa_utils

import swa_fast


class Model(nn.Module):
    def __init__(self, around: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Tanh(),
            nn.Linear(8, 3),
        )  # fmt: skip
        self.head = nn.BatchNorm1d(3)
        self.around = around

    def energy(self, x: Tensor) -> Tensor:
        return self.net(x).square().sum()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.around(self, x))  # type: ignore[no-any-return]


def by_the_input(model: Model, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model.energy(x), x)[0]


def twice(model: Model, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(model.energy(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]


def by_the_weights(model: Model, x: Tensor) -> Tensor:
    """A layer whose input needs no gradient, but whose weight does."""
    with torch.enable_grad():
        layer = model.net[3]
        loss = layer(torch.cat([x, x, x], 1)[:, :8]).pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, layer.weight)
    return x + gradient[:3]


def by_torch_func(model: Model, x: Tensor) -> Tensor:
    return torch.func.grad(model.energy)(x)  # type: ignore[no-any-return]


def along_a_direction(model: Model, x: Tensor) -> Tensor:
    return torch.func.jvp(model.net, (x,), (torch.ones_like(x),))[1]  # type: ignore[no-any-return]


def by_dual_numbers(model: Model, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = model.net(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    return tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # how torch differentiates forward
@pytest.mark.parametrize("around", [by_the_input, twice, by_the_weights, by_dual_numbers])
def test_derivatives_in_a_forward(around: Callable[[Model, Tensor], Tensor]) -> None:
    ours = Model(around)
    theirs = copy.deepcopy(ours)
    batches = [torch.randn(8, 3) * (1 + i) + i for i in range(5)]
    swa_fast.update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    for (key, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("by_func", "by_autograd"),
    [(by_torch_func, by_the_input), (along_a_direction, by_dual_numbers)],
)
def test_derivatives_by_torch_func(
    by_func: Callable[[Model, Tensor], Tensor], by_autograd: Callable[[Model, Tensor], Tensor]
) -> None:
    """Which torch's own layers refuse, because they count batches in place."""
    first = Model(by_func)
    second = copy.deepcopy(first)
    second.around = by_autograd
    batches = [torch.randn(8, 3) * (1 + i) + i for i in range(5)]
    for model in (first, second):
        swa_fast.update_bn(batches, model)
    for value, expected in zip(
        first.state_dict().values(), second.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_no_graph_is_kept_where_nobody_asks() -> None:
    seen: list[bool] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad))
    swa_fast.update_bn([torch.randn(4, 3)] * 3, model)
    assert seen == [False] * 3


def test_vmap_is_refused_by_name() -> None:
    def around(model: Model, x: Tensor) -> Tensor:
        return torch.func.vmap(model.head)(torch.stack([x, x]))[0]  # type: ignore[no-any-return]

    model = Model(around)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer head: .*vmap"):
        swa_fast.update_bn([torch.randn(4, 3)], model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
