"""Checkpoints written so that at any moment the output is either not there or complete."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import safetensors
from .entries import bytes_of
from .errors import CheckpointError
from .formats import TORCH_SUFFIXES, weights_name
from .torch_files import offsets, place_of

__all__ = ["Layout", "Output"]

_COPIED = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_NOT_COPIED = {"trainer_state.json", "results.json"}
_PARTIAL = "swa_fast-partial"

# Name, dtype and shape.
Tensors = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]


class Layout:
    """In which file of the output each tensor lies.

    Args:
        tensors: in the order in which they are written.
        path: of the output: a file, by its suffix, or a folder.
        stem: of the names of files in a folder.
        shard_size: most bytes of a file in a folder, but for a tensor that is larger.
    """

    def __init__(self, tensors: Tensors, path: Path, stem: str, shard_size: int) -> None:
        self.is_folder = path.suffix not in (".safetensors", *TORCH_SUFFIXES)
        self.is_torch = path.suffix in TORCH_SUFFIXES
        if shard_size < 1:
            raise CheckpointError(f"shard_size: expected at least 1 byte, found {shard_size}")
        self.shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
        self.total = held = 0
        for tensor in tensors:
            size = math.prod(tensor[2]) * tensor[1].itemsize
            if self.is_folder and self.shards[-1] and held + size > shard_size:
                self.shards.append([])
                held = 0
            self.shards[-1].append(tensor)
            held += size
            self.total += size
        count = len(self.shards)
        self.names = [path.name]
        if self.is_folder:
            self.names = [f"{stem}.safetensors"]
            if count > 1:
                numbers = range(1, count + 1)
                self.names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in numbers]
        self.index = f"{stem}.safetensors.index.json" if count > 1 else None


class Output:
    """A checkpoint that is being written; a context manager that removes it unless it was
    committed.

    It grows under a hidden name beside ``path``, which the next attempt takes over if the process
    was killed.

    Args:
        path: where it will be.
        layout: its files.
        ties: names and which tensor they are, too.
        overwrite: replace what is there.

    Raises:
        CheckpointError: ``path`` is there and ``overwrite`` is false, or is something else than a
            checkpoint; another process is writing it; there is no room for it.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, layout: Layout, ties: Mapping[str, str], *, overwrite: bool
    ) -> None:
        self.path, self._layout, self._ties = path, layout, ties
        check_output(path, layout, overwrite)
        self._partial = path.with_name(f".{path.name}.{_PARTIAL}")
        self._locks: list[int] = []
        self._files: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._metadata: dict[str, str] | None = None

    def open(self, metadata: Mapping[str, str]) -> None:
        """Makes the files at their full size. ``metadata`` is what :meth:`commit` will be given,
        or as long."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._create(metadata)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.path.parent).free
            raise CheckpointError(
                f"{self.path}: expected room for {self._layout.total:,} bytes on its disk, found "
                f"{free:,}"
            ) from None

    def _create(self, metadata: Mapping[str, str]) -> None:
        if self._layout.is_folder:
            self._partial.mkdir(exist_ok=True)
            self._lock(os.open(self._partial, os.O_RDONLY))
            for left in self._partial.iterdir():
                left.unlink()
        for number, tensors in enumerate(self._layout.shards):
            file = os.open(self._file(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._files.append(file)
            if not self._layout.is_folder:
                self._lock(os.dup(file))
                if not os.path.samestat(os.fstat(file), os.stat(self._partial)):
                    # Between opening and locking it another process put it in its place.
                    raise CheckpointError(f"{self.path}: another process has just written it")
            os.ftruncate(file, 0)
            if self._layout.is_torch:
                places = self._start_torch(number, tensors)
            else:
                start, places = safetensors.header(tensors, metadata)
                _write(file, start, 0)
            size = os.fstat(file).st_size
            for (name, dtype, shape), place in zip(tensors, places, strict=True):
                self._places[name] = number, place
                size = max(size, place + math.prod(shape) * dtype.itemsize)
            if size:
                # Now rather than at the end: a full disk is known before the work.
                os.posix_fallocate(file, 0, size)

    def _start_torch(self, number: int, tensors: Tensors) -> list[int]:
        """A file of :func:`torch.save` without the values; gives the places of the tensors."""
        # Never touched, so it takes addresses and no memory.
        state = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in tensors}
        state.update({alias: state[name] for alias, name in self._ties.items()})
        with torch.serialization.skip_data(), open(self._file(number), "wb") as file:
            torch.save(state, file)
        del state
        found = offsets(self._file(number))
        return [place_of(found[name]) for name, *_ in tensors]

    def _file(self, number: int) -> Path:
        return (
            self._partial / self._layout.names[number]
            if self._layout.is_folder
            else (self._partial)
        )

    def _lock(self, descriptor: int) -> None:
        self._locks.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._partial = Path(os.devnull)  # it is not ours to remove
            raise CheckpointError(f"{self.path}: another process is writing it") from None

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Writes bytes of a tensor, from its byte ``offset`` on."""
        number, place = self._places[name]
        _write(self._files[number], content, place + offset)

    def read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that was written."""
        number, place = self._places[name]
        result = torch.empty(shape, dtype=dtype)
        if result.numel():
            view = bytes_of(result)
            done = 0
            while done < len(view):
                done += os.preadv(self._files[number], [view[done:]], place + done)
        return result

    def commit(self, metadata: Mapping[str, str], companions: Sequence[Path], dtype: str) -> None:
        """Puts the output in its place.

        Args:
            metadata: text to store beside the tensors, as long as that of :meth:`open`.
            companions: files to copy into a folder: configuration and tokenizer.
            dtype: of the weights, for the configuration; "keep" leaves it.
        """
        if not self._layout.is_torch:
            for number, tensors in enumerate(self._layout.shards):
                start, places = safetensors.header(tensors, metadata)
                if places and places[0] != self._places[tensors[0][0]][1]:
                    raise AssertionError("the metadata changed its length")
                _write(self._files[number], start, 0)
        else:
            _seal(self._file(0), self._files[0])
        for file in self._files:
            os.fsync(file)
        if not self._layout.is_folder:
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
            return
        for source in companions:
            _copy(source, self._partial / source.name, dtype)
        if self._layout.index is not None:
            _write_text(self._partial / self._layout.index, self._index())
        _sync_folder(self._partial)
        try:
            os.rename(self._partial, self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._replace()
        _sync_folder(self.path.parent)

    def _index(self) -> str:
        where = {
            name: file
            for file, tensors in zip(self._layout.names, self._layout.shards, strict=True)
            for name, *_ in tensors
        }
        content = {"metadata": {"total_size": self._layout.total}, "weight_map": where}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def _replace(self) -> None:
        """Exchanges the weights in a folder that is there, and leaves everything else in it. What
        names the weights goes first and comes last, so that old and new shards are never taken for
        one checkpoint."""
        for name in own_files(self.path):
            (self.path / name).unlink()
        names = [f.name for f in self._partial.iterdir()]
        last = self._layout.index or self._layout.names[0]
        for name in sorted(names, key=lambda n: n == last):
            os.replace(self._partial / name, self.path / name)
        _sync_folder(self.path)
        self._partial.rmdir()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        # The lock is held until the files are gone.
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._layout.is_folder and self._partial.is_dir():
                shutil.rmtree(self._partial)
            elif self._partial.name.endswith(_PARTIAL):
                self._partial.unlink()
        for descriptor in self._locks:
            os.close(descriptor)


def _seal(path: Path, file: int) -> None:
    """Corrects the checksums of tensors in a file of :func:`torch.save`, a zip archive: they were
    made before the values. torch does not look at them, programs for archives do."""
    with zipfile.ZipFile(path) as archive:
        members, at = archive.infolist(), archive.start_dir
    # The directory at the end lists the members in the order of infolist().
    for member in members:
        if "/data/" in member.filename:
            names = os.pread(file, 4, member.header_offset + 26)
            lengths = [int.from_bytes(names[i : i + 2], "little") for i in (0, 2)]
            start, crc = member.header_offset + 30 + sum(lengths), 0
            end = start + member.file_size
            for first in range(start, end, 1 << 20):
                crc = zlib.crc32(os.pread(file, min(1 << 20, end - first), first), crc)
            sealed = crc.to_bytes(4, "little")
            os.pwrite(file, sealed, at + 16)
            if member.flag_bits & 8:  # it follows the data
                assert os.pread(file, 4, end) == b"PK\x07\x08"
                os.pwrite(file, sealed, end + 4)
            else:
                os.pwrite(file, sealed, member.header_offset + 14)
        fields = os.pread(file, 6, at + 28)
        at += 46 + sum(int.from_bytes(fields[i : i + 2], "little") for i in (0, 2, 4))


def check_output(path: Path, layout: Layout, overwrite: bool) -> None:
    """Raises CheckpointError unless the output may be written at ``path``."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() != layout.is_folder:
        kind, found = ("folder", "file") if layout.is_folder else ("file", "folder")
        raise CheckpointError(f"{path}: expected to write a {kind}, found a {found} there")
    if not overwrite:
        raise CheckpointError(f"{path}: expected nothing there, found a {_kind(path)}; --force "
                              "(overwrite=True) replaces it")  # fmt: skip
    if path.is_dir() and weights_name(path) is None:
        raise CheckpointError(f"{path}: expected a folder with weights to replace, found none")


def _kind(path: Path) -> str:
    return "folder that is not empty" if path.is_dir() else "file"


def own_files(folder: Path) -> list[str]:
    """The weights in a Hugging Face folder and, first, what names them."""
    name = weights_name(folder)
    if name is None:
        return []
    result = [name]
    if name.endswith(".index.json"):
        with suppress(ValueError, KeyError, AttributeError):
            shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            safe = {s for s in shards if Path(s).name == s and (folder / s).is_file()}
            result += sorted(safe)
    return result


def companions_of(folder: Path) -> list[Path]:
    """Configuration, tokenizer and code beside the weights in a folder."""
    if not folder.is_dir():
        return []
    return sorted(
        f
        for f in folder.iterdir()
        if f.is_file()
        and f.suffix in _COPIED
        and not f.name.endswith(".index.json")
        and f.name not in _NOT_COPIED
        and not f.name.startswith(".")
    )


def _copy(source: Path, target: Path, dtype: str) -> None:
    if source.name == "config.json" and dtype != "keep":
        with suppress(ValueError):
            content: Any = json.loads(source.read_text(encoding="utf-8"))
            keys = [k for k in ("dtype", "torch_dtype") if k in content]
            content.update(dict.fromkeys(keys, dtype))
            _write_text(target, json.dumps(content, indent=2) + "\n")
            return
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write(file: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
