"""Wide residual networks for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Projection, blocks_per_stage, check_sizes, pixel_mean, three_stages

__all__ = ["WideResNet"]

_STEM_PLANES = 16


class _Block(nn.Module):
    """BN-ReLU-conv3x3, BN-ReLU-conv3x3(stride), added to the shortcut.

    The stride is the second convolution's, unlike in the WRN paper's own code, and all convolutions
    have a bias: so it is in the code of the SWA paper.
    """

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != planes:
            self.downsample = Projection(in_channels, planes, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        out: Tensor = y + self.downsample(x)
        return out


class WideResNet(nn.Module):
    """Wide ResNet for small images, as in the experiments of the SWA paper.

    A 3x3 stem of 16 planes, three stages of n = (depth - 4)/6 blocks with w, 2w and 4w planes (the
    first block of stages 2 and 3 has stride 2), then BN-ReLU, the mean over all positions and a
    linear layer. WRN-d-k is depth d with w = 16k. There is no dropout; all layers start from
    PyTorch's defaults. The last BatchNorm has momentum 0.9, the others 0.1.

    Args:
        depth: number of layers, 6n + 4.
        width: planes w of the first stage; 160 in WRN-28-10.

    Images have 8x8 pixels or more.

    Raises:
        ValueError: a depth that is not of that form, or a size below 1.

    Sources: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146;
    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
    arXiv 1803.05407.
    """

    def __init__(
        self, depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 160
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        blocks = blocks_per_stage(depth, 6, others=4)

        self.conv1 = nn.Conv2d(in_channels, _STEM_PLANES, 3, padding=1)
        stages = three_stages(_Block, _STEM_PLANES, width, blocks)
        self.layer1, self.layer2, self.layer3 = stages
        # Perhaps meant in the opposite convention, but it is what the SWA paper ran. It matters to
        # the running statistics of the plain network alone, not to those that a BN pass computes.
        self.bn = nn.BatchNorm2d(4 * width, momentum=0.9)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x), inplace=True)
        logits: Tensor = self.fc(pixel_mean(x))
        return logits
