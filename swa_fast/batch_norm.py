"""Re-estimation of BatchNorm statistics for averaged weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

__all__ = ["update_bn"]


class _CumulativeMomentum:
    """Forward pre-hook that makes a layer's k-th training forward weigh 1/k.

    ``momentum=None`` means the same to torch, but makes the layer read its batch counter back
    from the device at every forward.
    """

    def __init__(self) -> None:
        self.forwards = 0

    def __call__(self, layer: nn.Module, args: Any) -> None:
        assert isinstance(layer, _BatchNorm)
        self.forwards += 1
        layer.momentum = 1.0 / self.forwards


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    tensors = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [t for t in tensors if t is not None and not is_lazy(t)]


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: int | str | torch.device | None = None,
) -> None:
    r"""Replaces the running statistics of every BatchNorm layer by those of one pass over
    ``loader``. Drop-in for ``torch.optim.swa_utils.update_bn``, with its result:

    .. math::
        \mu = \frac1K \sum_{k=1}^K \mu_k \qquad \sigma^2 = \frac1K \sum_{k=1}^K s_k^2

    over the :math:`K` batches, where :math:`\mu_k` and :math:`s_k^2` are the mean and the unbiased
    variance of batch :math:`k` (so a short last batch weighs as much as a full one).

    The forward runs in training mode without gradients. Whatever happens, the mode of every
    submodule and every layer's momentum are restored, and if the pass fails so are the statistics.
    Unlike torch's function it does not wait for the device once per layer and batch, unless the
    model is compiled.

    Args:
        loader: batches: a tensor, or a list or tuple whose first element is the model's input;
            anything else is handed to the model as it is.
        model: a model in any mode. One without BatchNorm layers is left alone, and ``loader`` is
            not read.
        device: where the input tensor is moved before the forward; None leaves it.

    Raises:
        TypeError: ``device`` is given and the batch's input is not a tensor.
        ValueError: ``loader`` yields no batch.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    saved = [[t.clone() for t in _statistics(layer)] for layer in layers]
    hooks = []
    finished = False
    try:
        # Compiled code may not see a hook that is added later, and would be compiled again for
        # every new momentum: there the layers count for themselves.
        compiled = _is_compiled(model)
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            if not compiled:
                hooks.append(layer.register_forward_pre_hook(_CumulativeMomentum()))
        model.train()
        batches = 0
        for batch in loader:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            if device is not None:
                if not isinstance(inputs, Tensor):
                    raise TypeError(
                        f"loader: expected batches whose input is a tensor, found "
                        f"{type(inputs).__name__} in batch {batches}, which cannot be moved to "
                        f"{device}"
                    )
                inputs = inputs.to(device)
            model(inputs)
            batches += 1
        if batches == 0:
            raise ValueError("loader: expected at least one batch, found none")
        finished = True
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum, tensors in zip(layers, momenta, saved, strict=True):
            layer.momentum = momentum
            if not finished:
                for tensor, value in zip(_statistics(layer), tensors, strict=False):
                    tensor.copy_(value)
        for module, mode in modes:
            module.training = mode
