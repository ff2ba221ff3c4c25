"""What all datasets have in common: classes, labels, normalisation, and balanced shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError
from .placement import NORMALISATIONS, Batch, Batches, Placement, Statistics

__all__ = ["Dataset", "balanced_share", "check_fraction", "check_normalise"]


class Dataset(ABC):
    """Training and test images, which make batches of themselves.

    Attributes:
        classes: class names; labels are positions in it.
        train_labels, test_labels: int64 [N].
        normalise: name of the normalisation.
        fraction: the share of a larger dataset that this one is.
        skipped_files: files of an image folder that are no images by their extension.
    """

    classes: tuple[str, ...]
    train_labels: Tensor
    test_labels: Tensor
    normalise: str
    fraction: float
    skipped_files: int

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image that the network sees."""

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation that :attr:`normalise` names, in units of pixel values."""
        mean, std = NORMALISATIONS[self.normalise]
        return [255 * value for value in mean], [255 * value for value in std]

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash that tells whether data are the same."""

    @abstractmethod
    def train_batches(self, batch_size: int, placement: Placement) -> Batches:
        """The training set in batches of ``batch_size`` images over all processes.

        Raises:
            ValueError, TrainError: as :class:`~swa_fast.train.data.placement.Batches`.
        """

    @abstractmethod
    def test_batches(self, batch_size: int, placement: Placement) -> Callable[[], Iterator[Batch]]:
        """A function that iterates over the test set in order, in batches of ``batch_size`` images
        of this process.

        Process ``rank`` takes the images rank, rank + world_size, ..., so that every image is seen
        by one process; some may see one image more than others, or none at all.
        """

    def to_json(self) -> dict[str, Any]:
        """Sizes, class names, normalisation and hash, as JSON values."""
        mean, std = self.statistics
        return {
            "train_images": len(self.train_labels),
            "test_images": len(self.test_labels),
            "image_shape": list(self.image_shape),
            "classes": list(self.classes),
            "mean": mean,
            "std": std,
            "normalise": self.normalise,
            "fraction": self.fraction,
            "skipped_files": self.skipped_files,
            "sha256": self.sha256,
        }

    def _check_labels(self, train_images: int, test_images: int) -> None:
        """Raises TrainError for a part without images, with another number of labels than images,
        or with a label that is no class; the message names the first such."""
        for what, images, labels in (
            ("training", train_images, self.train_labels),
            ("test", test_images, self.test_labels),
        ):
            if images == 0:
                raise TrainError(f"{what} images: expected 1 or more, found none")
            if labels.shape != (images,):
                raise TrainError(
                    f"{what} labels: expected one for each of {images} images, found "
                    f"{labels.numel()}"
                )
            wrong = ((labels < 0) | (labels >= len(self.classes))).nonzero()
            if len(wrong):
                first = int(wrong[0])
                raise TrainError(
                    f"{what} labels: expected 0 to {len(self.classes) - 1}, found "
                    f"{int(labels[first])} at image {first} ({len(wrong)} of {len(labels)} are out "
                    f"of range)"
                )


def check_normalise(name: str, channels: int) -> None:
    """Raises TrainError for an unknown normalisation, and for constants of three channels where
    images have another number."""
    known = ("dataset", *NORMALISATIONS)
    if name not in known:
        raise TrainError(f"--normalise: expected one of {', '.join(known)}, found {name!r}")
    if name != "dataset" and channels != 3:
        raise TrainError(
            f"--normalise: expected dataset for images of {channels} channel(s), found {name!r}, "
            f"which has constants for 3"
        )


def check_fraction(fraction: float) -> None:
    """Raises TrainError unless the fraction is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise TrainError(f"--fraction: expected a number in (0, 1], found {fraction}")


def balanced_share(labels: Tensor, fraction: float, min_per_class: int) -> Tensor:
    """Positions of a fraction of every class, always the same, in ascending order.

    A class of n images keeps round(n*fraction), at least ``min_per_class`` and at most n. They are
    the first of a fixed random order, so a smaller share is part of a larger one.

    Args:
        labels: int64 [N].
        fraction: in (0, 1].
        min_per_class: images that a class keeps at least.

    Returns:
        int64 [M].

    Raises:
        TrainError: the fraction is not in (0, 1].
    """
    check_fraction(fraction)
    if fraction == 1:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled = labels[order]
    kept = []
    for label in shuffled.unique():
        members = order[shuffled == label]
        kept.append(members[: max(min_per_class, math.floor(len(members) * fraction + 0.5))])
    return torch.cat(kept).sort().values
