"""What all datasets have in common: labels, normalisation, balanced shares, and how the processes
of a run share their batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError

#: Normalised images and their labels: float32 [B, C, H, W], int64 [B].
Batch = tuple[Tensor, Tensor]

#: Mean and standard deviation of each channel, in units of the pixel values 0..255.
Statistics = tuple[list[float], list[float]]

#: Mean and standard deviation of R, G and B on the scale 0..1, by name. ``cifar`` and ``imagenet``
#: are those of the SWA authors' code (for PreResNet and WRN, and for VGG and ImageNet),
#: ``pyramidnet`` those of dyhan0920/PyramidNet-PyTorch, ``shakeshake`` those of
#: hysts/pytorch_shake_shake. ``dataset``, which is not listed, means those of the training images.
NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "pyramidnet": (
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
    ),
    "shakeshake": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@dataclass(frozen=True)
class Placement:
    """Where and by whom batches are made.

    Attributes:
        device: where they lie.
        channels_last: their memory format.
        rank, world_size: this process, and the number of those that share every batch.
        workers: processes that decode image files; 0 decodes in this one.
    """

    device: torch.device
    channels_last: bool = True
    rank: int = 0
    world_size: int = 1
    workers: int = 0


class Batches(ABC):
    """The training set in batches on a device.

    An epoch draws everything random from a CPU generator of its own, so its batches depend on the
    seed only, not on the device, the workers, or what ran before. A step's images are
    ``batch_size`` in succession of the epoch's order; the last step may have fewer. Process
    ``rank`` takes the positions rank, rank + world_size, ... of them, so the batches of all
    processes are together that of a single one. With several processes the last step is left out if
    it has fewer than two images for each, since BatchNorm cannot take single images of 1x1 pixels
    and no process may be without work.

    Args:
        count: images in the set.
        batch_size: images per step, over all processes.
        placement: where they are made.

    Raises:
        TrainError: there are several processes, and a step has fewer than two images for each.
    """

    def __init__(self, count: int, batch_size: int, placement: Placement) -> None:
        least = 2 * placement.world_size if placement.world_size > 1 else 1
        for what, found in (("--batch-size", batch_size), ("training set", count)):
            if found < least:
                raise TrainError(
                    f"{what}: expected {least} or more images, 2 for each of "
                    f"{placement.world_size} processes, found {found}"
                )
        last = count % batch_size
        self.images = count - last if last < least else count
        self._batch_size = batch_size
        self._placement = placement

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-self.images // self._batch_size)

    def epoch(self, seed: int, *, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, determined by ``seed`` in [0, 2^63).

        The ``first`` batches are left out. They are not computed, and those that follow have the
        bits that they have in the whole epoch.

        Raises:
            TrainError: an image cannot be read.
        """
        parts = []
        for start in range(first * self._batch_size, self.images, self._batch_size):
            end = min(start + self._batch_size, self.images)
            parts.append(slice(start + self._placement.rank, end, self._placement.world_size))
        return self._epoch(seed, parts)

    @abstractmethod
    def _epoch(self, seed: int, parts: list[slice]) -> Iterator[Batch]:
        """The batches at these parts of the epoch's order."""


class Normalise:
    """uint8 [B, H, W, C] to float32 [B, C, H, W], (x - mean)/std.

    Args:
        statistics: mean and standard deviation of each channel, in units of the pixel values.
        width: W.
        placement: where the images lie, and the memory format of the result.
    """

    def __init__(self, statistics: Statistics, width: int, placement: Placement) -> None:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in statistics)
        # Repeated over a row, so that the innermost loop runs over W*C values and not over C.
        self._scale = (1 / std).float().repeat(width).to(placement.device)
        self._shift = (-mean / std).float().repeat(width).to(placement.device)
        last = placement.channels_last
        self._format = torch.channels_last if last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        rows = pixels.flatten(2).float().mul_(self._scale).add_(self._shift)
        return rows.view(pixels.shape).permute(0, 3, 1, 2).contiguous(memory_format=self._format)


class Dataset(ABC):
    """Training and test images, which make batches of themselves.

    Attributes:
        classes: class names; labels are positions in it.
        train_labels, test_labels: int64 [N].
        normalise: name of the normalisation.
        fraction: the share of a larger dataset's training images that this one's are.
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
            TrainError: as :class:`Batches`.
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

    def _check(self, train_images: int, test_images: int, channels: int) -> None:
        """Raises TrainError for a part without images, with another number of labels than images,
        or with a label that is no class (the message names the first such), and for a normalisation
        that does not fit."""
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
        check_normalise(self.normalise, channels)


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


def check_fraction(fraction: float, option: str = "--fraction") -> None:
    """Raises TrainError unless the fraction is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise TrainError(f"{option}: expected a number in (0, 1], found {fraction}")


def validation_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the images to train on and of the last tenth, which is held out: of all images,
    or, where they lie in the order of their classes, of every class (one image at least).

    Labels are int64 [N], positions int64 in ascending order.
    """
    if not bool((labels.diff() >= 0).all()):
        kept = len(labels) - max(1, len(labels) // 10)
        return torch.arange(kept), torch.arange(kept, len(labels))
    sizes = labels.bincount()
    left = torch.cat([torch.arange(int(n), 0, -1) for n in sizes])  # in the class, from here on
    held = left <= (sizes // 10).clamp(min=1)[labels]
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def balanced_share(labels: Tensor, fraction: float, min_per_class: int) -> Tensor:
    """Positions of a fraction of every class, always the same, in ascending order.

    A class of n images keeps round(n*fraction), at least ``min_per_class`` (or fewer, one at least,
    where that would be more than 500 images) and at most n. They are the first of a fixed random
    order, so a smaller share is part of a larger one.

    Labels are int64 [N], positions int64 [M].

    Raises:
        TrainError: the fraction is not in (0, 1].
    """
    check_fraction(fraction)
    if fraction == 1:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled = labels[order]
    kept, classes = [], shuffled.unique()
    min_per_class = min(min_per_class, max(1, 500 // len(classes)))
    for label in classes:
        members = order[shuffled == label]
        kept.append(members[: max(min_per_class, math.floor(len(members) * fraction + 0.5))])
    return torch.cat(kept).sort().values
