"""Fusion of a BatchNorm layer with the ReLU behind it in an ``nn.Sequential``.

Nobody but the ReLU can see the output of a layer there, because torch's ``Sequential.forward``
hands it to the next module and to nothing else. Elsewhere nobody can be sure of that: a scripted
function, another thread or the next forward may use an output too, and what they do is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as _module_globals

from .layers import Layer


def is_plain_sequential(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return False
    kind = type(module)
    return (
        kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and "forward" not in module.__dict__
    )


def _bare(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or _module_globals._global_forward_hooks
        or _module_globals._global_forward_pre_hooks
    )


def fusing_forward(
    sequential: nn.Sequential,
    layers: Mapping[nn.Module, Layer],
) -> Callable[[Any], Any]:
    """A forward of ``sequential`` in which a ReLU behind one of ``layers`` is a part of that."""

    def forward(input: Any) -> Any:
        modules = list(sequential)
        position = 0
        while position < len(modules):
            module = modules[position]
            layer = layers.get(module)
            follower = modules[position + 1] if position + 1 < len(modules) else None
            if (
                layer is not None
                and type(follower) is nn.ReLU
                and "forward" not in follower.__dict__
                and module.training
                and _bare(module)
                and _bare(follower)
            ):
                input = layer.compute(input, True)
                position += 2
            else:
                input = module(input)
                position += 1
        return input

    return forward
