"""Where datasets in memory come from: packages, folders of images, or nothing but a seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import TrainError, import_extra
from .image_files import list_images, read_rgb
from .memory import MemoryDataset

#: Wraps the iterator over decoded files, given their number.
Wrap = Callable[[Iterator[None], int], Iterator[None]]

#: Least side of images. Below it the last stage of the networks would see 1x1 maps, and BatchNorm
#: cannot take a last batch of one such image.
MIN_SIZE = 8


def load_digits() -> MemoryDataset:
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
    parts = [torch.from_numpy(x[part]) for part in (train, test) for x in (images, labels)]
    return MemoryDataset(tuple(map(str, digits.target_names)), *parts, pad=1, flip=False)


#: The class of torchvision.datasets and the folder below its root for each name.
_TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
}


def load_torchvision(name: str, folder: str | Path) -> MemoryDataset:
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
    tensors = []
    for part in parts:
        pixels = torch.as_tensor(part.data)
        tensors.append(pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2))
        tensors.append(torch.as_tensor(part.targets, dtype=torch.int64))
    try:
        return MemoryDataset(tuple(parts[0].classes), *tensors, pad=4, flip=True)
    except TrainError as error:
        raise TrainError(f"{Path(folder, below)}: {error}") from error


def load_synthetic(
    *,
    classes: int = 10,
    image_size: int = 32,
    train_images: int = 5000,
    test_images: int = 1000,
    seed: int = 0,
) -> MemoryDataset:
    """Images made up on the spot, to try everything without files.

    An image is a smooth colour pattern, a sum of the cosines of lowest frequency, whose 27
    coefficients are its class' own plus 1.5 times random ones, and noise on every pixel: classes
    overlap a little. Labels take turns, so all classes have the same number of images up to one.
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
    return MemoryDataset(names, *train, *test, pad=4, flip=True)


def load_images(
    folder: str | Path,
    image_size: int | None = None,
    *,
    threads: int = 1,
    progress: Wrap | None = None,
) -> MemoryDataset:
    """Reads ``folder/train/<class>/**`` and ``folder/test/<class>/**`` into memory as RGB.

    Files and folders whose name begins with a dot are ignored. Files are images if their extension
    is one of BMP, GIF, JPEG, PNG, PPM, TIFF or WebP; others are skipped and counted. Training
    images are cropped after padding by 4 zero (black) pixels, and mirrored with probability one
    half.

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
    train, test = list_images(root, "train", "test")
    if len(train.classes) < 2:
        raise TrainError(f"{root / 'train'}: expected 2 or more class folders, found 1")
    first = train.files[0]
    shape = _decode(first, image_size).shape
    if min(shape[:2]) < MIN_SIZE:
        raise TrainError(
            f"{first}: expected images of {MIN_SIZE}x{MIN_SIZE} pixels or more, found "
            f"{shape[1]}x{shape[0]}; --image-size N resizes"
        )
    pixels = np.empty((len(train.files) + len(test.files), *shape), dtype=np.uint8)

    def read(target: npt.NDArray[np.uint8], path: str) -> None:
        image = _decode(path, image_size)
        if image.shape != shape:
            raise TrainError(
                f"{path}: expected {shape[1]}x{shape[0]} pixels like {first}, found "
                f"{image.shape[1]}x{image.shape[0]}; --image-size N resizes all images to NxN"
            )
        target[...] = image

    with ThreadPoolExecutor(threads) as pool:
        try:
            done: Iterator[None] = pool.map(read, pixels, train.files + test.files)
            for _ in done if progress is None else progress(done, len(pixels)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    parts = images[: len(train.files)], train.labels, images[len(train.files) :], test.labels
    skipped = train.skipped + test.skipped
    return MemoryDataset(train.classes, *parts, pad=4, flip=True, skipped_files=skipped)


def _decode(path: str, image_size: int | None) -> npt.NDArray[np.uint8]:
    """The image as uint8 [H, W, 3]."""
    image = read_rgb(path)
    if image_size is not None and image.size != (image_size, image_size):
        bilinear = import_extra("PIL.Image").Resampling.BILINEAR
        image = image.resize((image_size, image_size), bilinear)
    pixels: npt.NDArray[np.uint8] = np.asarray(image)
    return pixels
