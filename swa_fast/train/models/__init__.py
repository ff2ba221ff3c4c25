"""The networks that the trainer knows by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from .preresnet import PreResNet

__all__ = ["MODELS", "PreResNet", "build_model"]

#: Constructors by name; each takes in_channels, num_classes and width by keyword.
MODELS: dict[str, Callable[..., nn.Module]] = {
    f"preresnet{depth}": partial(PreResNet, depth) for depth in (8, 14, 20, 56, 110, 164)
}


def build_model(name: str, *, in_channels: int, num_classes: int, width: int) -> nn.Module:
    """A new network with random weights drawn from torch's global generator.

    Args:
        name: a key of :data:`MODELS`.
        in_channels: channels of the images.
        num_classes: length of the output.
        width: planes of the first stage.

    Raises:
        ValueError: no model of that name (the message lists all), or a size below 1.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    return MODELS[name](in_channels=in_channels, num_classes=num_classes, width=width)
