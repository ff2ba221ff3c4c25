"""Inputs of a layer of which a forward takes derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether derivatives by ``tensors`` may be asked for: by autograd, torch.func or dual
    numbers."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return forward_ad._current_level >= 0 or _functorch.maybe_current_level() is not None


def without_derivatives(x: Tensor, name: str) -> Tensor:
    """The values of ``x``.

    Raises:
        ValueError: torch.func.vmap has taken a dimension out of ``x``, the input of layer ``name``,
            so that it is not a batch. torch refuses that as well.
    """
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            raise ValueError(
                f"layer {name}: expected a batch, found a part of one: the layer is called under "
                "torch.func.vmap"
            )
        x = _functorch.get_unwrapped(x)
    if forward_ad._current_level >= 0:
        x = forward_ad.unpack_dual(x).primal
    return x.detach()
