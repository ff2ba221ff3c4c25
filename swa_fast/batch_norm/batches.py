"""The batches of a pass: the model's input out of a loader's item, on its device."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from .options import Options

EMPTY = "loader: expected at least one batch, found none"


def move(item: Any, device: torch.device | None, channels_last: bool) -> Any:
    """Moves the tensors of a batch to ``device``, whatever they are nested in: lists, tuples,
    dicts, dataclasses, and objects with a method ``to``. ``channels_last`` gives images on the CPU
    that memory format. What contains no tensor that changes is handed on as it is."""
    if isinstance(item, Tensor):
        if device is not None:
            # A copy to the CPU has to be waited for. Other copies are read on their device only.
            item = item.to(device, non_blocking=device.type != "cpu")
        if channels_last and item.device.type == "cpu" and item.dim() == 4:
            item = item.contiguous(memory_format=torch.channels_last)
        return item
    if not isinstance(item, type) and callable(getattr(item, "to", None)):
        # A packed sequence among them, of which only a part moves.
        return item if device is None else item.to(device)
    if isinstance(item, list | tuple):
        values = [move(value, device, channels_last) for value in item]
        if all(new is old for new, old in zip(values, item, strict=True)):
            return item
        if isinstance(item, list):
            copied = copy.copy(item)
            copied[:] = values
            return copied
        return item._make(values) if hasattr(item, "_make") else type(item)(values)
    if isinstance(item, dict):
        changes = _changed(item, device, channels_last)
        if not changes:
            return item
        return _updated(item, changes)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        fields = {
            field.name: getattr(item, field.name)
            for field in dataclasses.fields(item)
            if hasattr(item, field.name)
        }
        changes = _changed(fields, device, channels_last)
        if not changes:
            return item
        replaced = copy.copy(item)
        for name, value in changes.items():
            object.__setattr__(replaced, name, value)  # frozen ones, too
        return replaced
    return item


def _updated(original: dict[Any, Any], changes: dict[Any, Any]) -> dict[Any, Any]:
    copied = original.copy()
    copied.update(changes)
    return copied


def _changed(
    values: Mapping[Any, Any], device: torch.device | None, channels_last: bool
) -> dict[Any, Any]:
    moved = {key: move(value, device, channels_last) for key, value in values.items()}
    return {key: value for key, value in moved.items() if value is not values[key]}


def in_order(loader: Any) -> bool:
    """Whether a loader is known to read its data in the order in which they are stored."""
    if not isinstance(loader, DataLoader):
        return False
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, DistributedSampler) and not sampler.shuffle
    )


def tensors_of(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for value in item:
            yield from tensors_of(value)
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        for field in dataclasses.fields(item):
            yield from tensors_of(getattr(item, field.name, None))


def describe(item: Any) -> str:
    if isinstance(item, list | tuple | Mapping):
        values = item.values() if isinstance(item, Mapping) else item
        kinds = sorted({type(value).__name__ for value in values})
        name = type(item).__name__
        return f"a {name} of {', '.join(kinds)}" if kinds else f"an empty {name}"
    return type(item).__name__


class Loader:
    """The batches of the pass as the model's inputs."""

    def __init__(self, loader: Iterable[Any], options: Options) -> None:
        self.iterator = iter(loader)
        self.in_order = in_order(loader)
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
        """Selects and moves what the model, or the user's call, is handed: of a list or tuple the
        first element, as torch does, and anything else as it is.

        Raises:
            TypeError: the batch is an empty list or tuple.
        """
        options = self.options
        item = batch
        if options.call is None and not options.whole_batch and isinstance(batch, list | tuple):
            if not batch:
                raise TypeError(
                    f"loader: expected batches whose first element is the model's input, found an "
                    f"empty {type(batch).__name__} in batch {index}; call= runs models with other "
                    "inputs"
                )
            item = batch[0]
        return move(item, options.device, self.channels_last)
