"""The networks that the trainer knows by name.

All take ``in_channels``, the channels of the images, and ``num_classes``, the number of classes K.
Their input is a float tensor [N, in_channels, H, W], their output logits [N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import TrainError
from ..factories import call_factory, is_factory
from .imagenet import densenet161, resnet
from .residual import PreResNet, PyramidNet, WideResNet
from .shake_shake import ShakeShake
from .vgg import VGG16
from .weights import load_pretrained

__all__ = [
    "MODELS",
    "VGG16",
    "ModelSpec",
    "PreResNet",
    "PyramidNet",
    "ShakeShake",
    "WideResNet",
    "build_model",
    "forward_macs",
    "load_pretrained",
    "spec_of",
]


@dataclass(frozen=True)
class ModelSpec:
    """What the trainer knows of a network.

    Attributes:
        build: constructor; takes in_channels, num_classes and width by keyword.
        width: the paper's width; the constructor tells what it counts.
        normalise: name of the images' normalisation in the paper.
        min_size: smallest side of square images that the network is meant for.
        image_size: side of the paper's images.
        batch_norm: whether there is any BatchNorm, so that an average needs new statistics.
    """

    build: Callable[..., nn.Module]
    width: int
    normalise: str
    min_size: int = 8
    image_size: int = 32
    batch_norm: bool = True


#: The networks by name.
MODELS: dict[str, ModelSpec] = {
    "vgg16": ModelSpec(VGG16, 64, "imagenet", 32, batch_norm=False),
    "vgg16-bn": ModelSpec(partial(VGG16, batch_norm=True), 64, "imagenet", 32),
    **{
        f"preresnet{depth}": ModelSpec(partial(PreResNet, depth), 16, "cifar")
        for depth in (8, 14, 20, 56, 110, 164)
    },
    **{
        f"wrn{depth}-{k}": ModelSpec(partial(WideResNet, depth), 16 * k, "cifar")
        for depth, k in ((28, 10), (16, 4), (28, 2))
    },
    "shakeshake26-2x64d": ModelSpec(partial(ShakeShake, 26), 64, "shakeshake"),
    "pyramidnet272": ModelSpec(partial(PyramidNet, 272), 200, "pyramidnet"),
    "resnet50": ModelSpec(partial(resnet, 50), 64, "imagenet", 32, 224),
    "resnet152": ModelSpec(partial(resnet, 152), 64, "imagenet", 32, 224),
    "densenet161": ModelSpec(densenet161, 48, "imagenet", 29, 224),
}


def spec_of(name: str) -> ModelSpec:
    """What is known of a network of :data:`MODELS`, or of a user's own, which is assumed to have
    BatchNorm."""
    if is_factory(name):
        return ModelSpec(partial(call_factory, "--model", name), 1, "dataset", min_size=1)
    return MODELS[name]


def build_model(
    name: str, *, in_channels: int, num_classes: int, width: int | None = None
) -> nn.Module:
    """A new network with random weights drawn from torch's global generator.

    Args:
        name: a key of :data:`MODELS`, or ``package.module:factory`` of a function that is called
            with those of the other arguments that it takes.
        in_channels: channels of the images.
        num_classes: length of the output.
        width: in the model's own unit, as its constructor tells. Default: the paper's.

    Raises:
        ValueError: no model of that name (the message lists all), or a size below the least.
        TrainError: the network is torchvision's, which is not installed, or a factory's that cannot
            be called.
    """
    if name not in MODELS and not is_factory(name):
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    spec = spec_of(name)
    model = spec.build(
        in_channels=in_channels,
        num_classes=num_classes,
        width=spec.width if width is None else width,
    )
    if not isinstance(model, nn.Module):
        raise TrainError(
            f"--model: expected {name} to return a torch.nn.Module, found {type(model).__name__}"
        )
    return model


def forward_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and linear layers in a forward pass of one image.

    A training step costs about three times as many (forward, and backward to inputs and to
    weights), of two floating-point operations each. Nothing is computed: the pass runs on tensors
    without data and leaves the model and the random state as they are.

    Args:
        model: takes [N, C, H, W].
        input_shape: C, H and W of an image.
    """
    meta = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    # Two images, since BatchNorm refuses to train on a single pixel of a single one.
    images = torch.empty(2, *input_shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, meta, (images,))
    return int(counter.get_total_flops()) // (2 * len(images))
