"""The safetensors format: headers read with care, and written.

A file is the header's length (8 bytes, little-endian), the header (JSON: for each tensor its dtype,
shape and place in the data; ``__metadata__`` of text), and the data, without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .entries import Contiguous, Entry
from .errors import CheckpointError

__all__ = ["DTYPES", "header", "read_header"]

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"the name {twice!r} appears twice in the header")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file in the order of their data, and its metadata.

    Raises:
        CheckpointError: the file is truncated, its header is not what the format says, or its
            tensors leave holes, overlap or go beyond its end.
        OSError: it cannot be read.
    """
    try:
        return _read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"expected at least 8 bytes of safetensors, found {size}")
        length = int.from_bytes(start, "little")
        if not 2 <= length <= _LONGEST_HEADER or length > size - 8:
            raise CheckpointError(
                f"expected a safetensors header of at most {min(_LONGEST_HEADER, size - 8)} bytes "
                f"in this file of {size}, found a length of {length}: it is truncated or something "
                "else"
            )
        text = file.read(length)
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its safetensors header is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError("its safetensors header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__: expected text by name")
    data = 8 + length
    placed = sorted(
        ((_entry(path, name, info, data), info) for name, info in content.items()),
        key=lambda item: (item[1]["data_offsets"], item[0].name),
    )
    end, previous = 0, "the header"
    for entry, info in placed:
        first, stop = info["data_offsets"]
        if first != end:
            what = "overlaps" if first < end else "leaves a hole after"
            raise CheckpointError(f"{entry.name}, at {first}, {what} {previous}, ending at {end}")
        end, previous = stop, entry.name
    if data + end != size:
        what = "is truncated" if data + end > size else "has bytes of no tensor at its end"
        raise CheckpointError(
            f"its tensors end at {data + end} and the file at {size} bytes: it {what}"
        )
    return {entry.name: entry for entry, _ in placed}, metadata


def _entry(path: Path, name: str, info: Any, data: int) -> Entry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name}: expected dtype, shape and data_offsets, found {info!r:.80}")
    shape, offsets, kind = info["shape"], info["data_offsets"], info["dtype"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{name}: expected a shape, found {shape!r:.80}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise CheckpointError(f"{name}: expected two data_offsets, found {offsets!r:.80}")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(
            f"{name}: expected a dtype that can be averaged or copied ({', '.join(DTYPES)}), found "
            f"{kind!r:.40}; average the weights before they are quantised"
        )
    dtype = DTYPES[kind]
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{name}: {kind} of shape {shape} takes {expected} bytes, its data_offsets "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(name, dtype, tuple(shape), Contiguous(path, data + offsets[0]))


def header(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The beginning of a file with these tensors one after the other.

    Returns:
        Everything before the data, and the place in the file of each tensor.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    ends = [0]
    for name, dtype, shape in tensors:
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        content[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": ends[-2:],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends[:-1]]
