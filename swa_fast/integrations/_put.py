"""An average that stays in the model's place when training has ended."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def put(model: nn.Module, values: list[Tensor]) -> None:
    """Copies values into a model's tensors: all or, where it is interrupted, none. ``values`` is
    emptied on the way, so that no more than one copy of the model is needed."""
    live = [*model.parameters(), *model.buffers()]
    before: list[Tensor] = []
    values.reverse()
    try:
        for tensor in live:
            before.append(tensor.clone())
            tensor.copy_(values.pop())
    except BaseException:
        for tensor, value in zip(live, before, strict=False):
            tensor.copy_(value)
        raise
