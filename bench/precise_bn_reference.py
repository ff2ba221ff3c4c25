"""The algorithm of fvcore's PreciseBN, a competitor where fvcore need not be installed.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576: every layer runs with momentum
1, and after each batch its mean and E[x^2] enter averages weighted by the number of values; the
variance is E[x^2] - mean^2, biased.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["update_bn_stats"]


class _Population:
    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.mean = torch.zeros_like(self.layer.running_mean)
        self.square = torch.zeros_like(self.layer.running_var)
        self.total = 0
        self.values = 0

    def count(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        self.values = x.numel() // x.shape[1]

    def add(self) -> None:
        mean, n = self.layer.running_mean, self.values
        variance = self.layer.running_var * ((n - 1) / n)
        self.total += n
        share = n / self.total
        self.mean += (mean - self.mean) * share
        self.square += (variance + mean * mean - self.square) * share


@torch.no_grad()
def update_bn_stats(model: nn.Module, loader: Iterable[Any], batches: int) -> None:
    """Sets the running statistics of the layers in training mode to those of some batches."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    momenta = [layer.momentum for layer in layers]
    populations = [_Population(layer) for layer in layers]
    hooks = [p.layer.register_forward_pre_hook(p.count) for p in populations]
    try:
        for layer in layers:
            layer.momentum = 1.0
        for batch in itertools.islice(loader, batches):
            model(batch)
            for population in populations:
                population.add()
        for population in populations:
            population.layer.running_mean.copy_(population.mean)
            variance = population.square - population.mean * population.mean
            population.layer.running_var.copy_(variance)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
