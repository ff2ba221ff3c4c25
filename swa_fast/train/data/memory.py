"""Datasets held in memory as bytes; batches are cut, flipped and normalised on the device."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TrainError
from .dataset import (
    Batch,
    Batches,
    Dataset,
    Normalise,
    Placement,
    Statistics,
    balanced_share,
    validation_split,
)


@dataclass(eq=False)
class MemoryDataset(Dataset):
    """Training and test images in memory.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W].
        pad: zero pixels added on every side before a random crop back to H x W.
        flip: whether half of the training images are mirrored left to right.
        normalise: ``dataset``, which takes mean and standard deviation of the training images, or
            a name of :data:`~swa_fast.train.data.dataset.NORMALISATIONS`.

    Raises:
        TrainError: numbers of images and labels differ, a part is empty, a label is not in
            0..len(classes) - 1, the parts' images differ in shape, or the normalisation is unknown
            or does not fit the number of channels.
    """

    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    _: KW_ONLY
    pad: int
    flip: bool
    skipped_files: int = 0
    normalise: str = "dataset"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        self._check(len(self.train_images), len(self.test_images), self.image_shape[0])
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise TrainError(
                f"test images: expected the shape of the training images, "
                f"{self.image_shape}, found {tuple(self.test_images.shape[1:])}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @cached_property
    def statistics(self) -> Statistics:
        """As the base class has it; those of the training images for ``dataset``."""
        if self.normalise == "dataset":
            return channel_statistics(self.train_images)
        return super().statistics

    @cached_property
    def sha256(self) -> str:
        """Hash of all pixels, labels and class names."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()

    def share(self, fraction: float, test_fraction: float, min_per_class: int) -> MemoryDataset:
        """The :func:`~swa_fast.train.data.dataset.balanced_share` of training and test images."""
        if fraction == test_fraction == 1:
            return self
        train = balanced_share(self.train_labels, fraction, min_per_class)
        test = balanced_share(self.test_labels, test_fraction, min_per_class)
        return dataclasses.replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
            fraction=fraction,
        )

    def held_out(self) -> MemoryDataset:
        """The training set without its
        :func:`~swa_fast.train.data.dataset.validation_split`, which takes the test set's place."""
        train, held = validation_split(self.train_labels)
        return dataclasses.replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )

    def resized(self, image_size: int) -> MemoryDataset:
        """The same images at ``image_size`` x ``image_size`` pixels (bilinear over all pixels that
        a new one covers, the aspect ratio is not kept). The padding of crops stays as it is."""
        if self.image_shape[1:] == (image_size, image_size):
            return self
        return dataclasses.replace(
            self,
            train_images=_resize(self.train_images, image_size),
            test_images=_resize(self.test_images, image_size),
        )

    def noisy(self, deviation: float) -> MemoryDataset:
        """The same images with Gaussian noise of this standard deviation, the same at every call,
        rounded and clamped to 0..255."""
        generator = torch.Generator().manual_seed(0)

        def add(images: Tensor) -> Tensor:
            noise = torch.randn(images.shape, generator=generator).mul_(deviation)
            return noise.add_(images).round_().clamp_(0, 255).to(torch.uint8)

        return dataclasses.replace(
            self, train_images=add(self.train_images), test_images=add(self.test_images)
        )

    def train_batches(self, batch_size: int, placement: Placement) -> MemoryBatches:
        return MemoryBatches(self, batch_size, placement)

    def test_batches(self, batch_size: int, placement: Placement) -> Callable[[], Iterator[Batch]]:
        mine = slice(placement.rank, None, placement.world_size)
        images = self.test_images[mine].permute(0, 2, 3, 1).contiguous().to(placement.device)
        labels = self.test_labels[mine].to(placement.device)
        normalise = Normalise(self.statistics, self.image_shape[2], placement)

        def batches() -> Iterator[Batch]:
            for start in range(0, len(labels), batch_size):
                part = slice(start, start + batch_size)
                yield normalise(images[part]), labels[part]

        return batches


class MemoryBatches(Batches):
    r"""The training set on a device, in batches of randomly cropped and normalised images.

    An image is padded with ``pad`` zero (black) pixels on every side, a window of its original
    size is cut at one of the :math:`(2\,\text{pad} + 1)^2` positions, and mirrored left to right
    with probability one half if ``flip``.
    """

    def __init__(self, dataset: MemoryDataset, batch_size: int, placement: Placement) -> None:
        count, channels, height, width = dataset.train_images.shape
        super().__init__(count, batch_size, placement)
        self._pad, self._flip = dataset.pad, dataset.flip
        device = placement.device
        self._size = (height, width)
        self._padded_size = (height + 2 * self._pad, width + 2 * self._pad)
        padded = torch.zeros(
            (count, *self._padded_size, channels), dtype=torch.uint8, device=device
        )
        inner = padded[:, self._pad : self._pad + height, self._pad : self._pad + width]
        inner.copy_(dataset.train_images.permute(0, 2, 3, 1))
        # One row per pixel: a crop is then one gather of rows.
        self._pixels = padded.view(-1, channels)
        self._labels = dataset.train_labels.to(device)
        self._normalise = Normalise(dataset.statistics, width, placement)

    def _epoch(self, seed: int, parts: list[slice]) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        device, count = self._placement.device, len(self._labels)
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(2 * self._pad + 1, (2, count), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        height, width = self._size
        padded_height, padded_width = self._padded_size
        corners = (order * padded_height + offsets[0]) * padded_width + offsets[1]
        order, corners, flips = (t.to(device) for t in (order, corners, flips))

        rows = torch.arange(height, device=device) * padded_width
        columns = torch.arange(width, device=device)
        mirrored = columns.flip(0)
        for part in parts:
            columns_of = columns.expand(len(corners[part]), width)
            if self._flip:
                columns_of = torch.where(flips[part, None], mirrored, columns_of)
            index = (corners[part, None] + rows)[:, :, None] + columns_of[:, None, :]
            pixels = self._pixels.index_select(0, index.view(-1))
            yield (
                self._normalise(pixels.view(*index.shape, -1)),
                self._labels.index_select(0, order[part]),
            )


def channel_statistics(images: Tensor) -> Statistics:
    """Mean and population standard deviation of each channel, in units of the pixel values 0..255.

    Computed from exact integer sums, so the result depends on no order of summation. A constant
    channel gets the standard deviation 1, so that it can be divided by.

    Args:
        images: uint8 [N, C, H, W].
    """
    values = torch.arange(256)
    means, stds = [], []
    for channel in images.unbind(1):
        histogram = torch.bincount(channel.flatten(), minlength=256)
        count, total, squares = (int((histogram * values**k).sum()) for k in range(3))
        means.append(total / count)
        # count * squares - total^2 in Python's unbounded integers: nothing cancels.
        variance = (count * squares - total**2) / count**2
        stds.append(variance**0.5 or 1.0)
    return means, stds


def _resize(images: Tensor, image_size: int) -> Tensor:
    """uint8 [N, C, H, W] to uint8 [N, C, image_size, image_size]."""
    return F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
