"""A user's own datasets, with their own transforms."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from ..errors import TrainError
from ..factories import call_factory
from .dataset import (
    Batch,
    Batches,
    Dataset,
    Placement,
    Statistics,
    balanced_share,
    validation_split,
)

# What a worker is asked for: an item, and the seed of what its transforms draw.
_Request = tuple[int, int]


@dataclass(eq=False)
class OwnDataset(Dataset):
    """A training and a test set of items ``(input, label)``: a tensor, the same shape for all, and
    an integer. What their transforms draw is a function of the seed of the run, the epoch and the
    item, for torch's, numpy's and Python's generators; whatever else is random is not repeatable.

    Attributes:
        name: ``package.module:factory``.
        train, test: the sets.
        train_items, test_items: which of their items are used.
    """

    name: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    train_items: Tensor
    train_labels: Tensor
    test_items: Tensor
    test_labels: Tensor
    normalise: str = "dataset"
    fraction: float = 1.0
    skipped_files: int = 0

    def __post_init__(self) -> None:
        self._check(len(self.train_items), len(self.test_items), channels=3)

    @cached_property
    def image_shape(self) -> Any:
        """The shape of every input, whatever its number of dimensions."""
        return tuple(_item(self.train, 0, 0)[0].shape)

    @property
    def statistics(self) -> Statistics:
        """None: the transforms normalise."""
        return [], []

    @cached_property
    def sha256(self) -> str:
        """Hash of the factory's name, of which items there are and of their labels; what the items
        hold is not read."""
        digest = hashlib.sha256("\n".join((self.name, *self.classes)).encode())
        parts = (self.train_items, self.train_labels, self.test_items, self.test_labels)
        for part in parts:
            digest.update(f"\n{len(part)}\n".encode())
            digest.update(part.numpy().data)
        return digest.hexdigest()

    def train_batches(self, batch_size: int, placement: Placement) -> OwnBatches:
        return OwnBatches(self, batch_size, placement)

    def test_batches(self, batch_size: int, placement: Placement) -> Callable[[], Iterator[Batch]]:
        mine = self.test_items[placement.rank :: placement.world_size].tolist()

        def requests() -> Iterator[list[_Request]]:
            for start in range(0, len(mine), batch_size):
                yield [(item, item) for item in mine[start : start + batch_size]]

        return lambda: _read(self.test, placement, requests())


class OwnBatches(Batches):
    """The training set in batches, in an order drawn anew for each epoch."""

    def __init__(self, dataset: OwnDataset, batch_size: int, placement: Placement) -> None:
        super().__init__(len(dataset.train_items), batch_size, placement)
        self._dataset = dataset

    def _epoch(self, seed: int, parts: list[slice]) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        items = self._dataset.train_items
        order = items[torch.randperm(len(items), generator=generator)]
        seeds = torch.randint(2**62, (len(items),), generator=generator)

        def requests() -> Iterator[list[_Request]]:
            for part in parts:
                yield list(zip(order[part].tolist(), seeds[part].tolist(), strict=True))

        return _read(self._dataset.train, self._placement, requests())


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """All generators that transforms use have this seed, and their own states again afterwards."""
    python, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)


def _item(items: Any, index: int, seed: int) -> tuple[Tensor, int]:
    with _drawing(seed):
        found = items[index]
    if not (isinstance(found, Sequence) and len(found) == 2 and isinstance(found[0], Tensor)):
        raise TrainError(
            f"--dataset: expected items of a tensor and a label, found {_described(found)} at item "
            f"{index} (a transform such as torchvision's ToTensor makes a tensor of an image)"
        )
    return found[0], int(found[1])


def _described(found: Any) -> str:
    if isinstance(found, Sequence) and not isinstance(found, str):
        return "(" + ", ".join(type(x).__name__ for x in found) + ")"
    return type(found).__name__


class _Items(TorchDataset[tuple[Tensor, int] | TrainError]):
    """What a worker runs. Errors travel as values: the loader would wrap them."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __getitem__(self, request: _Request) -> tuple[Tensor, int] | TrainError:
        try:
            return _item(self._items, *request)
        except TrainError as error:
            return error


def _collate(found: list[tuple[Tensor, int] | TrainError]) -> Any:
    errors = [each for each in found if isinstance(each, TrainError)]
    return errors[0] if errors else default_collate(found)


def _read(items: Any, placement: Placement, requests: Iterable[list[_Request]]) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Items(items),
        batch_sampler=requests,
        num_workers=placement.workers,
        collate_fn=_collate,
        pin_memory=placement.device.type == "cuda",
        # Not the global one, from which a loader would draw.
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, TrainError):
                raise batch
            inputs, labels = (part.to(placement.device, non_blocking=True) for part in batch)
            if inputs.dim() == 4 and placement.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, labels
    finally:
        # As for images that are decoded by workers: this ends them.
        del batches


def _labels(items: Any, part: str) -> Tensor:
    """The labels of a set: its ``targets`` or ``labels``, or else those of its items, which are
    then all read once."""
    for name in ("targets", "labels"):
        found = getattr(items, name, None)
        if found is not None and len(found) == len(items):
            return torch.as_tensor(found).long()
    try:
        return torch.tensor([_item(items, i, i)[1] for i in range(len(items))], dtype=torch.int64)
    except TypeError as error:
        raise TrainError(
            f"--dataset: expected a {part} set with a length, found {type(items).__name__}"
        ) from error


def load_own(
    name: str,
    shares: tuple[float, float] = (1.0, 1.0),
    min_per_class: int = 10,
    validation: bool = False,
) -> OwnDataset:
    """The dataset of a factory: a function without arguments, or with defaults for all, that
    returns a training and a test set, as torch's: with ``len`` and items ``(tensor, label)``,
    labels from 0 on. The training set's ``classes`` are the names of the classes, if it has them.

    Raises:
        TrainError: there is no such factory, it raised, or returned something else.
    """
    found = call_factory("--dataset", name)
    if not (isinstance(found, Sequence) and len(found) == 2):
        raise TrainError(
            f"--dataset: expected {name} to return a training and a test set, found "
            f"{_described(found)}"
        )
    train, test = found
    labels, test_labels = _labels(train, "training"), _labels(test, "test")
    if len(labels) == 0 or len(test_labels) == 0:
        raise TrainError(
            f"--dataset: expected items in both sets, found {len(labels)} and {len(test_labels)}"
        )
    count = int(max(labels.max(), test_labels.max())) + 1
    classes = tuple(map(str, getattr(train, "classes", None) or range(count)))
    kept, tested = torch.arange(len(labels)), torch.arange(len(test_labels))
    if validation:
        kept, tested = validation_split(labels)
        test, test_labels = train, labels
    kept = kept[balanced_share(labels[kept], shares[0], min_per_class)]
    tested = tested[balanced_share(test_labels[tested], shares[1], min_per_class)]
    return OwnDataset(
        *(name, train, test, classes, kept, labels[kept], tested, test_labels[tested]),
        fraction=shares[0],
    )
