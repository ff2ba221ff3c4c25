"""Networks for ImageNet: torchvision's own, so that its weights fit.

torchvision is imported when one is built; without it the trainer's other networks still work. The
stem is built anew for images that have other than three channels.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from ..errors import import_extra
from .layers import check_sizes


def resnet(
    depth: int, *, in_channels: int = 3, num_classes: int = 1000, width: int = 64
) -> nn.Module:
    """torchvision's ResNet of bottlenecks, whose stride is the 3x3 convolution's.

    Args:
        depth: 50, 101 or 152.
        width: planes of the first stage's 3x3 convolutions (torchvision's ``width_per_group``); 64
            in the paper. The stem and the blocks' outputs keep the paper's size.

    Images are meant to have 224x224 pixels.

    Raises:
        ValueError: a size below 1.
        TrainError: torchvision is not installed.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    build = getattr(import_extra("torchvision.models"), f"resnet{depth}")
    model = cast(nn.Module, build(num_classes=num_classes, width_per_group=width))
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def densenet161(*, in_channels: int = 3, num_classes: int = 1000, width: int = 48) -> nn.Module:
    """torchvision's DenseNet-161.

    Args:
        width: growth rate, i.e. channels that every layer adds; 48 in the paper. The stem has twice
            as many.

    Images have 29x29 pixels or more and are meant to have 224x224.

    Raises:
        ValueError: a size below 1.
        TrainError: torchvision is not installed.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """
    check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    model = import_extra("torchvision.models").DenseNet(
        growth_rate=width,
        block_config=(6, 12, 36, 24),
        num_init_features=2 * width,
        num_classes=num_classes,
    )
    if in_channels != 3:
        stem = model.features.conv0 = nn.Conv2d(in_channels, 2 * width, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(stem.weight)
    return cast(nn.Module, model)
