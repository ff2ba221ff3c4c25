"""Pre-activation, wide and pyramidal residual networks for small images: one trunk, three fillings.

Their forms are those of the SWA paper's experiments: Izmailov et al., "Averaging Weights Leads to
Wider Optima and Better Generalization", UAI 2018, arXiv 1803.05407. Images have 8x8 pixels or more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Projection, add_, blocks_per_stage, check_sizes, he_init, pixel_mean

# From this depth on the residual blocks of PreResNet are bottlenecks, as in the authors' code.
_BOTTLENECK_DEPTH = 44


def doubled(width: int, blocks: int) -> list[int]:
    """Planes of three stages of as many blocks: ``width``, twice and four times that."""
    return [width] * blocks + [2 * width] * blocks + [4 * width] * blocks


class ResidualNet(nn.Module):
    """A 3x3 stem, three stages of n blocks each (the first of stages 2 and 3 has stride 2), then
    BN-ReLU, the mean over all positions, and a linear layer.

    Args:
        block: makes one, given its input channels, planes and stride.
        planes: of every block.
        stem: planes of the stem.
        expansion: a block's output channels for each of its planes.
        bias: whether the stem has a bias.
        stem_norm: whether a BatchNorm follows the stem.
        momentum: of the BatchNorm before the last ReLU; None leaves it out.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        planes: Sequence[int],
        in_channels: int,
        num_classes: int,
        *,
        stem: int = 16,
        expansion: int = 1,
        bias: bool = False,
        stem_norm: bool = False,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(stem) if stem_norm else nn.Identity()
        stages = [nn.Sequential() for _ in range(3)]
        channels = stem
        for k, width in enumerate(planes):
            stage, position = divmod(k, len(planes) // 3)
            stages[stage].append(block(channels, width, 2 if stage > 0 and position == 0 else 1))
            channels = expansion * width
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.Identity() if momentum is None else nn.BatchNorm2d(channels, momentum=momentum)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        logits: Tensor = self.fc(pixel_mean(F.relu(self.bn(x))))
        return logits


class _Block(nn.Module):
    """BN-ReLU-convolution for each (planes, kernel size, stride) given, added to the input, which a
    1x1 convolution brings to another shape where that is needed."""

    def __init__(
        self, channels: int, *convolutions: tuple[int, int, int], bias: bool = False
    ) -> None:
        super().__init__()
        given, step = channels, 1
        for number, (planes, size, stride) in enumerate(convolutions, 1):
            conv = nn.Conv2d(channels, planes, size, stride, padding=size // 2, bias=bias)
            self.add_module(f"bn{number}", nn.BatchNorm2d(channels))
            self.add_module(f"conv{number}", conv)
            channels, step = planes, step * stride
        self.depth = len(convolutions)
        self.downsample: nn.Module = nn.Identity()
        if step != 1 or given != channels:
            self.downsample = Projection(given, channels, step, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            norm, conv = getattr(self, f"bn{number}"), getattr(self, f"conv{number}")
            y = conv(F.relu(norm(y), inplace=True))
        return add_(y, self.downsample(x))


def _basic(channels: int, planes: int, stride: int) -> _Block:
    return _Block(channels, (planes, 3, stride), (planes, 3, 1))


def _bottleneck(channels: int, planes: int, stride: int) -> _Block:
    return _Block(channels, (planes, 1, 1), (planes, 3, stride), (4 * planes, 1, 1))


def _wide(channels: int, planes: int, stride: int) -> _Block:
    """The stride is the second convolution's, unlike in the WRN paper's own code, and all
    convolutions have a bias: so it is in the code of the SWA paper."""
    return _Block(channels, (planes, 3, 1), (planes, 3, stride), bias=True)


class PreResNet(ResidualNet):
    r"""Pre-activation ResNet: a :class:`ResidualNet` of w, 2w and 4w planes with as wide a stem.

    Depths below 44 use basic blocks, n = (depth - 2)/6; from 44 on bottlenecks, n = (depth - 2)/9,
    whose output has 4 times the planes. Convolutions have no bias and start from a normal
    distribution with standard deviation :math:`\sqrt{2/(k^2\,c_\text{out})}`; BatchNorm starts from
    scale 1 and shift 0; the linear layer keeps PyTorch's default.

    Args:
        depth: number of layers: 6n + 2 below 44, 9n + 2 from 44 on.
        width: planes w of the first stage; 16 in the papers.

    Raises:
        ValueError: a depth that is not of that form, or a size below 1.

    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    """

    def __init__(
        self, depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 16
    ) -> None:
        check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        block, layers, expansion = _basic, 6, 1
        if depth >= _BOTTLENECK_DEPTH:
            block, layers, expansion = _bottleneck, 9, 4
        planes = doubled(width, blocks_per_stage(depth, layers))
        super().__init__(block, planes, in_channels, num_classes, stem=width, expansion=expansion)
        he_init(self)


class WideResNet(ResidualNet):
    """Wide ResNet: a :class:`ResidualNet` of w, 2w and 4w planes, n = (depth - 4)/6.

    WRN-d-k is depth d with w = 16k. There is no dropout; all layers start from PyTorch's defaults.
    The last BatchNorm has momentum 0.9, the others 0.1.

    Args:
        depth: number of layers, 6n + 4.
        width: planes w of the first stage; 160 in WRN-28-10.

    Raises:
        ValueError: a depth that is not of that form, or a size below 1.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.
    """

    def __init__(
        self, depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 160
    ) -> None:
        check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        planes = doubled(width, blocks_per_stage(depth, 6, others=4))
        # A momentum of 0.9 is perhaps meant in the opposite convention, but it is what the SWA
        # paper ran. It matters to the running statistics of the plain network alone, not to those
        # that a BN pass computes.
        super().__init__(_wide, planes, in_channels, num_classes, bias=True, momentum=0.9)


class _PyramidBlock(nn.Module):
    """BN-conv1x1, BN-ReLU-conv3x3(stride), BN-ReLU-conv1x1 to four times the planes, BN, added to
    the input: averaged over 2x2 pixels if strided, with channels of zeros appended."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        y = self.bn4(self.conv3(F.relu(self.bn3(y), inplace=True)))
        if self.stride == 2:
            # Sides are rounded up, as by the strided convolution.
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return add_(y, F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


class PyramidNet(ResidualNet):
    r"""Pyramidal residual network: a :class:`ResidualNet` of bottlenecks with BN after the stem,
    n = (depth - 2)/9. Every block is a little wider than the one before: block k of all 3n has

    .. math:: p_k = \operatorname{round}(16 + k\,\alpha/(3n)), \quad k = 1, \dots, 3n

    planes and 4 p_k output channels; the shortcuts have no parameters. All layers start as those of
    :class:`PreResNet`.

    Args:
        depth: number of layers, 9n + 2.
        width: alpha, the planes that the last block has more than the stem; 200 in the SWA paper.

    Raises:
        ValueError: a depth that is not of that form, or a size below 1.

    Source: Han, Kim and Kim, "Deep Pyramidal Residual Networks", CVPR 2017, arXiv 1610.02915.
    """

    def __init__(
        self, depth: int = 272, *, in_channels: int = 3, num_classes: int = 10, width: int = 200
    ) -> None:
        check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        blocks = 3 * blocks_per_stage(depth, 9)
        planes = [round(16 + k * width / blocks) for k in range(1, blocks + 1)]
        super().__init__(
            _PyramidBlock, planes, in_channels, num_classes, expansion=4, stem_norm=True
        )
        he_init(self)
