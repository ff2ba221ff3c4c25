"""The networks that the trainer knows by name.

All take ``in_channels``, the channels of the images, and ``num_classes``, the number of classes K.
Their input is a float tensor [N, in_channels, H, W], their output logits [N, K].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from .cost import forward_macs
from .imagenet import densenet161, resnet
from .preresnet import PreResNet
from .pyramidnet import PyramidNet
from .shake_shake import ShakeShake
from .vgg import VGG16
from .weights import PRETRAINED, load_pretrained
from .wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "PRETRAINED",
    "VGG16",
    "ModelSpec",
    "PreResNet",
    "PyramidNet",
    "ShakeShake",
    "WideResNet",
    "build_model",
    "forward_macs",
    "load_pretrained",
]


@dataclass(frozen=True)
class ModelSpec:
    """What the trainer knows of a network.

    Attributes:
        name: key of :data:`MODELS`.
        build: constructor; takes in_channels, num_classes and width by keyword.
        width: the paper's width.
        width_unit: what the width counts.
        normalise: name of the images' normalisation in the paper.
        min_size: smallest side of square images that the network is meant for.
        image_size: side of the paper's images.
        batch_norm: whether there is any BatchNorm, so that an average needs new statistics.
    """

    name: str
    build: Callable[..., nn.Module]
    width: int
    width_unit: str
    normalise: str
    min_size: int
    image_size: int = 32
    batch_norm: bool = True


_STAGE = "planes of the first stage"
_VGG = "planes of the first convolution"

#: The networks by name.
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("vgg16", VGG16, 64, _VGG, "imagenet", 32, batch_norm=False),
        ModelSpec("vgg16-bn", partial(VGG16, batch_norm=True), 64, _VGG, "imagenet", 32),
        *(
            ModelSpec(f"preresnet{depth}", partial(PreResNet, depth), 16, _STAGE, "cifar", 8)
            for depth in (8, 14, 20, 56, 110, 164)
        ),
        *(
            ModelSpec(
                f"wrn{depth}-{k}", partial(WideResNet, depth), 16 * k, _STAGE, "cifar", min_size=8
            )
            for depth, k in ((28, 10), (16, 4), (28, 2))
        ),
        ModelSpec(
            "shakeshake26-2x64d",
            partial(ShakeShake, 26),
            64,
            "planes of the first stage's branches",
            "shakeshake",
            min_size=8,
        ),
        ModelSpec(
            "pyramidnet272",
            partial(PyramidNet, 272),
            200,
            "alpha, the planes that the last block has more than the stem",
            "pyramidnet",
            min_size=8,
        ),
        *(
            ModelSpec(
                f"resnet{depth}",
                partial(resnet, depth),
                64,
                "planes of the first stage's 3x3 convolutions",
                "imagenet",
                min_size=32,
                image_size=224,
            )
            for depth in (50, 152)
        ),
        ModelSpec(
            "densenet161",
            densenet161,
            48,
            "growth rate, the channels that every layer adds",
            "imagenet",
            min_size=29,
            image_size=224,
        ),
    )
}


def build_model(
    name: str, *, in_channels: int, num_classes: int, width: int | None = None
) -> nn.Module:
    """A new network with random weights drawn from torch's global generator.

    Args:
        name: a key of :data:`MODELS`.
        in_channels: channels of the images.
        num_classes: length of the output.
        width: in the model's own unit, ``MODELS[name].width_unit``. Default: the paper's.

    Raises:
        ValueError: no model of that name (the message lists all), or a size below the least.
        TrainError: the network is torchvision's, which is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    spec = MODELS[name]
    return spec.build(
        in_channels=in_channels,
        num_classes=num_classes,
        width=spec.width if width is None else width,
    )
