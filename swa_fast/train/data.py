"""Datasets by name, held in memory as bytes, and batches cut, flipped and normalised on the device.

Only ``imagenet`` does not fit: see :mod:`.stream`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import (
    Batches,
    Normalise,
    Shares,
    Statistics,
    balanced_share,
    check_fraction,
    check_labels,
    check_normalise,
    check_rank,
    named_statistics,
)
from .errors import TrainError, import_extra
from .files import check_same_classes, list_images, read_rgb
from .stream import StreamedBatches, StreamedDataset, load_stream, stream_eval_batches

__all__ = [
    "DATASETS",
    "Dataset",
    "TrainBatches",
    "channel_statistics",
    "eval_batches",
    "load_dataset",
    "load_digits",
    "load_images",
    "load_synthetic",
    "load_torchvision",
    "train_batches",
]

DATASETS = ("digits", "images", "cifar10", "cifar100", "fashion-mnist", "imagenet", "synthetic")

#: Wraps the iterator over decoded files, given their number.
Wrap = Callable[[Iterator[None], int], Iterator[None]]

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
        normalise: ``dataset``, which takes mean and standard deviation of the training images, or
            a name of :data:`~swa_fast.train.batches.NORMALISATIONS`.
        fraction: the share of a larger dataset that this one is.

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
    pad: int
    flip: bool
    skipped_files: int = 0
    normalise: str = "dataset"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        for what, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            check_labels(labels, images=len(images), classes=len(self.classes), what=what)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise TrainError(
                f"test images: expected the shape of the training images, "
                f"{self.image_shape}, found {tuple(self.test_images.shape[1:])}"
            )
        check_normalise(self.normalise, self.image_shape[0])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def train_count(self) -> int:
        """Number of training images."""
        return len(self.train_images)

    @property
    def test_count(self) -> int:
        """Number of test images."""
        return len(self.test_images)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and standard deviation that :attr:`normalise` names, in units of the pixel values;
        for ``dataset`` :func:`channel_statistics` of the training images."""
        if self.normalise == "dataset":
            return channel_statistics(self.train_images)
        return named_statistics(self.normalise)

    def share(self, fraction: float, min_per_class: int) -> Dataset:
        """The :func:`~swa_fast.train.batches.balanced_share` of the training and test images."""
        if fraction == 1:
            return self
        train = balanced_share(self.train_labels, fraction, min_per_class)
        test = balanced_share(self.test_labels, fraction, min_per_class)
        return dataclasses.replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
            fraction=fraction,
        )

    def resized(self, image_size: int) -> Dataset:
        """The same images at ``image_size`` x ``image_size`` pixels (bilinear over all pixels that
        a new one covers, the aspect ratio is not kept). The padding of crops stays as it is."""
        if self.image_shape[1:] == (image_size, image_size):
            return self
        return dataclasses.replace(
            self,
            train_images=_resize(self.train_images, image_size),
            test_images=_resize(self.test_images, image_size),
        )

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
            "normalise": self.normalise,
            "fraction": self.fraction,
            "skipped_files": self.skipped_files,
            "sha256": self.sha256,
        }


def channel_statistics(images: Tensor) -> Statistics:
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


def _resize(images: Tensor, image_size: int) -> Tensor:
    """uint8 [N, C, H, W] to uint8 [N, C, image_size, image_size]."""
    out = torch.empty((*images.shape[:2], image_size, image_size), dtype=torch.uint8)
    for start in range(0, len(images), 1024):
        part = slice(start, start + 1024)
        out[part] = F.interpolate(
            images[part], size=(image_size, image_size), mode="bilinear", antialias=True
        )
    return out


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    normalise: str = "dataset",
    fraction: float = 1.0,
    min_per_class: int = 10,
    threads: int = 1,
    progress: Wrap | None = None,
) -> Dataset | StreamedDataset:
    """The dataset of a name.

    Args:
        name: one of :data:`DATASETS`.
        data_dir: where its files are. None stands for ``data/<name>`` in the working directory for
            those that torchvision downloads; ``images`` and ``imagenet`` need a folder, ``digits``
            and ``synthetic`` have none.
        image_size: side in pixels that images are brought to; None leaves them as they are
            (``imagenet``: 224).
        normalise: ``dataset``, i.e. mean and standard deviation of the training images (for
            ``imagenet``, whose images are not read beforehand, the constants ``imagenet``), or a
            name of :data:`~swa_fast.train.batches.NORMALISATIONS`.
        fraction: share of the training and of the test images to take, the same of every class.
        min_per_class: images that every class keeps at least, whatever the fraction.
        threads: threads that decode ``images``.
        progress: wraps the iterator over decoded ``images``, given their number.

    Raises:
        TrainError: an unknown name, a value out of its range, or files that are missing, cannot be
            downloaded or cannot be used; the message says which, and what was expected.
    """
    if name not in DATASETS:
        raise TrainError(f"--dataset: expected one of {', '.join(DATASETS)}, found {name!r}")
    if image_size is not None and image_size < _MIN_SIZE:
        raise TrainError(f"--image-size: expected {_MIN_SIZE} or more pixels, found {image_size}")
    check_fraction(fraction)
    if name in ("images", "imagenet") and data_dir is None:
        expected = "train/<class>/ and " + ("test" if name == "images" else "val") + "/<class>/"
        raise TrainError(
            f"--data-dir: expected a folder with {expected} for --dataset {name}, found nothing"
        )
    if name in ("digits", "synthetic") and data_dir is not None:
        raise TrainError(
            f"--data-dir: expected none with --dataset {name}, which has no files, found {data_dir}"
        )

    if name == "imagenet":
        assert data_dir is not None
        return load_stream(
            data_dir,
            image_size=image_size or 224,
            normalise=normalise,
            fraction=fraction,
            min_per_class=min_per_class,
        )
    if name == "digits":
        dataset = load_digits()
    elif name == "synthetic":
        dataset = load_synthetic(image_size=image_size or 32)
    elif name == "images":
        assert data_dir is not None
        dataset = load_images(data_dir, image_size, threads=threads, progress=progress)
    else:
        dataset = load_torchvision(name, Path("data", name) if data_dir is None else data_dir)
    dataset = dataclasses.replace(dataset, normalise=normalise).share(fraction, min_per_class)
    return dataset if image_size is None else dataset.resized(image_size)


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


#: The class of torchvision.datasets and the folder below its root for each name.
_TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
}


def load_torchvision(name: str, folder: str | Path) -> Dataset:
    """CIFAR-10, CIFAR-100 or Fashion-MNIST by way of torchvision, which downloads what is missing.

    CIFAR (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels, RGB.
    Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 and 10,000 of 28x28 pixels, grey.
    Training images are cropped after padding by 4 zero (black) pixels, and mirrored with
    probability one half.

    Args:
        name: ``cifar10``, ``cifar100`` or ``fashion-mnist``.
        folder: torchvision's root, made if need be.

    Raises:
        TrainError: torchvision is not installed, or the files can neither be read nor downloaded.
    """
    kind, below = _TORCHVISION[name]
    make = getattr(import_extra("torchvision.datasets"), kind)
    parts = []
    try:
        with warnings.catch_warnings():
            # NumPy 2.4.0 to 2.4.4 warns of dtypes as old as those in CIFAR's files.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            parts = [make(str(folder), train=train, download=True) for train in (True, False)]
    # Network, archive, pickle and index errors have no common base.
    except Exception as error:
        raise TrainError(
            f"{folder}: expected the files of {kind} in {below}, or to download them there, found: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; where there is no network, "
            f"put the files there by hand, and remove broken ones"
        ) from error
    images, labels = [], []
    for part in parts:
        pixels = torch.as_tensor(part.data)
        images.append(pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2))
        labels.append(torch.as_tensor(part.targets, dtype=torch.int64))
    try:
        return Dataset(
            classes=tuple(parts[0].classes),
            train_images=images[0],
            train_labels=labels[0],
            test_images=images[1],
            test_labels=labels[1],
            pad=4,
            flip=True,
        )
    except TrainError as error:
        raise TrainError(f"{Path(folder, below)}: {error}") from error


def load_synthetic(
    *,
    classes: int = 10,
    image_size: int = 32,
    train_images: int = 5000,
    test_images: int = 1000,
    seed: int = 0,
) -> Dataset:
    """Images made up on the spot, to try everything without files.

    An image is a smooth colour pattern, a sum of the cosines of lowest frequency, whose 27
    coefficients are its class' own plus 1.5 times random ones, and noise on every pixel: classes
    overlap a little. Labels take turns, so all classes have the same number of images up to one.

    Args:
        classes: number of classes.
        image_size: side in pixels.
        train_images: number of training images.
        test_images: number of test images.
        seed: of everything random.
    """
    generator = np.random.default_rng(seed)
    angles = np.pi * (np.arange(image_size) + 0.5) / image_size
    waves = np.cos(np.arange(3)[:, None] * angles)
    centres = generator.standard_normal((classes, 3, 3, 3))

    def make(count: int) -> tuple[Tensor, Tensor]:
        labels = np.arange(count, dtype=np.int64) % classes
        images = np.empty((count, 3, image_size, image_size), dtype=np.uint8)
        for start in range(0, count, 256):
            part = slice(start, start + 256)
            own = centres[labels[part]]
            coefficients = own + 1.5 * generator.standard_normal(own.shape)
            values = np.einsum("ncij,iy,jx->ncyx", coefficients, waves, waves, optimize=True)
            values = 128 + 12 * values + 20 * generator.standard_normal(values.shape)
            images[part] = np.clip(np.round(values), 0, 255).astype(np.uint8)
        return torch.from_numpy(images), torch.from_numpy(labels)

    train, test = make(train_images), make(test_images)
    names = tuple(f"pattern {i}" for i in range(classes))
    return Dataset(names, *train, *test, pad=4, flip=True)


def load_images(
    folder: str | Path,
    image_size: int | None = None,
    *,
    threads: int = 1,
    progress: Wrap | None = None,
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
    found = {part: list_images(root / part) for part in ("train", "test")}
    classes = tuple(found["train"].files)
    check_same_classes(root, {part: listing.files for part, listing in found.items()})
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


def _decode(path: Path, image_size: int | None) -> npt.NDArray[np.uint8]:
    """The image as uint8 [H, W, 3]."""
    image = read_rgb(path)
    if image_size is not None and image.size != (image_size, image_size):
        bilinear = import_extra("PIL.Image").Resampling.BILINEAR
        image = image.resize((image_size, image_size), bilinear)
    pixels: npt.NDArray[np.uint8] = np.asarray(image)
    return pixels


class TrainBatches:
    r"""The training set on a device, in batches of randomly cropped and normalised images.

    An image is padded with ``pad`` zero (black) pixels on every side, a window of its original
    size is cut at one of the :math:`(2\,\text{pad} + 1)^2` positions, and mirrored left to right
    with probability one half if ``flip``. Every epoch draws its order, positions and flips at once
    from a CPU generator of its own, so batches depend on the seed only, not on the device or on
    what ran before. The last batch may be smaller. The batches of all processes at a step are
    together that of a single process; see :class:`~swa_fast.train.batches.Shares`.

    Args:
        dataset: whose training images to take.
        batch_size: images per step, over all processes.
        device: where the bytes lie and the batches are made.
        channels_last: memory format of the batches.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError, TrainError: as :class:`~swa_fast.train.batches.Shares`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        device: torch.device,
        channels_last: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        count, channels, height, width = dataset.train_images.shape
        pad = dataset.pad
        self._shares = Shares(count, batch_size, rank, world_size)
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
        self._device = device
        self._normalise = Normalise(
            dataset.statistics, width=width, device=device, channels_last=channels_last
        )

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self._shares)

    @property
    def images(self) -> int:
        """Images per epoch, over all processes."""
        return self._shares.images

    def epoch(self, seed: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`Batches.epoch <swa_fast.train.batches.Batches.epoch>`."""
        return self._epoch(seed, self._shares.steps(first))

    def _epoch(self, seed: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
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
        for step in steps:
            part = self._shares.part(step)
            columns_of = columns.expand(len(corners[part]), width)
            if self._flip:
                columns_of = torch.where(flips[part, None], mirrored, columns_of)
            index = (corners[part, None] + rows)[:, :, None] + columns_of[:, None, :]
            pixels = self._pixels.index_select(0, index.view(-1))
            yield (
                self._normalise(pixels.view(*index.shape, -1)),
                self._labels.index_select(0, order[part]),
            )


def train_batches(
    dataset: Dataset | StreamedDataset,
    *,
    batch_size: int,
    device: torch.device,
    channels_last: bool,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
) -> Batches:
    """The training set of either kind of dataset in batches.

    Args:
        dataset: whose training images to take.
        batch_size: images per step, over all processes.
        device: where the batches are made.
        channels_last: memory format of the batches.
        rank: this process.
        world_size: number of processes.
        workers: processes that decode a streamed dataset; 0 decodes in this one.

    Raises:
        ValueError, TrainError: as :class:`~swa_fast.train.batches.Shares`.
    """
    if isinstance(dataset, StreamedDataset):
        return StreamedBatches(
            dataset,
            batch_size=batch_size,
            device=device,
            channels_last=channels_last,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
    return TrainBatches(
        dataset,
        batch_size=batch_size,
        device=device,
        channels_last=channels_last,
        rank=rank,
        world_size=world_size,
    )


def eval_batches(
    dataset: Dataset | StreamedDataset,
    *,
    batch_size: int,
    device: torch.device,
    channels_last: bool,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """A function that iterates over the test set in order, as normalised batches on the device
    (float32 [B, C, H, W], int64 [B]).

    Process ``rank`` takes the images rank, rank + world_size, ..., so that every image is seen by
    one process; some may see one image more than others, or none at all.

    Args:
        dataset: whose test images to take.
        batch_size: images per batch of this process.
        device: where the batches are made.
        channels_last: memory format of the batches.
        rank: this process.
        world_size: number of processes.
        workers: processes that decode a streamed dataset; 0 decodes in this one.

    Raises:
        ValueError: the rank is not in 0..world_size - 1.
    """
    check_rank(rank, world_size)
    if isinstance(dataset, StreamedDataset):
        return stream_eval_batches(
            dataset,
            batch_size=batch_size,
            device=device,
            channels_last=channels_last,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
    mine = slice(rank, None, world_size)
    images = dataset.test_images[mine].permute(0, 2, 3, 1).contiguous().to(device)
    labels = dataset.test_labels[mine].to(device)
    normalise = Normalise(
        dataset.statistics,
        width=dataset.image_shape[2],
        device=device,
        channels_last=channels_last,
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            yield normalise(images[part]), labels[part]

    return batches
