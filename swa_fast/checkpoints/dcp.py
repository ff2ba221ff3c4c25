"""Folders of :mod:`torch.distributed.checkpoint`, read without a process group."""

from __future__ import annotations

import io
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .entries import Boxes, Contiguous, Entry
from .errors import CheckpointError
from .torch_files import offsets, place_of

__all__ = ["METADATA", "read_dcp"]

METADATA = ".metadata"

# What the metadata of torch's own savers is made of. They read it by an unrestricted pickle.
_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *((f"{_DCP}metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"), ("builtins", "set"),
    ("pathlib", "Path"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"), ("pathlib._local", "Path"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _metadata(folder: Path) -> Any:
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            return _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected the metadata of torch.distributed.checkpoint, found {error}"
        ) from None
    except (EOFError, ValueError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated, or of another torch ({error})") from None


def read_dcp(folder: Path, key: str | None) -> tuple[dict[str, Entry], list[Path], list[str]]:
    """The tensors of a folder, its files, and the names of what is no tensor.

    Args:
        folder: with ``.metadata`` and ``.distcp`` files, of any number of ranks.
        key: keep names that begin with it and a dot, without them; None keeps all.

    Raises:
        CheckpointError: metadata that is truncated or could run code, parts that do not make up
            their tensor, files that are missing, compressed or outside the folder.
    """
    metadata = _metadata(folder)
    stored = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): where
        for index, where in metadata.storage_data.items()
    }
    prefix = "" if key is None else f"{key}."
    entries: dict[str, Entry] = {}
    left_out: list[str] = []
    files = {folder / METADATA}
    for full_name, info in metadata.state_dict_metadata.items():
        if not full_name.startswith(prefix):
            continue
        name = full_name[len(prefix) :]
        if not hasattr(info, "chunks"):
            left_out.append(name)
            continue
        parts = []
        for chunk in info.chunks:
            where = stored.get((full_name, tuple(chunk.offsets)))
            if where is None:
                raise CheckpointError(f"{folder}: {name}: the part at {chunk.offsets} is missing")
            file = _inside(folder, where.relative_path)
            if getattr(where, "transform_descriptors", None):
                raise CheckpointError(f"{file}: {name} is compressed, which cannot be streamed")
            if math.prod(chunk.sizes) == 0:
                continue
            files.add(file)
            tensor, place = _tensor(file, where.offset, where.length, name)
            if tuple(tensor.shape) != tuple(chunk.sizes) or tensor.dtype != info.properties.dtype:
                raise CheckpointError(
                    f"{file}: {name}: expected {tuple(chunk.sizes)} of {info.properties.dtype} by "
                    f"the metadata, found {tuple(tensor.shape)} of {tensor.dtype}"
                )
            parts.append((file, place, tuple(chunk.offsets), tuple(chunk.sizes)))
        shape, dtype = tuple(info.size), info.properties.dtype
        covered = sum(math.prod(sizes) for *_, sizes in parts)
        if covered != math.prod(shape):
            raise CheckpointError(
                f"{folder}: {name}: its parts have {covered} elements, its shape {shape} has "
                f"{math.prod(shape)}"
            )
        whole = Contiguous(*parts[0][:2]) if len(parts) == 1 else None
        entries[name] = Entry(name, dtype, shape, whole or Boxes(shape, dtype.itemsize, parts))
    if not entries:
        first = ", ".join(list(metadata.state_dict_metadata)[:5])
        raise CheckpointError(f"{folder}: expected tensors at key {key!r}, found {first}, ...")
    return entries, sorted(files), left_out


def _inside(folder: Path, relative: str) -> Path:
    path = folder / relative
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise CheckpointError(f"{folder}: its metadata points outside the folder, to {relative}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: {relative} is missing")
    return path


def _tensor(file: Path, offset: int, length: int, name: str) -> tuple[Tensor, int]:
    """The tensor in a part of a file, without memory, and the place of its elements."""
    try:
        with _Slice(file, offset, length) as part:
            tensor = offsets(part)  # type: ignore[arg-type]
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: {name}: truncated, or no tensor ({reason})") from None
    if not isinstance(tensor, Tensor) or not tensor.is_contiguous():
        raise CheckpointError(f"{file}: {name}: expected a contiguous tensor")
    first = offset + place_of(tensor)
    if first + tensor.numel() * tensor.dtype.itemsize > os.path.getsize(file):
        raise CheckpointError(f"{file}: {name} goes beyond the end of the file")
    return tensor, first
