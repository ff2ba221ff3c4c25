"""Datasets held in memory as bytes, and batches cut, flipped and normalised on the device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import TrainError, import_extra

__all__ = [
    "DATASETS",
    "Dataset",
    "TrainBatches",
    "channel_statistics",
    "eval_batches",
    "load_digits",
    "load_images",
]

DATASETS = ("digits", "images")

# Below 8 pixels the last stage of the networks would see 1x1 maps, and BatchNorm cannot take a
# last batch of one such image.
_MIN_SIZE = 8


@dataclass(frozen=True)
class Dataset:
    """Training and test images in memory.

    Attributes:
        classes: class names; labels are positions in it.
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N].
        pad: zero pixels added on every side before a random crop back to H x W.
        flip: whether half of the training images are mirrored left to right.
        skipped_files: files of an image folder that are no images by their extension.
    """

    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    pad: int
    flip: bool
    skipped_files: int = 0

    @cached_property
    def statistics(self) -> tuple[list[float], list[float]]:
        """:func:`channel_statistics` of the training images."""
        return channel_statistics(self.train_images)

    @cached_property
    def sha256(self) -> str:
        """Hash of all pixels, labels and class names."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for tensor in (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        ):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Sizes, class names, normalisation and hash, as JSON values."""
        mean, std = self.statistics
        return {
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
            "image_shape": list(self.train_images.shape[1:]),
            "classes": list(self.classes),
            "mean": mean,
            "std": std,
            "skipped_files": self.skipped_files,
            "sha256": self.sha256,
        }


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel, in units of the pixel values 0..255.

    Computed from exact integer sums, so the result depends on no order of summation. A constant
    channel gets the standard deviation 1, so that it can be divided by.

    Args:
        images: uint8 [N, C, H, W].
    """
    values = np.arange(256, dtype=np.int64)
    means, stds = [], []
    for channel in range(images.shape[1]):
        histogram = np.zeros(256, dtype=np.int64)
        for part in images[:, channel].split(4096):
            histogram += np.bincount(part.numpy().ravel(), minlength=256)
        count = int(histogram.sum())
        total = int((histogram * values).sum())
        squares = int((histogram * values**2).sum())
        means.append(total / count)
        # count * squares - total^2 in Python's unbounded integers: nothing cancels.
        variance = (count * squares - total**2) / count**2
        stds.append(variance**0.5 or 1.0)
    return means, stds


def load_digits() -> Dataset:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in ten classes.

    Values 0..16 are scaled to 0..255. A fifth, stratified by class, is the test set; the split is
    always the same. Training crops shift by one pixel at most, and nothing is mirrored, since a
    mirrored digit is another symbol.

    Raises:
        TrainError: scikit-learn is not installed.
    """
    digits = import_extra("sklearn.datasets").load_digits()
    split = import_extra("sklearn.model_selection").train_test_split
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Dataset(
        classes=tuple(str(name) for name in digits.target_names),
        train_images=torch.from_numpy(images[train]),
        train_labels=torch.from_numpy(labels[train]),
        test_images=torch.from_numpy(images[test]),
        test_labels=torch.from_numpy(labels[test]),
        pad=1,
        flip=False,
    )


def load_images(
    folder: str | Path,
    image_size: int | None = None,
    *,
    threads: int = 1,
    progress: Callable[[Iterator[None], int], Iterator[None]] | None = None,
) -> Dataset:
    """Reads ``folder/train/<class>/**`` and ``folder/test/<class>/**`` into memory as RGB.

    Files and folders whose name begins with a dot are ignored. Files are images if their extension
    is one that Pillow reads; others are skipped and counted. Training images are cropped after
    padding by 4 zero (black) pixels, and mirrored with probability one half.

    Args:
        folder: the folder that holds train and test.
        image_size: side in pixels that all images are resized to (bilinear, the aspect ratio is not
            kept); None expects all images to have one size.
        threads: threads that decode.
        progress: wraps the iterator over decoded files, given their number.

    Raises:
        TrainError: a folder is missing or empty, the classes of train and test differ, a file
            cannot be decoded or has another size than the first or more than 8 bits a channel; or
            Pillow is not installed. The message names the folder or file.
    """
    root = Path(folder)
    image_module = import_extra("PIL.Image")
    extensions = {
        extension
        for extension, name in image_module.registered_extensions().items()
        if name in image_module.OPEN
    }
    found = {part: _list_images(root / part, extensions) for part in ("train", "test")}
    classes = tuple(found["train"].files)
    if set(classes) != set(found["test"].files):
        differing = [
            f"only in {part}: {', '.join(names)}"
            for part, other in (("train", "test"), ("test", "train"))
            if (names := sorted(set(found[part].files) - set(found[other].files)))
        ]
        raise TrainError(
            f"{root}: expected the same classes in train and test; {'; '.join(differing)}"
        )
    if len(classes) < 2:
        raise TrainError(f"{root / 'train'}: expected 2 or more class folders, found 1")

    paths = {part: [path for name in classes for path in found[part].files[name]] for part in found}
    labels = {
        part: torch.tensor(
            [i for i, name in enumerate(classes) for _ in found[part].files[name]],
            dtype=torch.int64,
        )
        for part in found
    }
    first = paths["train"][0]
    shape = _decode(first, image_size).shape
    if min(shape[:2]) < _MIN_SIZE:
        raise TrainError(
            f"{first}: expected images of {_MIN_SIZE}x{_MIN_SIZE} pixels or more, found "
            f"{shape[1]}x{shape[0]}; --image-size N resizes"
        )
    arrays = {part: np.empty((len(paths[part]), *shape), dtype=np.uint8) for part in paths}

    def read(job: tuple[npt.NDArray[np.uint8], Path]) -> None:
        target, path = job
        image = _decode(path, image_size)
        if image.shape != shape:
            raise TrainError(
                f"{path}: expected {shape[1]}x{shape[0]} pixels like {first}, found "
                f"{image.shape[1]}x{image.shape[0]}; --image-size N resizes all images to NxN"
            )
        target[...] = image

    jobs = [job for part in paths for job in zip(arrays[part], paths[part], strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        try:
            done: Iterator[None] = pool.map(read, jobs)
            if progress is not None:
                done = progress(done, len(jobs))
            for _ in done:
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    images = {part: torch.from_numpy(array).permute(0, 3, 1, 2) for part, array in arrays.items()}
    return Dataset(
        classes=classes,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        pad=4,
        flip=True,
        skipped_files=found["train"].skipped + found["test"].skipped,
    )


@dataclass(frozen=True)
class _Listing:
    files: dict[str, list[Path]]
    skipped: int


def _list_images(folder: Path, extensions: set[str]) -> _Listing:
    """Image files below each class folder, in sorted order."""
    if not folder.is_dir():
        raise TrainError(f"{folder}: expected a folder with one folder per class, found none")
    files: dict[str, list[Path]] = {}
    skipped = 0
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            skipped += 1
            continue
        paths = []
        for where, subfolders, names in os.walk(entry):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                if name.startswith("."):
                    continue
                path = Path(where, name)
                if path.suffix.lower() in extensions:
                    paths.append(path)
                else:
                    skipped += 1
        if not paths:
            raise TrainError(f"{entry}: expected images of the class {entry.name!r}, found none")
        files[entry.name] = paths
    if not files:
        raise TrainError(f"{folder}: expected one folder per class, found none")
    return _Listing(files, skipped)


def _decode(path: Path, image_size: int | None) -> npt.NDArray[np.uint8]:
    """The image as uint8 [H, W, 3]."""
    image_module = import_extra("PIL.Image")
    try:
        with image_module.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise TrainError(
                    f"{path}: expected 8 bits per channel, found Pillow mode {image.mode}"
                )
            if image.mode in ("P", "PA"):
                # By way of RGBA: Pillow warns of palettes with transparency otherwise.
                image = image.convert("RGBA")
            image = image.convert("RGB")
            if image_size is not None and image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), image_module.Resampling.BILINEAR)
            pixels: npt.NDArray[np.uint8] = np.asarray(image)
            return pixels
    # Pillow's decoders raise SyntaxError, ValueError or struct.error on some broken files.
    except TrainError:
        raise
    except Exception as error:
        raise TrainError(f"{path}: expected a readable image, found: {error}") from error


class _Normalise:
    """uint8 [B, H, W, C] to float32 [B, C, H, W], (x - mean)/std."""

    def __init__(
        self,
        statistics: tuple[list[float], list[float]],
        device: torch.device,
        channels_last: bool,
    ) -> None:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in statistics)
        self._scale = (1 / std).float().to(device)
        self._shift = (-mean / std).float().to(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        batch = pixels.float().mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)
        return batch.contiguous(memory_format=self._format)


class TrainBatches:
    r"""The training set on a device, in batches of randomly cropped and normalised images.

    An image is padded with ``pad`` zero (black) pixels on every side, a window of its original
    size is cut at one of the :math:`(2\,\text{pad} + 1)^2` positions, and mirrored left to right
    with probability one half if ``flip``. Every epoch draws its order, positions and flips at once
    from a CPU generator of its own, so batches depend on the seed only, not on the device or on
    what ran before. The last batch may be smaller.

    Args:
        dataset: whose training images to take.
        batch_size: images per batch.
        device: where the bytes lie and the batches are made.
        channels_last: memory format of the batches.
    """

    def __init__(
        self, dataset: Dataset, *, batch_size: int, device: torch.device, channels_last: bool
    ) -> None:
        count, channels, height, width = dataset.train_images.shape
        pad = dataset.pad
        padded = torch.zeros(
            (count, height + 2 * pad, width + 2 * pad, channels), dtype=torch.uint8, device=device
        )
        inner = padded[:, pad : pad + height, pad : pad + width]
        inner.copy_(dataset.train_images.permute(0, 2, 3, 1))
        # One row per pixel: a crop is then one gather of rows.
        self._pixels = padded.view(-1, channels)
        self._labels = dataset.train_labels.to(device)
        self._padded_size = (height + 2 * pad, width + 2 * pad)
        self._size = (height, width)
        self._pad = pad
        self._flip = dataset.flip
        self._batch_size = batch_size
        self._device = device
        self._normalise = _Normalise(dataset.statistics, device, channels_last)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self._labels) // self._batch_size)

    @property
    def images(self) -> int:
        """Images per epoch."""
        return len(self._labels)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (float32 [B, C, H, W], int64 [B]) of one epoch, determined by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self._labels)
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(2 * self._pad + 1, (2, count), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        height, width = self._size
        padded_height, padded_width = self._padded_size
        corners = (order * padded_height + offsets[0]) * padded_width + offsets[1]
        order, corners, flips = (t.to(self._device) for t in (order, corners, flips))

        rows = torch.arange(height, device=self._device) * padded_width
        columns = torch.arange(width, device=self._device)
        mirrored = columns.flip(0)
        for start in range(0, count, self._batch_size):
            part = slice(start, start + self._batch_size)
            columns_of = columns.expand(len(corners[part]), width)
            if self._flip:
                columns_of = torch.where(flips[part, None], mirrored, columns_of)
            index = (corners[part, None] + rows)[:, :, None] + columns_of[:, None, :]
            pixels = self._pixels.index_select(0, index.view(-1))
            yield (
                self._normalise(pixels.view(*index.shape, -1)),
                self._labels.index_select(0, order[part]),
            )


def eval_batches(
    dataset: Dataset, *, batch_size: int, device: torch.device, channels_last: bool
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """A function that iterates over the test set in order, as normalised batches on the device
    (float32 [B, C, H, W], int64 [B])."""
    images = dataset.test_images.permute(0, 2, 3, 1).contiguous().to(device)
    labels = dataset.test_labels.to(device)
    normalise = _Normalise(dataset.statistics, device, channels_last)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            yield normalise(images[part]), labels[part]

    return batches
