"""Shake-Shake networks for small images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Projection, add_, blocks_per_stage, check_sizes, he_init
from .residual import ResidualNet, doubled


class _Shake(torch.autograd.Function):
    """alpha y1 + (1 - alpha) y2, with the gradient of beta y1 + (1 - beta) y2."""

    @staticmethod
    def forward(ctx: Any, y1: Tensor, y2: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return torch.lerp(y2, y1, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (beta,) = ctx.saved_tensors
        grad1 = beta * grad
        return grad1, grad - grad1, None, None


def shake(y1: Tensor, y2: Tensor, training: bool) -> Tensor:
    r"""The random mean of two branches.

    In training, image n gets :math:`\alpha_n y_1 + (1 - \alpha_n) y_2`, while the gradient g passes
    on as :math:`\beta_n g` to y1 and :math:`(1 - \beta_n) g` to y2; alpha and beta are independent
    and uniform on [0, 1). Else it is the plain mean.

    Args:
        y1: float tensor [N, C, H, W].
        y2: same shape and dtype.
        training: whether to draw; both draws are made here, from the global generator of y1's
            device, so that a backward pass may be repeated or recomputed.

    Source: Gastaldi, "Shake-Shake regularization", 2017, arXiv 1705.07485, the variant
    "Shake-Shake-Image".
    """
    if not training:
        return torch.lerp(y2, y1, 0.5)
    # Drawn in float32 whatever the branches are in: a seed then means the same in all precisions.
    alpha, beta = torch.rand(2, len(y1), 1, 1, 1, device=y1.device).to(y1.dtype)
    mean: Tensor = _Shake.apply(y1, y2, alpha, beta)
    return mean


class _Shortcut(nn.Module):
    """Every ``step``-th pixel through one 1x1 convolution, and those one up and one left of them
    (zeros at the border) through another; each makes half of the channels, which go through BN."""

    def __init__(self, in_channels: int, out_channels: int, step: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = Projection(in_channels, out_channels - half, step)
        self.conv2 = Projection(in_channels, half, step)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x, (1, -1, 1, -1))
        out: Tensor = self.bn(torch.cat((self.conv1(x), self.conv2(shifted)), 1))
        return out


def _branch(in_channels: int, planes: int, stride: int) -> nn.Sequential:
    """Conv3x3(stride)-BN-ReLU-conv3x3-BN; the ReLU in front is the block's."""
    return nn.Sequential(
        nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(planes),
        nn.ReLU(inplace=True),
        nn.Conv2d(planes, planes, 3, padding=1, bias=False),
        nn.BatchNorm2d(planes),
    )


class _Block(nn.Module):
    """Two branches of the activated input, shaken and added to the shortcut."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.branch1 = _branch(in_channels, planes, stride)
        self.branch2 = _branch(in_channels, planes, stride)
        self.downsample: _Shortcut | None = None
        if stride != 1 or in_channels != planes:
            self.downsample = _Shortcut(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(x)
        skip = x if self.downsample is None else self.downsample(active)
        return add_(shake(self.branch1(active), self.branch2(active), self.training), skip)


class ShakeShake(ResidualNet):
    r"""Shake-Shake network for small images, e.g. 26 2x64d: a :class:`~.residual.ResidualNet` of w,
    2w and 4w planes, n = (depth - 2)/6, with BN after the stem and none before the last ReLU.

    A block is x + shake(b1(x), b2(x)), see :func:`shake`, with two branches
    ReLU-conv3x3-BN-ReLU-conv3x3-BN; where the shape changes, x is replaced by BN of two
    1x1 convolutions of ReLU(x), one of them shifted by a pixel. Convolutions have no bias and start
    from a normal distribution with standard deviation :math:`\sqrt{2/(k^2\,c_\text{out})}`;
    BatchNorm starts from scale 1 and shift 0, the linear layer's bias from 0.

    Args:
        depth: number of layers, 6n + 2.
        width: planes w of the first stage, 2 or more; 64 in 26 2x64d.

    Images have 8x8 pixels or more.

    Raises:
        ValueError: a depth that is not of that form, or a size that is too small.

    Source: Gastaldi, "Shake-Shake regularization", 2017, arXiv 1705.07485.
    """

    def __init__(
        self, depth: int = 26, *, in_channels: int = 3, num_classes: int = 10, width: int = 64
    ) -> None:
        check_sizes(in_channels=in_channels, num_classes=num_classes)
        if width < 2:
            raise ValueError(f"width: expected 2 or more, found {width}")
        planes = doubled(width, blocks_per_stage(depth, 6))
        super().__init__(_Block, planes, in_channels, num_classes, stem_norm=True, momentum=None)
        he_init(self)
        nn.init.zeros_(self.fc.bias)
