"""Trained weights from torchvision or from a file."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError, import_extra

__all__ = ["PRETRAINED", "load_pretrained"]

#: torchvision's enumeration of the weights by the model's name.
PRETRAINED = {
    "resnet50": "ResNet50_Weights",
    "resnet152": "ResNet152_Weights",
    "densenet161": "DenseNet161_Weights",
}

# The first weights that torchvision published, which the SWA paper started from. The second are of
# another recipe and more accurate.
_VERSION = "IMAGENET1K_V1"

# DenseNet's layers had dots in their names until PyTorch forbade it; torchvision's files have kept
# them.
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")

_SHOWN = 3


def load_pretrained(
    model: nn.Module, name: str, path: str | os.PathLike[str] | None = None
) -> None:
    """Loads trained weights into a model, in place.

    A leading ``module.`` is taken off the names, as DataParallel puts it there. BatchNorm's batch
    counters may be missing, as in files from before PyTorch 0.4.1; the model then keeps its own.

    Args:
        model: a network of that name, with as many classes as the weights have: 1000 in
            torchvision's.
        name: the model's name, for messages and to find torchvision's weights.
        path: a file with a state_dict, by ``torch.save`` or, if it ends in .safetensors, by
            safetensors. None stands for torchvision's ``IMAGENET1K_V1``, downloaded unless they are
            in torch.hub's cache.

    Raises:
        TrainError: the weights cannot be read or downloaded, or are of another architecture; the
            model is then left as it was.
    """
    if path is None:
        source, load = _torchvision_weights(name)
    else:
        source, load = str(path), _reader(Path(path))
    try:
        loaded = load()
    # Neither torch.load nor torch.hub has an error of its own: OSError, RuntimeError, KeyError...
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(f"{source}: expected a state_dict, cannot be read ({reason})") from error
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        found = type(loaded).__name__
        if isinstance(loaded, dict):
            found += f" with {_listed([str(k) for k in loaded])}"
        raise TrainError(f"{source}: expected a state_dict (tensors by name), found {found}")
    found_tensors = {
        _OLD_DENSENET_KEY.sub(r"\1\2", str(key).removeprefix("module.")): tensor
        for key, tensor in loaded.items()
    }

    expected = model.state_dict()
    counters = {k: x for k, x in expected.items() if k.endswith("num_batches_tracked")}
    found_tensors = counters | found_tensors
    problems = {
        "missing": [k for k in expected if k not in found_tensors],
        "unexpected": [k for k in found_tensors if k not in expected],
        "of another shape": [
            f"{k} (expected {list(x.shape)}, found {list(found_tensors[k].shape)})"
            for k, x in expected.items()
            if k in found_tensors and x.shape != found_tensors[k].shape
        ],
    }
    if any(problems.values()):
        parts = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
        raise TrainError(f"{source}: expected the weights of this {name}, found {'; '.join(parts)}")
    model.load_state_dict(found_tensors)


def _torchvision_weights(name: str) -> tuple[str, Callable[[], Any]]:
    """Where they come from, and what gets them."""
    if name not in PRETRAINED:
        raise TrainError(
            f"model: expected one with weights in torchvision ({', '.join(PRETRAINED)}) or a file "
            f"of weights, found {name!r} without a file"
        )
    weights = getattr(import_extra("torchvision.models"), PRETRAINED[name])[_VERSION]
    return weights.url, partial(
        weights.get_state_dict, check_hash=True, map_location="cpu", weights_only=True
    )


def _reader(path: Path) -> Callable[[], Any]:
    if path.suffix != ".safetensors":
        return partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        return partial(importlib.import_module("safetensors.torch").load_file, path)
    except ImportError as error:
        raise TrainError(
            f"{path}: safetensors cannot be imported ({error}); run: pip install safetensors"
        ) from error


def _listed(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
