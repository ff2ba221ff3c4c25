"""Trained weights from torchvision or from a file."""

from __future__ import annotations

import importlib
import os
import pickle
import re
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
        source, loaded = _from_torchvision(name)
    else:
        source, loaded = str(path), _from_file(Path(path))
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


def _from_torchvision(name: str) -> tuple[str, Any]:
    """The source's name for messages, and the content."""
    if name not in PRETRAINED:
        raise TrainError(
            f"model: expected one with weights in torchvision ({', '.join(PRETRAINED)}) or a file "
            f"of weights, found {name!r} without a file"
        )
    weights = getattr(import_extra("torchvision.models"), PRETRAINED[name])[_VERSION]
    try:
        # A broken download raises RuntimeError, a broken file in the cache any of the others.
        loaded = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"the weights of {name} cannot be had from {weights.url} ({error}); "
            f"give a file of weights instead"
        ) from error
    return weights.url, loaded


def _from_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            safetensors = importlib.import_module("safetensors.torch")
        except ImportError as error:
            raise TrainError(
                f"safetensors cannot be imported ({error}); run: pip install safetensors"
            ) from error
        try:
            return safetensors.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise TrainError(f"{path}: cannot be read as safetensors ({error})") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"{path}: expected a state_dict by torch.save, cannot be read as one ({error})"
        ) from error


def _listed(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
