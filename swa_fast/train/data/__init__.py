"""Datasets by name.

All are held in memory as bytes (:mod:`.memory`), but for ``imagenet``, which does not fit
(:mod:`.streamed`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import TrainError
from ..factories import is_factory
from .dataset import NORMALISATIONS, Batch, Batches, Dataset, Placement, check_fraction
from .own import load_own
from .sources import MIN_SIZE, Wrap, load_digits, load_images, load_synthetic, load_torchvision
from .streamed import load_stream

__all__ = [
    "DATASETS",
    "NORMALISATIONS",
    "Batch",
    "Batches",
    "Dataset",
    "Placement",
    "Wrap",
    "check_data_options",
    "load_dataset",
]

DATASETS = ("digits", "images", "cifar10", "cifar100", "fashion-mnist", "imagenet", "synthetic")


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    normalise: str = "dataset",
    fraction: float = 1.0,
    test_fraction: float | None = None,
    noise: float = 0.0,
    min_per_class: int = 10,
    validation: bool = False,
    threads: int = 1,
    progress: Wrap | None = None,
) -> Dataset:
    """The dataset of a name.

    Args:
        name: one of :data:`DATASETS`, or ``package.module:factory``, see
            :func:`~swa_fast.train.data.own.load_own`.
        data_dir: where its files are. None stands for ``data/<name>`` in the working directory for
            those that torchvision downloads; ``images`` and ``imagenet`` need a folder, ``digits``
            and ``synthetic`` have none.
        image_size: side in pixels that images are brought to; None leaves them as they are
            (``imagenet``: 224).
        normalise: ``dataset``, i.e. mean and standard deviation of the training images (for
            ``imagenet``, whose images are not read beforehand, the constants ``imagenet``), or a
            name of :data:`~swa_fast.train.data.dataset.NORMALISATIONS`.
        fraction: share of the training and of the test images to take, the same of every class.
        test_fraction: that of the test images, if it is another one.
        noise: standard deviation of Gaussian noise that is added to all images once and for all, in
            grey values of 255: an easy task becomes harder.
        min_per_class: images that every class keeps at least, whatever the fraction.
        validation: whether the last tenth of the training images takes the test set's place, see
            :func:`~swa_fast.train.data.dataset.validation_split`.
        threads: threads that decode ``images``.
        progress: wraps the iterator over decoded ``images``, given their number.

    Raises:
        TrainError: an unknown name, a value out of its range, or files that are missing, cannot be
            downloaded or cannot be used; the message says which, and what was expected.
    """
    check_data_options(name, data_dir, image_size, fraction, test_fraction, noise, normalise)
    shares = (fraction, fraction if test_fraction is None else test_fraction)
    if is_factory(name):
        return load_own(name, shares, min_per_class, validation)
    if name == "imagenet":
        assert data_dir is not None
        size = image_size or 224
        return load_stream(data_dir, size, normalise, shares, min_per_class, validation)
    if name == "digits":
        dataset = load_digits()
    elif name == "synthetic":
        dataset = load_synthetic(image_size=image_size or 32)
    elif name == "images":
        assert data_dir is not None
        dataset = load_images(data_dir, image_size, threads=threads, progress=progress)
    else:
        dataset = load_torchvision(name, Path("data", name) if data_dir is None else data_dir)
    dataset = dataset.held_out() if validation else dataset
    dataset = dataclasses.replace(dataset, normalise=normalise).share(*shares, min_per_class)
    dataset = dataset if image_size is None else dataset.resized(image_size)
    return dataset.noisy(noise) if noise > 0 else dataset


def check_data_options(
    name: str,
    data_dir: str | Path | None,
    image_size: int | None,
    fraction: float,
    test_fraction: float | None = None,
    noise: float = 0.0,
    normalise: str = "dataset",
) -> None:
    """Raises TrainError for a value out of its range, and for a folder that is missing or not
    needed. The arguments are those of :func:`load_dataset`."""
    if is_factory(name):
        for option, found, expected in (
            ("--data-dir", data_dir, None),
            ("--image-size", image_size, None),
            ("--noise", noise, 0.0),
            ("--normalise", normalise, "dataset"),
        ):
            if found != expected:
                raise TrainError(
                    f"{option}: expected none with a dataset of one's own, whose transforms do "
                    f"all, found {found}"
                )
    elif name not in DATASETS:
        raise TrainError(f"--dataset: expected one of {', '.join(DATASETS)}, found {name!r}")
    if image_size is not None and image_size < MIN_SIZE:
        raise TrainError(f"--image-size: expected {MIN_SIZE} or more pixels, found {image_size}")
    check_fraction(fraction)
    if test_fraction is not None:
        check_fraction(test_fraction, "--test-fraction")
    if not 0 <= noise <= 255:
        raise TrainError(f"--noise: expected grey values in [0, 255], found {noise}")
    if noise > 0 and name == "imagenet":
        raise TrainError(f"--noise: expected 0 for images that are read anew, found {noise}")
    if name in ("images", "imagenet") and data_dir is None:
        expected = "train/<class>/ and " + ("test" if name == "images" else "val") + "/<class>/"
        raise TrainError(
            f"--data-dir: expected a folder with {expected} for --dataset {name}, found nothing"
        )
    if name in ("digits", "synthetic") and data_dir is not None:
        raise TrainError(
            f"--data-dir: expected none with --dataset {name}, which has no files, found {data_dir}"
        )
