"""The models whose weights the benchmarks average: real modules, random weights, no training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from swa_fast.train.models import build_model

__all__ = ["GROWTH", "LARGE", "MODELS", "make_model", "tensors_of_equal_size"]


def _paper(name: str, classes: int) -> nn.Module:
    return build_model(name, in_channels=3, num_classes=classes)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def tensors_of_equal_size(count: int, elements: int) -> nn.Module:
    """``count`` parameters with ``elements`` elements in total."""
    return nn.ParameterList(torch.empty(elements // count) for _ in range(count))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "PreResNet-20": partial(_paper, "preresnet20", 10),
    "PreResNet-164": partial(_paper, "preresnet164", 10),
    "VGG-16": partial(_paper, "vgg16", 100),
    "WRN-28-10": partial(_paper, "wrn28-10", 10),
    "ResNet-50": partial(_torchvision, "resnet50"),
    "ViT-B/16": partial(_torchvision, "vit_b_16"),
    "ViT-L/16": partial(_torchvision, "vit_l_16"),
    "10,000 tiny tensors": partial(tensors_of_equal_size, 10_000, 640_000),
}

# For a GPU alone: the weights of a language model of modest size.
LARGE: dict[str, Callable[[], nn.Module]] = {
    "10^9 in 300 tensors": partial(tensors_of_equal_size, 300, 10**9),
}

# Time against the number of elements and against the number of tensors.
GROWTH: dict[str, Callable[[], nn.Module]] = {
    **{
        f"10^{exponent} in 1 tensor": partial(tensors_of_equal_size, 1, 10**exponent)
        for exponent in range(3, 9)
    },
    **{
        f"10^7 in {count:,} tensors": partial(tensors_of_equal_size, count, 10**7)
        for count in (10, 100, 1000, 10_000)
    },
    "494 in 494 tensors": partial(tensors_of_equal_size, 494, 494),
}


def make_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with random values in every parameter and buffer of floating type, so that no two
    could be taken for each other. Initialisations, slow for large models, are not run."""
    make = {**MODELS, **GROWTH, **LARGE}[name]
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
