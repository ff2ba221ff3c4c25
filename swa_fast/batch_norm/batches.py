"""The batches of a pass: the model's input out of a loader's item, on its device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .options import Options

EMPTY = "loader: expected at least one batch, found none"


def move(item: Any, device: torch.device | None, channels_last: bool) -> Any:
    """Moves the tensors of a batch to ``device``, whatever they are nested in. ``channels_last``
    gives images on the CPU that memory format."""
    if isinstance(item, Tensor):
        if device is not None:
            # A copy to the CPU has to be waited for. Other copies are read on their device only.
            item = item.to(device, non_blocking=device.type != "cpu")
        if channels_last and item.device.type == "cpu" and item.dim() == 4:
            item = item.contiguous(memory_format=torch.channels_last)
        return item
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(move(value, device, channels_last) for value in item))
    if isinstance(item, list | tuple):
        return type(item)(move(value, device, channels_last) for value in item)
    if isinstance(item, dict):
        moved = {key: move(value, device, channels_last) for key, value in item.items()}
        return moved if type(item) is dict else _like(item, moved)
    if device is not None and callable(getattr(item, "to", None)):
        return item.to(device)
    return item


def _like(original: dict[Any, Any], values: dict[Any, Any]) -> dict[Any, Any]:
    copy = original.copy()
    copy.update(values)
    return copy


def tensors_of(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for value in item:
            yield from tensors_of(value)
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from tensors_of(value)


def _describe(item: Any) -> str:
    if isinstance(item, Mapping) and item:
        kinds = sorted({type(value).__name__ for value in item.values()})
        return f"a {type(item).__name__} of {', '.join(kinds)}"
    if isinstance(item, list | tuple) and item:
        kinds = sorted({type(value).__name__ for value in item})
        return f"a {type(item).__name__} of {', '.join(kinds)}"
    if isinstance(item, list | tuple | Mapping):
        return f"an empty {type(item).__name__}"
    return type(item).__name__


class Loader:
    """The batches of the pass as the model's inputs."""

    def __init__(self, loader: Iterable[Any], options: Options) -> None:
        self.iterator = iter(loader)
        self.options = options
        self.channels_last = bool(options.channels_last)

    def __iter__(self) -> Iterator[Any]:
        # islice reads no batch more than is used: one that is read too early would be lost.
        return itertools.islice(self.iterator, self.options.max_batches)

    def first(self) -> Any:
        """Reads the first batch, which the iteration afterwards starts with."""
        batch = next(self.iterator, self)
        if batch is self:
            raise ValueError(EMPTY)
        self.iterator = itertools.chain([batch], self.iterator)
        return batch

    def input_of(self, batch: Any, index: int) -> Any:
        """Selects and moves what the model, or the user's call, is handed.

        Raises:
            TypeError: the batch contains no tensor.
        """
        options = self.options
        item = batch
        if options.call is None and not options.whole_batch and isinstance(batch, list | tuple):
            item = batch[0] if batch else None
        if (
            options.call is None
            and not hasattr(item, "to")
            and not any(True for _ in tensors_of(item))
        ):
            raise TypeError(
                "loader: expected batches whose input is a tensor or contains one, found "
                f"{_describe(batch)} in batch {index}"
            )
        return move(item, options.device, self.channels_last)
