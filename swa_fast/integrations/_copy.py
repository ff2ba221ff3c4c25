"""Averages that are a copy of the model, as timm and ema-pytorch keep them, moved by one launch."""

from __future__ import annotations

import torch
from torch import nn

from swa_fast import EMA, AveragedModel

__all__ = ["Copy"]


class Copy:
    r"""Moves the parameters and buffers of one module towards those of another,
    :math:`a \leftarrow d\,a + (1 - d)\,b`.

    Args:
        averages: the module that is moved.
        use_buffers: move floating-point buffers, too, instead of copying them.
        integers: copy those of integers and booleans, too, instead of leaving them alone.
    """

    def __init__(self, averages: nn.Module, *, use_buffers: bool, integers: bool = True) -> None:
        self._model = AveragedModel(averages, use_buffers=use_buffers)
        # The module itself, which others may know, and not the copy that was made of it.
        self._model.module = averages
        # Counted as updated, so that the first update moves instead of copying.
        self._model.n_averaged.fill_(1)
        self.module, self._integers = averages, integers

    def update(self, model: nn.Module, decay: float) -> None:
        """Moves all averages, or none if it raises.

        Raises:
            ValueError: the model's tensors do not fit; all that do not are named.
        """
        # The functions' rule: a decay of its own for each update costs no new table.
        self._model.rule = EMA(decay)
        left_alone = [
            buffer
            for buffer in (() if self._integers else self.module.buffers())
            if not (buffer.is_floating_point() or buffer.is_complex())
        ]
        kept = [buffer.clone() for buffer in left_alone]
        with torch.no_grad():
            try:
                self._model.update_parameters(model)
            finally:
                if kept:
                    torch._foreach_copy_(left_alone, kept)
