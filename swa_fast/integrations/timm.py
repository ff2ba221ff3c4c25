"""timm's ``ModelEmaV3`` with its update in one launch: :class:`ModelEmaV3`.

Example::

    from swa_fast.integrations.timm import ModelEmaV3  # instead of timm.utils

    ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    for step, batch in enumerate(loader):
        train_on(batch)
        ema.update(model, step=step)
    evaluate(ema.module)
    save(ema.state_dict())
"""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3 as Stock
from torch import nn

from ._copy import Copy

__all__ = ["ModelEmaV3"]


class ModelEmaV3(Stock):
    r"""timm's class of this name: the same arguments, methods, attributes and state dict, and the
    same numbers but for rounding,

    .. math:: a \leftarrow a + (1 - d)\,(b - a), \qquad d = \text{get\_decay}(\text{step})

    of parameters and, but with ``exclude_buffers``, of floating-point buffers; integers are copied.
    Tensors are paired by name, and a model that does not fit is refused as a whole.

    bfloat16 averages with timm's stochastic rounding are updated by timm itself, because their
    random numbers are its own, and so are those of models with buffers that are not saved, which it
    leaves alone.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        # In the dictionary, where no module looks for parts and states.
        self.__dict__["_copy"] = None

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Moves parameters and buffers towards the model's."""
        if not self._fast(model, decay, use_buffers=True):
            super().apply_update_(model, decay)

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Moves parameters towards the model's and copies its buffers."""
        if not self._fast(model, decay, use_buffers=False):
            super().apply_update_no_buffers_(model, decay)

    def _fast(self, model: nn.Module, decay: float, *, use_buffers: bool) -> bool:
        """Whether the update took place."""
        copy: Copy | None = self.__dict__["_copy"]
        if copy is None or copy.module is not self.module:
            stochastic = self.stochastic_rounding and any(
                tensor.dtype == torch.bfloat16 for tensor in self.module.state_dict().values()
            )
            unsaved = any(module._non_persistent_buffers_set for module in self.module.modules())
            if stochastic or (unsaved and use_buffers):
                return False
            copy = Copy(self.module, use_buffers=use_buffers)
            self.__dict__["_copy"] = copy
        copy.update(model, decay)
        return True

    def __getstate__(self) -> dict[str, Any]:
        # Made anew at the next update.
        return {**self.__dict__, "_copy": None}
