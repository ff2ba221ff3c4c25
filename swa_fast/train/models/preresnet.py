"""Pre-activation residual networks for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import layers

__all__ = ["PreResNet"]

# From this depth on the residual blocks are bottlenecks, as in the authors' code.
_BOTTLENECK_DEPTH = 44


class _BasicBlock(nn.Module):
    """BN-ReLU-conv3x3(stride), BN-ReLU-conv3x3, added to the shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.downsample = _shortcut(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        out: Tensor = y + self.downsample(x)
        return out


class _Bottleneck(nn.Module):
    """BN-ReLU-conv1x1, BN-ReLU-conv3x3(stride), BN-ReLU-conv1x1 to four times the planes, added to
    the shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * planes
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        y = self.conv3(F.relu(self.bn3(y), inplace=True))
        out: Tensor = y + self.downsample(x)
        return out


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Identity where the shapes agree, else a strided 1x1 convolution of the raw block input."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return layers.Projection(in_channels, out_channels, stride)


class PreResNet(nn.Module):
    r"""Pre-activation ResNet for small images, as in the experiments of the SWA paper.

    A 3x3 stem, three stages of n blocks with w, 2w and 4w planes (the first block of stages 2 and 3
    has stride 2), then BN-ReLU, the mean over all positions and a linear layer. Depths below 44
    use basic blocks, n = (depth - 2)/6; from 44 on bottlenecks, n = (depth - 2)/9, whose output
    has 4 times the planes. Convolutions have no bias and start from a normal distribution with
    standard deviation :math:`\sqrt{2/(k^2\,c_\text{out})}`; BatchNorm starts from scale 1 and
    shift 0; the linear layer keeps PyTorch's default.

    Args:
        depth: number of layers: 6n + 2 below 44, 9n + 2 from 44 on.
        width: planes w of the first stage; 16 in the papers.

    Images have 8x8 pixels or more.

    Raises:
        ValueError: a depth that is not of that form, or a size below 1.

    Sources: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; Izmailov et al.,
    "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
    arXiv 1803.05407.
    """

    def __init__(
        self, depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        layers.check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        block: type[_BasicBlock] | type[_Bottleneck]
        block, per_n = (_Bottleneck, 9) if depth >= _BOTTLENECK_DEPTH else (_BasicBlock, 6)
        blocks = layers.blocks_per_stage(depth, per_n)

        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        stages = layers.three_stages(block, width, width, blocks, block.expansion)
        self.layer1, self.layer2, self.layer3 = stages
        channels = 4 * width * block.expansion
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

        layers.he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x), inplace=True)
        logits: Tensor = self.fc(layers.pixel_mean(x))
        return logits
