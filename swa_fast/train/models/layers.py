"""What the networks share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Conv2d):
    """A 1x1 convolution of every ``step``-th pixel, i.e. one with that stride.

    Not written as a strided convolution: the AVX2 gradient of one with fewer than 8 channels writes
    out of bounds in oneDNN (uxlfoundation/oneDNN issue 6035), which ends in crashes or wrong
    gradients for narrow networks.
    """

    def __init__(self, in_channels: int, out_channels: int, step: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.step, :: self.step])


def add_(y: Tensor, x: Tensor) -> Tensor:
    """y + x in the memory of ``y``, which nobody may need any more: no layer's backward pass does,
    of a convolution or a BatchNorm that has just made it. Memory for every sum takes longer than
    summing. Where the sum has another dtype than ``y``, it is another tensor, as it has to be."""
    return y.add_(x) if y.dtype == x.dtype else y + x


def check_sizes(**sizes: int) -> None:
    """Raises ValueError, which names the argument, for a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, found {value}")


def blocks_per_stage(depth: int, layers: int, others: int = 2) -> int:
    """The n of a depth that is ``layers``*n + ``others``. Raises ValueError for other depths."""
    blocks, rest = divmod(depth - others, layers)
    if rest or blocks < 1:
        raise ValueError(f"depth: expected {layers}n + {others} with n of 1 or more, found {depth}")
    return blocks


def pixel_mean(x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C]."""
    return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


def he_init(model: nn.Module) -> None:
    r"""Draws every convolution's weight from a normal distribution with mean 0 and standard
    deviation :math:`\sqrt{2/(k^2\,c_\text{out})}`, and sets its bias to 0.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, in the form that looks at the
    backward pass.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
