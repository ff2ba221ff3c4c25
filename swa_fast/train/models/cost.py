"""What a network costs to run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_macs"]


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
