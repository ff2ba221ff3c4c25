"""Pyramidal residual networks for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import blocks_per_stage, check_sizes, he_init, pixel_mean

__all__ = ["PyramidNet"]

_STEM_PLANES = 16
_EXPANSION = 4


class _Bottleneck(nn.Module):
    """BN-conv1x1, BN-ReLU-conv3x3(stride), BN-ReLU-conv1x1 to four times the planes, BN, added to
    the input: averaged over 2x2 pixels if strided, with channels of zeros appended."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * planes
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        y = self.bn4(self.conv3(F.relu(self.bn3(y), inplace=True)))
        if self.stride == 2:
            # Sides are rounded up, as by the strided convolution.
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        out: Tensor = y + F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return out


class PyramidNet(nn.Module):
    r"""Pyramidal residual network of bottlenecks for small images.

    A 3x3 stem of 16 planes with BN, three stages of n = (depth - 2)/9 bottlenecks (the first of
    stages 2 and 3 has stride 2), then BN-ReLU, the mean over all positions and a linear layer.
    Every block is a little wider than the one before: block k of all 3n has

    .. math:: p_k = \operatorname{round}(16 + k\,\alpha/(3n)), \quad k = 1, \dots, 3n

    planes and 4 p_k output channels; the shortcuts have no parameters. Convolutions have no bias
    and start from a normal distribution with standard deviation
    :math:`\sqrt{2/(k^2\,c_\text{out})}`; BatchNorm starts from scale 1 and shift 0; the linear
    layer keeps PyTorch's default.

    Args:
        depth: number of layers, 9n + 2.
        width: alpha, the planes that the last block has more than the stem; 200 in the SWA paper.

    Images have 8x8 pixels or more.

    Raises:
        ValueError: a depth that is not of that form, or a size below 1.

    Sources: Han, Kim and Kim, "Deep Pyramidal Residual Networks", CVPR 2017, arXiv 1610.02915;
    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
    arXiv 1803.05407.
    """

    def __init__(
        self, depth: int = 272, *, in_channels: int = 3, num_classes: int = 10, width: int = 200
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        blocks = blocks_per_stage(depth, 9)

        self.conv1 = nn.Conv2d(in_channels, _STEM_PLANES, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_PLANES)
        channels = _STEM_PLANES
        stages = [nn.Sequential() for _ in range(3)]
        for k in range(1, 3 * blocks + 1):
            stage, i = divmod(k - 1, blocks)
            planes = round(_STEM_PLANES + k * width / (3 * blocks))
            stages[stage].append(_Bottleneck(channels, planes, 2 if stage > 0 and i == 0 else 1))
            channels = _EXPANSION * planes
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        x = F.relu(self.bn(x), inplace=True)
        logits: Tensor = self.fc(pixel_mean(x))
        return logits
