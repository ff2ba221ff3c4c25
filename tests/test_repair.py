"""REPAIR: statistics of a merged network's activations, with and without BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, need
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast import repair, update_bn

backends = pytest.mark.parametrize("backend, device", BACKENDS)


def network(norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    between = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), *between, nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.Dropout(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4),
    ).eval()  # fmt: skip


def merge(networks: list[nn.Sequential], weights: list[float]) -> nn.Sequential:
    merged = copy.deepcopy(networks[0])
    with torch.no_grad():
        for parameters in zip(
            merged.parameters(), *(n.parameters() for n in networks), strict=True
        ):
            parameters[0].copy_(sum(w * p for w, p in zip(weights, parameters[1:], strict=True)))
    return merged


def batches(device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(9)
    return [
        (torch.randn(size, 3, 9, 9).to(device) * 2 + 1, torch.zeros(size))
        for size in (48, 64, 17)
    ]  # fmt: skip


def outputs(model: nn.Sequential, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of every layer, over all of the data: [values, channels] in fp64."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, y, name=name: found.__setitem__(
                name, y.double().movedim(1, -1).reshape(-1, y.shape[1])
            )
        )
        for name, layer in model.named_children()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model.eval()(torch.cat([x for x, _ in data]))
    for hook in hooks:
        hook.remove()
    return found


@backends
def test_channels_reach_their_goals(backend: str, device: str) -> None:
    need(backend, device)
    endpoints = [network(seed=s).to(device) for s in (1, 2)]
    weights = [0.25, 0.75]
    merged = merge(endpoints, weights).train()
    data = batches(device)
    before = [copy.deepcopy(e.state_dict()) for e in endpoints]
    report = repair(merged, endpoints, data, weights=weights, passes=4, backend=backend)
    assert report.layers == ("0", "2", "7") and report.batches == 3
    assert report.normalised == ()
    assert report.mean_error is not None and report.mean_error < 1e-4
    assert [type(m) for m in merged] == [type(m) for m in endpoints[0]] and merged.training
    theirs = [outputs(e, data) for e in endpoints]
    for name, values in outputs(merged, data).items():
        mean = sum(w * t[name].mean(0) for w, t in zip(weights, theirs, strict=True))
        std = sum(w * t[name].std(0, correction=0) for w, t in zip(weights, theirs, strict=True))
        torch.testing.assert_close(values.mean(0), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values.std(0, correction=0), std, rtol=1e-5, atol=1e-5)
    for endpoint, state in zip(endpoints, before, strict=True):
        assert not endpoint.training
        for name, tensor in endpoint.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_one_pass_is_near() -> None:
    """Of 129 images: each batch is normalised by its own statistics."""
    endpoints = [network(seed=s) for s in (1, 2)]
    merged = merge(endpoints, [0.5, 0.5])
    data = batches()
    goal = [outputs(e, data) for e in endpoints]
    collapsed, repaired = outputs(merged, data), None
    repair(merged, endpoints, data, passes=1)
    repaired = outputs(merged, data)
    for name in repaired:
        std = (goal[0][name].std(0) + goal[1][name].std(0)) / 2
        before = ((collapsed[name].std(0) - std) / std).abs().max()
        after = ((repaired[name].std(0) - std) / std).abs().max()
        assert after < 0.05 < before


def test_with_batch_norm_its_statistics_are_estimated() -> None:
    endpoints = [network(True, s) for s in (1, 2)]
    merged = merge(endpoints, [0.5, 0.5])
    expected = copy.deepcopy(merged)
    weight = merged[0].weight.detach().clone()
    data = batches()
    report = repair(merged, endpoints, data)
    update_bn(data, expected, estimator="pooled")
    assert report.normalised == ("1",) and report.layers == () and report.mean_error is None
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])
    assert torch.equal(merged[0].weight, weight)


def test_repair_lowers_the_barrier() -> None:
    """Networks of one initialisation, trained apart on halves of a problem: the loss of their mean
    lies above both, and closer after."""
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    teacher = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        y = teacher(x).argmax(1)

    def student(part: slice, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                            nn.Linear(64, 3))  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
        return net

    endpoints = [student(slice(0, 256), 1), student(slice(256, None), 2)]
    merged = merge(endpoints, [0.5, 0.5])

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(x).argmax(1) == y).float().mean())

    alone = accuracy(merged)
    repair(merged, endpoints, [x], passes=2)
    assert accuracy(merged) > alone
    assert min(map(accuracy, endpoints)) > accuracy(merged)


def test_dead_channels_sequences_and_half_precision() -> None:
    torch.manual_seed(0)
    endpoints = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    for endpoint in endpoints:
        with torch.no_grad():
            endpoint[0].weight[0] = 0
        endpoint.bfloat16()
    merged = merge(endpoints, [0.5, 0.5])
    data = [torch.randn(7, 3, 4).bfloat16() for _ in range(3)]
    repair(merged, endpoints, data)
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in merged.parameters())
    goal = (endpoints[0][0].bias[0] + endpoints[1][0].bias[0]).float() / 2
    torch.testing.assert_close(merged[0].bias[0].float(), goal, rtol=2**-7, atol=0)


def test_what_repair_refuses() -> None:
    net, other = network(), network(seed=1)
    data = batches()
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    for call, error, message in (
        (lambda: repair(net, [], data), ValueError, "endpoints: expected at least one"),
        (lambda: repair(net, [other], iter(data)), TypeError, "found an iterator"),
        (lambda: repair(net, [other], data, weights=[0.5]), ValueError, "of sum 1, found"),
        (lambda: repair(net, [other], data, weights=[0.5, 0.5]), ValueError, "expected 1 of sum"),
        (lambda: repair(net, [other], data, passes=0), ValueError, "passes"),
        (lambda: repair(net, [nn.Linear(3, 3)], data), ValueError, r"endpoints\[0\]: expected 0"),
        (lambda: repair(tied, [tied], data), ValueError, "1 shares its weight with 0"),
        (lambda: repair(nn.Sequential(nn.ReLU()), [other], data), ValueError, "Conv1d, Conv2d"),
        (lambda: repair(net, [other], []), ValueError, "at least one batch"),
    ):
        state = copy.deepcopy(net.state_dict())
        with pytest.raises(error, match=message):
            call()
        assert list(net.state_dict()) == list(state)
        assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())


def test_a_repair_that_fails_leaves_all_as_it_was() -> None:
    """Before every line of the module itself, and for a batch that cannot be served."""
    endpoints = [nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).eval()
                 for _ in range(2)]  # fmt: skip
    merged = merge(endpoints, [0.5, 0.5]).train()
    networks = [merged, *endpoints]
    states = [copy.deepcopy(n.state_dict()) for n in networks]

    def check() -> None:
        for net, state in zip(networks, states, strict=True):
            assert net.training == (net is merged)
            assert list(net.state_dict()) == list(state)
            assert [type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear]
            assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())

    with pytest.raises(RuntimeError):
        repair(merged, endpoints, [torch.randn(4, 3), torch.randn(4, 5)])
    check()
    data = [torch.randn(8, 3)]

    def make() -> tuple[Callable[[], Any], Callable[[], None]]:
        return lambda: repair(merged, endpoints, data, passes=1), check

    assert at_every_line(make, "repair.py") > 50
