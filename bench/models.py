"""The models whose weights the benchmarks average: real modules, random weights, no training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from swa_fast.train.models.preresnet import PreResNet

__all__ = ["MODELS", "tensors_of_equal_size"]


def _wide_resnet_28_10() -> nn.Module:
    """The layers of WRN-28-10 (Zagoruyko and Komodakis, 2016) in order, 36.5 million parameters."""

    def block(channels: int, planes: int, stride: int) -> nn.Module:
        layers = [
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, planes, 3, padding=1, bias=True),
            nn.BatchNorm2d(planes),
            nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=True),
        ]
        if channels != planes:
            layers.append(nn.Conv2d(channels, planes, 1, stride=stride, bias=True))
        return nn.Sequential(*layers)

    blocks: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=True)]
    channels = 16
    for planes in (160, 320, 640):
        for _ in range(4):
            blocks.append(block(channels, planes, 1))
            channels = planes
    return nn.Sequential(*blocks, nn.BatchNorm2d(channels), nn.Linear(channels, 10))


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def tensors_of_equal_size(count: int, elements: int) -> nn.Module:
    """``count`` parameters with ``elements`` elements in total."""
    return nn.ParameterList(torch.randn(elements // count) for _ in range(count))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "PreResNet-164": lambda: PreResNet(164),
    "WRN-28-10": _wide_resnet_28_10,
    "ResNet-50": lambda: _torchvision("resnet50"),
    "ViT-B/16": lambda: _torchvision("vit_b_16"),
}
