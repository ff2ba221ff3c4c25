"""What checkpoints that are averaged have to have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .entries import Checkpoint
from .errors import CheckpointError

__all__ = ["check_output_apart", "check_same_tensors", "is_numeric", "ties"]

# Integer tensors, and the scales beside fp8 ones, by which quantised weights are told.
_QUANTISED = re.compile(
    r"(\.|^)(qweight|qzeros|weight_packed|weight_scale_inv|weight_scale|SCB|weight_format|"
    r"\w+_scale_inv|quant_state\..+|weight\.(absmax|quant_map|quant_state\..+))$"
)
_SHOWN = 5


def is_numeric(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are averaged, not copied."""
    return dtype.is_floating_point or dtype.is_complex


def _list(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def check_same_tensors(checkpoints: Sequence[Checkpoint], any_dtype: bool) -> None:
    """Raises unless all checkpoints have the same tensors.

    Args:
        checkpoints: at least one.
        any_dtype: allow floating types that differ.

    Raises:
        CheckpointError: names, shapes or dtypes differ (the first differences are named), or a
            tensor is quantised.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        missing = [n for n in first.entries if n not in other.entries]
        extra = [n for n in other.entries if n not in first.entries]
        if missing or extra:
            parts = [f"without {_list(missing)}"] if missing else []
            parts += [f"with {_list(extra)} besides"] if extra else []
            raise CheckpointError(
                f"{other.path}: expected the tensors of {first.path}, found it {', '.join(parts)}"
            )
        shapes, dtypes = [], []
        for name, entry in first.entries.items():
            theirs = other.entries[name]
            if theirs.shape != entry.shape:
                shapes.append(f"{name} {entry.shape} and {theirs.shape}")
            kinds = [is_numeric(entry.dtype), is_numeric(theirs.dtype)]
            complexes = [entry.dtype.is_complex, theirs.dtype.is_complex]
            free = any_dtype and all(kinds) and complexes[0] == complexes[1]
            if theirs.dtype != entry.dtype and not free:
                dtypes.append(f"{name} {_short(entry.dtype)} and {_short(theirs.dtype)}")
        if shapes:
            raise CheckpointError(
                f"{first.path} and {other.path} differ in the shapes of {_list(shapes)}"
            )
        if dtypes:
            raise CheckpointError(
                f"{first.path} and {other.path} differ in the dtypes of {_list(dtypes)}; where all "
                "are floating-point types, choose the result's with dtype"
            )
    for name, entry in first.entries.items():
        if str(entry.dtype).startswith("torch.float8") or entry.dtype.itemsize < 1:
            raise CheckpointError(
                f"{first.path}: {name} is {_short(entry.dtype)}: such weights cannot be averaged; "
                "average them before they are quantised"
            )
        if _QUANTISED.search(name):
            raise CheckpointError(
                f"{first.path}: {name} belongs to quantised weights, which cannot be averaged; "
                "average them before they are quantised"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_output_apart(inputs: Sequence[Path], output: Path) -> None:
    """Raises CheckpointError if the output is an input, lies in one, or holds one."""
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if source == target or (output.exists() and os.path.samefile(path, output)):
            raise CheckpointError(f"{output}: expected another place than the inputs', found one")
        if source in target.parents and source.is_dir():
            raise CheckpointError(f"{output}: expected a place outside of the input {path}")
        if target in source.parents:
            raise CheckpointError(f"{output}: expected a place that does not hold the input {path}")


def ties(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Names of tensors that are another one in every checkpoint, and which."""
    result: dict[str, str] = {}
    for checkpoint in checkpoints:
        first: dict[object, str] = {}
        own = {
            name: first.setdefault(entry.shares, name)
            for name, entry in checkpoint.entries.items()
            if entry.shares is not None
        }
        tied = {name: of for name, of in own.items() if name != of}
        if checkpoint is checkpoints[0]:
            result = tied
        else:
            result = {name: of for name, of in result.items() if tied.get(name) == of}
    return result
