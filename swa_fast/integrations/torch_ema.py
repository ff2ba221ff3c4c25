"""torch-ema's ``ExponentialMovingAverage`` with its update in one launch.

Example::

    from swa_fast.integrations.torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=0.995)
    for batch in loader:
        train_on(batch)
        ema.update()
    with ema.average_parameters():
        evaluate(model)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch_ema import ExponentialMovingAverage as Stock

from ._shadow import Shadow

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(Stock):
    r"""torch-ema's class of this name: the same arguments, methods and state dict, and the same
    numbers but for rounding,

    .. math:: a \leftarrow a - (1 - d)\,(a - w), \qquad
        d = \min\left(\text{decay}, \frac{1 + n}{10 + n}\right)

    for the :math:`n`-th update, ``decay`` alone with ``use_num_updates=False``. Where averages are
    of a kind that this package does not keep (dtypes mixed by hand), an update is torch-ema's own.
    """

    shadow_params: list[Tensor]
    _shadow: Shadow | None = None

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Takes the current weights into the average.

        Args:
            parameters: in the order of those given to the constructor, which None takes.

        Raises:
            ValueError: another number of parameters, or they are no more.
        """
        current = list(self._get_parameters(parameters))
        if self._shadow is None or not self._shadow.serves(current, self.shadow_params):
            self._shadow = None
            if not Shadow.can(current, self.shadow_params):
                super().update(current)
                return
            self._shadow = Shadow(current, self.shadow_params)
            self.shadow_params = self._shadow.tensors
        decay = self.decay
        if self.num_updates is not None:
            decay = min(decay, (2 + self.num_updates) / (11 + self.num_updates))
        self._shadow.update(decay)
        if self.num_updates is not None:
            self.num_updates += 1

    def __getstate__(self) -> dict[str, Any]:
        # Made anew at the next update, of the parameters that are there then.
        return {**self.__dict__, "_shadow": None}
