"""Files of :func:`torch.save`: where the elements of their tensors lie."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .entries import Contiguous, Entry, InMemory, bytes_of
from .errors import CheckpointError

__all__ = ["entry_of", "offsets", "place_of", "read_torch"]

# Where training scripts put the weights.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
_EMA_WEIGHTS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")


def offsets(file: Path | BinaryIO) -> Any:
    """What a file of :func:`torch.save` holds, its tensors without memory; their storages know
    where in the file they lie (``_checkpoint_offset``)."""
    # An import of a second, which safetensors alone do not need.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        # Of sparse tensors, which are refused.
        warnings.filterwarnings("ignore", message="Validating sparse")
        return torch.load(file, map_location="cpu", weights_only=True)


def place_of(tensor: Tensor) -> int:
    """Where in the file of :func:`offsets` the first element lies."""
    storage: Any = tensor.untyped_storage()
    return int(storage._checkpoint_offset) + int(tensor.storage_offset()) * tensor.dtype.itemsize


def _loaded(path: Path) -> tuple[Any, bool]:
    """The content of a file, and whether its tensors are in memory."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if zipfile.is_zipfile(path):
            return offsets(path), False
        if start == b"PK\x03\x04":
            raise CheckpointError(f"{path}: the file is truncated")
        # The format before torch 1.6 has to be read as a whole.
        return torch.load(path, map_location="cpu", weights_only=True), True
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        at = reason.find("Unsupported")
        raise CheckpointError(
            f"{path}: expected tensors and plain containers only, found something that could run "
            f"code: {reason[max(at, 0) :][:160]}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a file of torch.save, found something else, or a truncated one "
            f"({reason})"
        ) from None


def _is_state_dict(content: object) -> bool:
    return isinstance(content, Mapping) and any(isinstance(v, Tensor) for v in content.values())


def _at(content: Any, key: str, path: Path) -> Any:
    """``key`` is names of nested mappings joined by dots, which names may hold themselves."""
    if isinstance(content, Mapping):
        if key in content:
            return content[key]
        for name in content:
            if isinstance(name, str) and key.startswith(f"{name}."):
                return _at(content[name], key[len(name) + 1 :], path)
    found = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else content
    raise CheckpointError(f"{path}: key {key!r} is not among {found!s:.200}")


def _weights(content: Any, key: str | None, ema: bool, path: Path) -> Mapping[str, Any]:
    if key is not None:
        content = _at(content, key, path)
    elif ema or not _is_state_dict(content):
        candidates = _EMA_WEIGHTS if ema else _WEIGHTS
        names = list(content) if isinstance(content, Mapping) else []
        found = [n for n in candidates if n in names and _is_state_dict(content[n])]
        if len(found) != 1:
            held = ", ".join(map(repr, names[:8])) or type(content).__name__
            raise CheckpointError(
                f"{path}: expected the weights at the top or in one of {', '.join(candidates)}, "
                f"found {held}; say where they are with key"
            )
        content = content[found[0]]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"{path}: expected tensors by name, found {type(content).__name__}"
            + ("" if key is None else f" at key {key!r}")
        )
    return content


def entry_of(name: str, tensor: Tensor, path: Path, base: int | None) -> Entry:
    """The tensor as an entry. ``base``: where in ``path`` the offsets of its storage count from;
    None for a tensor in memory."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout)
        raise CheckpointError(f"{path}: {name}: expected a dense tensor, found a {kind} one")
    shape = tuple(tensor.shape)
    if base is None:
        whole = tensor.detach()
        shares: object = (whole.data_ptr(), shape, whole.stride()) if whole.numel() else None
        return Entry(name, whole.dtype, shape, InMemory(lambda: whole.resolve_conj()), shares)
    offset = base + place_of(tensor)
    shares = (offset, shape, tensor.stride()) if tensor.numel() else None
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return Entry(name, tensor.dtype, shape, Contiguous(path, offset), shares)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, tensor.stride(), strict=True))
    dtype, stride, conj, negative = tensor.dtype, tensor.stride(), tensor.is_conj(), tensor.is_neg()

    def load() -> Tensor:
        raw = torch.empty(extent * dtype.itemsize, dtype=torch.uint8)
        with open(path, "rb") as file:
            file.seek(offset)
            if file.readinto(bytes_of(raw)) != raw.numel():
                raise CheckpointError(f"{path}: {name} goes beyond the end of the file")
        turned = raw.view(dtype).as_strided(shape, stride)
        turned = turned.conj() if conj else turned
        return (-turned if negative else turned).resolve_conj()

    return Entry(name, dtype, shape, InMemory(load), shares)


def read_torch(path: Path, key: str | None, ema: bool) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a file of :func:`torch.save`, and the names of what is none.

    Args:
        path: the file. ``weights_only`` reads it: nothing in it can run.
        key: where the weights are: names of nested dicts joined by dots. None takes the top, or
            the only one of the usual names.
        ema: without ``key``, take the only one of the usual names of averages.

    Raises:
        CheckpointError: truncated, or not a file of torch.save; objects that could run code; no
            weights at ``key``; sparse or quantised tensors.
    """
    content, in_memory = _loaded(path)
    weights = _weights(content, key, ema, path)
    entries, left_out = {}, []
    for name, value in weights.items():
        if isinstance(value, Tensor):
            entries[name] = entry_of(name, value, path, None if in_memory else 0)
        elif value is None or name.endswith("_extra_state"):
            left_out.append(name)
        else:
            raise CheckpointError(
                f"{path}: {name}: expected a tensor, found {type(value).__name__}; say where the "
                "weights are with key"
            )
    return entries, left_out
