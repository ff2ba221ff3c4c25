"""ultralytics' ``ModelEMA`` with its update in one launch: :class:`ModelEMA`.

Example::

    from swa_fast.integrations.ultralytics import ModelEMA  # instead of ultralytics.utils

    ema = ModelEMA(model, decay=0.9999, tau=2000)
    for batch in loader:
        train_on(batch)
        ema.update(model)
    ema.update_attr(model, include=["names"])
    evaluate(ema.ema)
"""

from __future__ import annotations

from torch import nn
from ultralytics.utils.torch_utils import ModelEMA as Stock
from ultralytics.utils.torch_utils import unwrap_model

from ._copy import Copy

__all__ = ["ModelEMA"]


class ModelEMA(Stock):
    r"""ultralytics' class of this name: the same arguments, methods and attributes (``ema``,
    ``updates``, ``decay``, ``enabled``), and the same numbers but for rounding,

    .. math:: a \leftarrow a + (1 - d)\,(b - a), \qquad d = \text{decay}(1 - e^{-n/\tau})

    for the :math:`n`-th update, of parameters and floating-point buffers; integers are left alone.
    Parameters that were replaced since the last update are found. Models with a part that the
    average does not have (a teacher), or with buffers that are not saved, are averaged by
    ultralytics itself.
    """

    _copy: Copy | None = None

    def update(self, model: nn.Module) -> None:
        """Takes the current weights into the average.

        Args:
            model: the model, also inside of DataParallel, DistributedDataParallel or torch.compile.
        """
        if not self.enabled:
            return
        inner = unwrap_model(model)
        if self._copy is None or self._copy.module is not self.ema:
            unsaved = any(module._non_persistent_buffers_set for module in self.ema.modules())
            if unsaved or self.ema.state_dict().keys() != inner.state_dict().keys():
                super().update(model)
                return
            self._copy = Copy(self.ema, use_buffers=True, integers=False)
        self._copy.update(inner, self.decay(self.updates + 1))
        self.updates += 1
