"""The models whose weights the benchmarks average: real modules, random weights, no training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from swa_fast.train.models.preresnet import PreResNet

__all__ = ["GROWTH", "MODELS", "make_model", "tensors_of_equal_size"]


def _vgg16() -> nn.Module:
    """VGG-16 of the SWA paper for 100 classes of 32x32 images: no BatchNorm, 15.3 million
    parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for planes in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.ReLU()]
        channels = planes
    head = [nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 100)]
    return nn.Sequential(*layers, *head)


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
    return nn.ParameterList(torch.empty(elements // count) for _ in range(count))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "PreResNet-20": lambda: PreResNet(20),
    "PreResNet-164": lambda: PreResNet(164),
    "VGG-16": _vgg16,
    "WRN-28-10": _wide_resnet_28_10,
    "ResNet-50": lambda: _torchvision("resnet50"),
    "ViT-B/16": lambda: _torchvision("vit_b_16"),
    "ViT-L/16": lambda: _torchvision("vit_l_16"),
    "10,000 tiny tensors": lambda: tensors_of_equal_size(10_000, 640_000),
}

# Time against the number of elements and against the number of tensors.
GROWTH: dict[str, Callable[[], nn.Module]] = {
    **{
        f"10^{exponent} in 1 tensor": lambda e=exponent: tensors_of_equal_size(1, 10**e)  # type: ignore[misc]
        for exponent in range(3, 9)
    },
    **{
        f"10^7 in {count:,} tensors": lambda c=count: tensors_of_equal_size(c, 10**7)  # type: ignore[misc]
        for count in (10, 100, 1000, 10_000)
    },
    "494 in 494 tensors": lambda: tensors_of_equal_size(494, 494),
}


def make_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with random values in every parameter and buffer of floating type, so that no two
    could be taken for each other. Initialisations, slow for large models, are not run."""
    make = MODELS.get(name) or GROWTH[name]
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
            else:
                buffer.fill_(7)
    return model
