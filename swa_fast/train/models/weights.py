"""Trained weights from torchvision or from a file."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError, first_line, import_extra

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
    source = _torchvision(name).url if path is None else str(path)
    try:
        loaded = _read(name, path)
    except TrainError:
        raise
    # Neither torch.load nor torch.hub has an error of its own: OSError, RuntimeError, KeyError...
    except Exception as error:
        raise TrainError(
            f"{source}: expected a state_dict, cannot be read ({first_line(error)})"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        kind = type(loaded).__name__
        if isinstance(loaded, dict):
            kind += f" with {_listed([str(k) for k in loaded])}"
        raise TrainError(f"{source}: expected a state_dict (tensors by name), found {kind}")
    expected = model.state_dict()
    counters = {k: x for k, x in expected.items() if k.endswith("num_batches_tracked")}
    found = counters | {
        _OLD_DENSENET_KEY.sub(r"\1\2", str(key).removeprefix("module.")): tensor
        for key, tensor in loaded.items()
    }
    problems = {
        "missing": [k for k in expected if k not in found],
        "unexpected": [k for k in found if k not in expected],
        "of another shape": [
            f"{k} (expected {list(x.shape)}, found {list(found[k].shape)})"
            for k, x in expected.items()
            if k in found and x.shape != found[k].shape
        ],
    }
    if any(problems.values()):
        parts = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
        raise TrainError(f"{source}: expected the weights of this {name}, found {'; '.join(parts)}")
    model.load_state_dict(found)


def _torchvision(name: str) -> Any:
    """torchvision's weights of a network: where they are, and how they are read."""
    if name not in PRETRAINED:
        raise TrainError(
            f"model: expected one with weights in torchvision ({', '.join(PRETRAINED)}) or a file "
            f"of weights, found {name!r} without a file"
        )
    return getattr(import_extra("torchvision.models"), PRETRAINED[name])[_VERSION]


def _read(name: str, path: str | os.PathLike[str] | None) -> Any:
    """What is in the file, or torchvision's weights of the network."""
    if path is not None and Path(path).suffix == ".safetensors":
        try:
            load = importlib.import_module("safetensors.torch").load_file
        except ImportError as error:
            raise TrainError(
                f"{path}: safetensors cannot be imported ({error}); run: pip install safetensors"
            ) from error
        return load(path)
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    return _torchvision(name).get_state_dict(check_hash=True, map_location="cpu", weights_only=True)


def _listed(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
