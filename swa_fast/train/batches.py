"""What batches from memory and from a stream share: interface, normalisation, labels, shares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import TrainError

__all__ = [
    "NORMALISATIONS",
    "Batches",
    "Normalise",
    "Shares",
    "Statistics",
    "balanced_share",
    "check_fraction",
    "check_labels",
    "check_normalise",
    "check_rank",
    "named_statistics",
]

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


class Batches(Protocol):
    """The training set in batches on a device."""

    def __len__(self) -> int:
        """Steps per epoch."""
        ...

    @property
    def images(self) -> int:
        """Images per epoch, over all processes."""
        ...

    def epoch(self, seed: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (float32 [B, C, H, W], int64 [B]) of one epoch, determined by ``seed``.

        Args:
            seed: an integer in [0, 2^63).
            first: batches to leave out at the beginning. They are not computed, and those that
                follow have the bits that they have in the whole epoch.

        Raises:
            ValueError: ``first`` is not in 0..len.
            TrainError: an image cannot be read.
        """
        ...


@dataclass(frozen=True)
class Shares:
    """The positions of an epoch's order that each process takes at each step.

    A step's images are ``batch_size`` in succession; of these, process ``rank`` takes the positions
    rank, rank + world_size, ... The last step may have fewer images. With several processes it is
    left out if it has fewer than two for each, since BatchNorm cannot take single images of 1x1
    pixels and no process may be without work.

    Args:
        count: images in the set.
        batch_size: images per step, over all processes.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: the rank is not in 0..world_size - 1, or the batch size is below 1.
        TrainError: several processes, and a step has fewer than two images for each.
    """

    count: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, found {self.batch_size}")
        if self.world_size > 1:
            least = 2 * self.world_size
            for what, found in (("--batch-size", self.batch_size), ("training set", self.count)):
                if found < least:
                    raise TrainError(
                        f"{what}: expected {least} or more images, 2 for each of "
                        f"{self.world_size} processes, found {found}"
                    )

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-self.images // self.batch_size)

    @property
    def images(self) -> int:
        """Images per epoch, over all processes."""
        last = self.count % self.batch_size
        left_out = self.world_size > 1 and last < 2 * self.world_size
        return self.count - last if left_out else self.count

    def part(self, step: int) -> slice:
        """This process' positions at a step."""
        start = step * self.batch_size
        return slice(start + self.rank, min(start + self.batch_size, self.images), self.world_size)

    def steps(self, first: int) -> range:
        """The steps from ``first`` on.

        Raises:
            ValueError: ``first`` is not in 0..len.
        """
        if not 0 <= first <= len(self):
            raise ValueError(f"first: expected 0 to {len(self)} batches, found {first}")
        return range(first, len(self))


def check_rank(rank: int, world_size: int) -> None:
    """Raises ValueError unless the rank is in 0..world_size - 1."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected one in 0..world_size - 1, found {rank} of {world_size}")


class Normalise:
    """uint8 [B, H, W, C] to float32 [B, C, H, W], (x - mean)/std.

    Args:
        statistics: mean and standard deviation of each channel, in units of the pixel values.
        width: W.
        device: where the images lie.
        channels_last: memory format of the result.
    """

    def __init__(
        self, statistics: Statistics, *, width: int, device: torch.device, channels_last: bool
    ) -> None:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in statistics)
        # Repeated over a row, so that the innermost loop runs over W*C values and not over C.
        self._scale = (1 / std).float().repeat(width).to(device)
        self._shift = (-mean / std).float().repeat(width).to(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        rows = pixels.flatten(2).float().mul_(self._scale).add_(self._shift)
        return rows.view(pixels.shape).permute(0, 3, 1, 2).contiguous(memory_format=self._format)


def check_normalise(name: str, channels: int) -> None:
    """Checks the name of a normalisation for images of so many channels.

    Raises:
        TrainError: an unknown name, or constants of three channels for images of another number.
    """
    known = ("dataset", *NORMALISATIONS)
    if name not in known:
        raise TrainError(f"--normalise: expected one of {', '.join(known)}, found {name!r}")
    if name != "dataset" and channels != 3:
        raise TrainError(
            f"--normalise: expected dataset for images of {channels} channel(s), found {name!r}, "
            f"which has constants for 3"
        )


def named_statistics(name: str) -> Statistics:
    """The constants of :data:`NORMALISATIONS` in units of the pixel values 0..255."""
    mean, std = NORMALISATIONS[name]
    return [255 * value for value in mean], [255 * value for value in std]


def check_labels(labels: Tensor, *, images: int, classes: int, what: str) -> None:
    """Checks the labels of one part of a dataset.

    Args:
        labels: int64 [N].
        images: number of images, expected to be N.
        classes: number of classes.
        what: the part, for messages.

    Raises:
        TrainError: no images, another number of labels, or a label that is no class; the message
            names the first such.
    """
    if images == 0:
        raise TrainError(f"{what} images: expected 1 or more, found none")
    if labels.shape != (images,):
        raise TrainError(
            f"{what} labels: expected one for each of {images} images, found {labels.numel()}"
        )
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise TrainError(
            f"{what} labels: expected 0 to {classes - 1}, found {int(labels[first])} at image "
            f"{first} ({len(wrong)} of {len(labels)} are out of range)"
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
