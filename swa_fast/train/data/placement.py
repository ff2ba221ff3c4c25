"""Where batches are made, and which images each process takes at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TrainError

__all__ = ["NORMALISATIONS", "Batch", "Batches", "Normalise", "Placement", "Statistics"]

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

    Raises:
        ValueError: the rank is not in 0..world_size - 1.
    """

    device: torch.device
    channels_last: bool = True
    rank: int = 0
    world_size: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank: expected one in 0..world_size - 1, found {self.rank} of {self.world_size}"
            )


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
        ValueError: the batch size is below 1.
        TrainError: there are several processes, and a step has fewer than two images for each.
    """

    def __init__(self, count: int, batch_size: int, placement: Placement) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, found {batch_size}")
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
        self._rank, self._world_size = placement.rank, placement.world_size

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-self.images // self._batch_size)

    def epoch(self, seed: int, *, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, determined by ``seed`` in [0, 2^63).

        The ``first`` batches are left out. They are not computed, and those that follow have the
        bits that they have in the whole epoch.

        Raises:
            ValueError: ``first`` is not in 0..len.
            TrainError: an image cannot be read.
        """
        if not 0 <= first <= len(self):
            raise ValueError(f"first: expected 0 to {len(self)} batches, found {first}")
        return self._epoch(seed, [self._part(step) for step in range(first, len(self))])

    def _part(self, step: int) -> slice:
        """Positions of this process in the epoch's order."""
        start = step * self._batch_size
        end = min(start + self._batch_size, self.images)
        return slice(start + self._rank, end, self._world_size)

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
