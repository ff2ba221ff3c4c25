"""REPAIR: a merged network gets the statistics of activations that its endpoints have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import unwrap
from .options import Call
from .update import update_bn

__all__ = ["RepairReport", "repair"]

_EPS = 1e-12  # a channel without variance is not divided by zero


@dataclass(frozen=True)
class RepairReport:
    """What :func:`repair` did.

    Attributes:
        layers: names of the layers whose weights and biases were changed; without BatchNorm.
        normalised: names of the BatchNorm layers whose statistics were estimated anew.
        batches: read in each pass.
        mean_error: how far the worst channel's mean was from its goal when the last pass corrected
            it, in standard deviations; None with BatchNorm.
        std_error: the same of the standard deviation, relative to it.
    """

    layers: tuple[str, ...]
    normalised: tuple[str, ...]
    batches: int
    mean_error: float | None
    std_error: float | None


class _Measured(nn.Module):
    """A layer, and behind it a BatchNorm whose statistics are those of the layer's output. With a
    goal, a mean and a standard deviation for each channel, it gives the output these."""

    def __init__(self, layer: nn.Module, goal: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Of shape [values, channels, ...] whatever the layer puts out.
        self.norm = nn.BatchNorm1d(
            weight.shape[0], eps=_EPS, device=weight.device, dtype=torch.float64
        )
        self.normalises = goal is not None
        if goal is not None:
            self.norm.bias.copy_(goal[0])
            self.norm.weight.copy_(goal[1])
        self.linear = isinstance(layer, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        flat = y.reshape(-1, y.shape[-1]) if self.linear else y.flatten(2)
        normalised: Tensor = self.norm(flat)
        return normalised.reshape(y.shape) if self.normalises else y

    def found(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the layer's output."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        return self.norm.running_mean, self.norm.running_var.sqrt()


class _Kept:
    """All of a network that repair may touch."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.modes = [(module, module.training) for module in network.modules()]
        self.children = [(m, dict(m._modules)) for m in network.modules()]
        found = [network.get_submodule(name) for name in layers]
        self.biases = [(layer, layer._parameters["bias"]) for layer in found]
        tensors: list[Tensor] = [p for x in found for p in x.parameters(recurse=False)]
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                tensors += module.buffers(recurse=False)
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_structure_back(self) -> None:
        """Modules and modes."""
        for module, children in self.children:
            module._modules.update(children)
        for module, mode in self.modes:
            module.training = mode

    def put_back(self) -> None:
        self.put_structure_back()
        for layer, bias in self.biases:
            layer._parameters["bias"] = bias
        for tensor, value in self.values:
            tensor.copy_(value)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _check(
    model: nn.Module, others: Sequence[nn.Module], kinds: tuple[type[nn.Module], ...]
) -> list[str]:
    """Names of the layers to re-normalise.

    Raises:
        ValueError: endpoints that do not fit, layers that share a weight, or no layer.
    """
    names: list[str] = []
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        if type(layer) not in kinds:
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if id(weight) in owners or not name:
            raise ValueError(
                f"layers: {name or 'the model itself'} shares its weight with "
                f"{owners.get(id(weight), 'nothing')}, or is no layer within a network"
            )
        owners[id(weight)] = name
        names.append(name)
        for i, other in enumerate(others):
            theirs = dict(other.named_modules()).get(name)
            found = getattr(theirs, "weight", None)
            if type(theirs) is not type(layer) or found is None or found.shape != weight.shape:
                raise ValueError(f"endpoints[{i}]: expected {name} to be {layer}, found {theirs}")
    if not names:
        kinds_ = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"layers: expected a layer of type {kinds_}, found none")
    return names


@torch.no_grad()
def repair(
    merged: nn.Module,
    endpoints: Sequence[nn.Module],
    loader: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    layers: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Linear),
    passes: int = 2,
    device: int | str | torch.device | None = None,
    max_batches: int | None = None,
    call: Call | None = None,
    backend: str | None = None,
) -> RepairReport:
    r"""Gives the channels of a merged network the mean and standard deviation that its endpoints'
    have on average, where averaging weights made their variance collapse.

    For every channel of every layer, with the endpoints' means :math:`\mu_i` and standard
    deviations :math:`s_i` over all of the data, the weights :math:`\alpha_i`, and the merged
    network's :math:`\mu` and :math:`s` when the layers before are repaired:

    .. math::
        \mu^* = \sum_i \alpha_i \mu_i \qquad s^* = \sum_i \alpha_i s_i \qquad
        W' = W\,\frac{s^*}{s} \qquad b' = (b - \mu)\,\frac{s^*}{s} + \mu^*

    A channel without variance keeps its scale. A merged network with BatchNorm is re-normalised by
    that: its statistics are estimated anew by :func:`update_bn` with the pooled estimator, which is
    all that is done; the endpoints are then not run.

    One pass for each endpoint, and ``passes`` for the merged network: in the first one its layers
    are normalised by the statistics of each batch, in later ones by what was found. Endpoints are
    left as they were. So is, whatever raises, the merged network.

    Args:
        merged: changed in place, without new modules; a layer without a bias gets one.
        endpoints: the networks it is merged of, of its architecture.
        loader: batches as for :func:`update_bn`, read for each pass: not an iterator.
        weights: :math:`\alpha`, of sum 1; None weighs all alike.
        layers: which modules are re-normalised, exactly these types.
        passes: at least 1. Each brings the deeper layers closer to their goals.
        device: where batches are moved before a forward.
        max_batches: read no more than this many batches in each pass.
        call: as for :func:`update_bn`.
        backend: as for :func:`update_bn`.

    Returns:
        What was done.

    Raises:
        TypeError: ``loader`` is an iterator, which would end with the first pass.
        ValueError: no endpoint, an endpoint of another architecture, weights of another number or
            sum, ``passes`` below 1, no layer, or layers that share a weight.
        FloatingPointError: activations that are not finite.

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
    ICLR 2023.
    """
    model = unwrap(merged)
    others = [unwrap(endpoint) for endpoint in endpoints]
    if isinstance(loader, Iterator):
        raise TypeError("loader: expected one that is read several times, found an iterator")
    if not others:
        raise ValueError("endpoints: expected at least one network, found none")
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, found {passes}")
    alphas = [1 / len(others)] * len(others) if weights is None else [float(w) for w in weights]
    if len(alphas) != len(others) or not math.isclose(math.fsum(alphas), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"weights: expected {len(others)} of sum 1, found {alphas} of sum {math.fsum(alphas)}"
        )
    options: dict[str, Any] = {
        "estimator": "pooled",
        "max_batches": max_batches,
        "call": call,
        "backend": backend,
    }
    if any(_has_statistics(module) for module in model.modules()):
        report = update_bn(loader, model, device, **options)
        return RepairReport((), report.layers, report.batches, None, None)

    names = _check(model, others, layers)
    kept = [_Kept(network, names) for network in (model, *others)]
    batches = 0

    def measure(
        network: nn.Module, goals: dict[str, tuple[Tensor, Tensor]] | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        nonlocal batches
        network.eval()
        wrapped = {}
        for name in names:
            prefix, _, last = name.rpartition(".")
            parent = network.get_submodule(prefix)
            wrapped[name] = _Measured(parent._modules[last], goals and goals[name])  # type: ignore[arg-type]
            parent._modules[last] = wrapped[name]
        # Training for the layers that measure alone: a model in training mode is left as it is.
        network.training = True
        batches = update_bn(loader, network, device, unbiased=False, **options).batches
        return {name: each.found() for name, each in wrapped.items()}

    try:
        goals: dict[str, tuple[Tensor, Tensor]] = {}
        for alpha, other, state in zip(alphas, others, kept[1:], strict=True):
            for name, (mean, std) in measure(other, None).items():
                before = goals.get(name, (torch.zeros_like(mean), torch.zeros_like(std)))
                goals[name] = before[0] + alpha * mean, before[1] + alpha * std
            state.put_structure_back()
        mean_error = std_error = 0.0
        for number in range(passes):
            found = measure(model, goals if number == 0 else None)
            kept[0].put_structure_back()
            errors = [
                _correct(model.get_submodule(name), found[name], goals[name]) for name in names
            ]
            mean_error, std_error = (max(column) for column in zip(*errors, strict=True))
        return RepairReport(tuple(names), (), batches, mean_error, std_error)
    except BaseException:
        for state in kept:
            state.put_back()
        raise


def _correct(
    layer: nn.Module, found: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Moves a layer's output from the statistics found to the goal; returns how far it was."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    (mean, std), (goal_mean, goal_std) = (
        tuple(t.to(weight.device) for t in pair) for pair in (found, goal)
    )
    varies = std > 10 * math.sqrt(_EPS)
    scale = torch.where(varies, goal_std / std, torch.ones_like(std))
    shift = bias.double() if isinstance(bias, Tensor) else torch.zeros_like(mean)
    weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    moved = ((shift - mean) * scale + goal_mean).to(weight.dtype)
    if isinstance(bias, Tensor):
        bias.copy_(moved)
    else:
        layer._parameters["bias"] = nn.Parameter(moved, requires_grad=weight.requires_grad)
    unit = torch.where(varies, goal_std.clamp(min=math.sqrt(_EPS)), torch.ones_like(std))
    mean_error = float(((mean - goal_mean).abs() / unit).max())
    std_error = float((torch.where(varies, std - goal_std, 0.0 * std).abs() / unit).max())
    return mean_error, std_error
