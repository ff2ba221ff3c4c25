"""diffusers' ``EMAModel`` with its update in one launch: :class:`EMAModel`.

Example::

    from swa_fast.integrations.diffusers import EMAModel  # instead of diffusers.training_utils

    ema = EMAModel(unet.parameters(), decay=0.9999, model_cls=type(unet), model_config=unet.config)
    for batch in loader:
        train_on(batch)
        ema.step(unet.parameters())
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    sample(unet)
    ema.restore(unet.parameters())
    ema.save_pretrained("unet_ema")
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel as Stock
from torch import Tensor, nn

from ._shadow import Shadow

__all__ = ["EMAModel"]


class EMAModel(Stock):
    r"""diffusers' class of this name: the same arguments, methods, attributes, state and files,
    and the same numbers but for rounding,

    .. math:: a \leftarrow a - (1 - d)\,(a - w), \qquad d = \text{get\_decay}(n)

    for the :math:`n`-th step, where ``foreach`` does not matter any more. Parameters that are
    frozen are copied.

    Where the averages are of a kind that this package does not keep (parameters that DeepSpeed
    shards, dtypes mixed by hand), a step is diffusers' own. ``shadow_params`` stays a list of
    tensors that may be read, written and replaced.
    """

    shadow_params: list[Tensor]
    _shadow: Shadow | None = None

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes the current weights into the average.

        Args:
            parameters: in the order of those given to the constructor.
        """
        if isinstance(parameters, nn.Module):
            super().step(parameters)  # which says that it is deprecated
            return
        parameters = list(parameters)
        if self._shadow is None or not self._shadow.serves(parameters, self.shadow_params):
            self._shadow = None
            if not Shadow.can(parameters, self.shadow_params):
                super().step(parameters)
                return
            self._shadow = Shadow(parameters, self.shadow_params)
            self.shadow_params = self._shadow.tensors
        decay = self.get_decay(self.optimization_step + 1)
        self._shadow.update(decay)
        for average, parameter in zip(self.shadow_params, parameters, strict=True):
            if not parameter.requires_grad:
                average.copy_(parameter)
        self.optimization_step += 1
        self.cur_decay_value = decay

    def __getstate__(self) -> dict[str, Any]:
        # Made anew at the next step, of the parameters that are there then.
        return {**self.__dict__, "_shadow": None}
