"""ema-pytorch's ``EMA`` with its update in one launch: :class:`EMA`.

Example::

    from swa_fast.integrations.ema_pytorch import EMA  # instead of ema_pytorch

    ema = EMA(model, beta=0.999, update_after_step=0, update_every=1)
    for batch in loader:
        train_on(batch)
        ema.update()
    evaluate(ema)
    save(ema.state_dict())

``update_every`` is 10 unless it is given, and the decay goes by the number of calls: with the
defaults of ema-pytorch an average is another one than ``swa_fast.EMA(decay, warmup="ema-pytorch")``
makes, which counts updates.
"""

from __future__ import annotations

from ema_pytorch import EMA as Stock
from torch import nn

from ._copy import Copy

__all__ = ["EMA"]


class EMA(Stock):
    r"""ema-pytorch's class of this name: the same arguments, methods, attributes and state, and
    the same numbers but for rounding,

    .. math:: a \leftarrow a + (1 - d)\,(b - a), \qquad
        d = \operatorname{clip}(1 - (1 + s/\gamma)^{-p},\ d_{\min},\ \beta), \quad
        s = \text{step} - \text{update\_after\_step} - 1

    of parameters and floating-point buffers; integers are left alone. Updates with names that are
    left out or not averaged, between devices or dtypes, and those of the model by its average are
    ema-pytorch's own.
    """

    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """Moves the average towards the model."""
        decay = self.get_current_decay() if current_decay is None else current_decay
        plain = not (
            self.is_frozen
            or self.ignore_names
            or self.ignore_startswith_names
            or self.param_or_buffer_names_no_ema
            or self.allow_different_devices
            or self.coerce_dtype
            or self.move_ema_to_online_device
        )
        if not plain or ma_model is not self.ema_model or current_model is not self.model:
            super().update_moving_average(ma_model, current_model, decay)
            return
        copy: Copy | None = self.__dict__.get("_copy")
        if copy is None or copy.module is not ma_model:
            copy = Copy(ma_model, use_buffers=True, integers=False)
            # In the dictionary, where no module looks for parts and states.
            self.__dict__["_copy"] = copy
        copy.update(current_model, decay)
