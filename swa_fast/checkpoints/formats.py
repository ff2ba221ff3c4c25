"""What lies at a path, opened as a :class:`~swa_fast.checkpoints.entries.Checkpoint`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .dcp import METADATA, read_dcp
from .entries import Checkpoint, Entry
from .errors import CheckpointError
from .safetensors import read_header
from .torch_files import read_torch

__all__ = ["TORCH_SUFFIXES", "reader", "weights_name"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX = ".index.json"
# In a folder with several the first is taken, as Hugging Face's loaders do.
_IN_FOLDERS = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip


def weights_name(folder: Path) -> str | None:
    """The name of the weights in a Hugging Face folder, of the file or of the index."""
    for name in _IN_FOLDERS:
        for candidate in (name, name + _INDEX):
            if (folder / candidate).is_file():
                return candidate
    return None


def reader(
    path: str | Path, *, key: str | None = None, ema: bool = False, strip: str | None = None
) -> Checkpoint:
    """Opens a checkpoint: reads where its tensors lie, and none of them.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file of
            :func:`torch.save`; a Hugging Face folder with one of these, or with shards and their
            index; or a folder of :mod:`torch.distributed.checkpoint`.
        key: where in it the weights are: names of nested dicts joined by dots. None takes the top,
            or, in a file of torch.save, the only one of ``state_dict``, ``model_state_dict``,
            ``model`` and ``module``.
        ema: without ``key``, the only one of ``state_dict_ema``, ``ema_state_dict``, ``model_ema``
            and ``ema``.
        strip: a prefix to take off the names that have it, such as ``module.``.

    Returns:
        Names, shapes, dtypes and :meth:`~swa_fast.checkpoints.entries.Checkpoint.read_into`; a
        context manager.

    Raises:
        CheckpointError: it is truncated, contradicts itself, points outside its folder, could run
            code, or holds what is not a dense tensor; the message names the file and the tensor.
        OSError: it cannot be read.
    """
    found = _open(Path(path), key, ema)
    if strip:
        found.entries = _stripped(found, strip)
    if not found.entries:
        raise CheckpointError(f"{path}: expected tensors, found none")
    return found


def _open(path: Path, key: str | None, ema: bool) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path, key, ema)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file or folder, found nothing")
    if path.suffix == ".safetensors":
        if key is not None or ema:
            raise CheckpointError(f"{path}: safetensors have no keys; leave key and ema out")
        entries, metadata = read_header(path)
        return Checkpoint(path, "safetensors", entries, [path], metadata)
    if path.suffix in TORCH_SUFFIXES:
        entries, left_out = read_torch(path, key, ema)
        return Checkpoint(path, "torch", entries, [path], left_out=left_out)
    expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise CheckpointError(f"{path}: expected a folder or a file ending in {expected}")


def _open_folder(path: Path, key: str | None, ema: bool) -> Checkpoint:
    if (path / METADATA).is_file():
        if ema and key is None:
            raise CheckpointError(f"{path}: give key instead of ema for such a folder")
        entries, files, left_out = read_dcp(path, key)
        return Checkpoint(path, "dcp", entries, files, left_out=left_out)
    name = weights_name(path)
    if name is None:
        candidates = sorted(f.name for f in path.glob("*.safetensors"))
        if len(candidates) != 1:
            raise CheckpointError(
                f"{path}: expected one of {', '.join(_IN_FOLDERS)}, an index of shards, or "
                f"{METADATA}; found {', '.join(candidates) or 'none of them'}"
            )
        name = candidates[0]
    if not name.endswith(_INDEX):
        found = _open(path / name, key, ema)
        return dataclasses.replace(found, path=path)
    return _open_shards(path, name, key, ema)


def _open_shards(folder: Path, name: str, key: str | None, ema: bool) -> Checkpoint:
    index = folder / name
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        shards: dict[str, str] = content["weight_map"]
        if not all(isinstance(s, str) for s in shards.values()):
            raise TypeError("weight_map: expected names of files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: expected an index with weight_map ({error})") from None
    entries: dict[str, Entry] = {}
    files, left_out, metadata, kind = [index], [], {}, "safetensors"
    for shard in dict.fromkeys(shards.values()):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"{index}: points outside its folder, to {shard}")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: its shard {shard} is missing")
        with _open(folder / shard, key, ema) as part:
            held = {n for n, s in shards.items() if s == shard}
            odd = sorted(held ^ set(part.entries))
            if odd:
                where = "in the index alone" if odd[0] in held else "in the shard alone"
                raise CheckpointError(f"{index}: {odd[0]} of {shard} is {where}")
            entries.update(part.entries)
            files += part.files
            left_out += part.left_out
            metadata.update(part.metadata)
            kind = part.kind
    return Checkpoint(folder, kind, entries, files, metadata, left_out)


def _stripped(found: Checkpoint, prefix: str) -> dict[str, Entry]:
    result: dict[str, Entry] = {}
    if not any(name.startswith(prefix) for name in found.entries):
        raise CheckpointError(f"{found.path}: no name begins with strip={prefix!r}")
    for name, entry in found.entries.items():
        short = name.removeprefix(prefix)
        if short in result or not short:
            raise CheckpointError(f"{found.path}: two tensors are {short!r} without {prefix!r}")
        result[short] = dataclasses.replace(entry, name=short)
    return result
