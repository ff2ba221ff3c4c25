"""ImageNet-like datasets, decoded from their files by worker processes while the network trains.

What the workers do depends on nothing but the file and a seed that goes with it, so batches are the
same for every number of workers, and an epoch can be entered at any batch. Images travel to the
device as bytes and are normalised there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..errors import TrainError, import_extra
from .dataset import (
    Batch,
    Batches,
    Dataset,
    Normalise,
    Placement,
    balanced_share,
    check_normalise,
    validation_split,
)
from .image_files import Listing, list_images, read_rgb

# What a worker is asked for: a file, its label, and the seed of its crop; None is a test image.
_Request = tuple[str, int, int | None]


@dataclass(eq=False)
class StreamedDataset(Dataset):
    """Lists of training and test images that stay in their files.

    A training image is a random window of 8 to 100 % of the area and of an aspect ratio of 3/4 to
    4/3, resized to ``image_size`` pixels and mirrored with probability one half (Szegedy et al.,
    2015); a test image is resized to 256/224 of that along its shorter side and cut at the centre.

    Attributes:
        root: the folder of all files.
        train_files, test_files: paths below ``root``.
        image_size: side in pixels of the network's input.
        normalise: a name of :data:`~swa_fast.train.data.dataset.NORMALISATIONS`.

    Raises:
        TrainError: numbers of images and labels differ, a part is empty, or a label is not in
            0..len(classes) - 1.
    """

    root: Path
    classes: tuple[str, ...]
    train_files: tuple[str, ...]
    train_labels: Tensor
    test_files: tuple[str, ...]
    test_labels: Tensor
    image_size: int = 224
    normalise: str = "imagenet"
    fraction: float = 1.0
    skipped_files: int = 0

    def __post_init__(self) -> None:
        self._check(len(self.train_files), len(self.test_files), channels=3)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @cached_property
    def sha256(self) -> str:
        """Hash of all class names, file names and labels; the files are not read."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for files, labels in (
            (self.train_files, self.train_labels),
            (self.test_files, self.test_labels),
        ):
            digest.update(f"\n\n{len(files)}\n".encode())
            digest.update("\n".join(files).encode(errors="surrogateescape"))
            digest.update(labels.numpy().data)
        return digest.hexdigest()

    def train_batches(self, batch_size: int, placement: Placement) -> StreamedBatches:
        return StreamedBatches(self, batch_size, placement)

    def test_batches(self, batch_size: int, placement: Placement) -> Callable[[], Iterator[Batch]]:
        mine = range(placement.rank, len(self.test_files), placement.world_size)

        def requests() -> Iterator[list[_Request]]:
            for start in range(0, len(mine), batch_size):
                part = mine[start : start + batch_size]
                yield [(self.test_files[i], int(self.test_labels[i]), None) for i in part]

        return lambda: _read(self, placement, requests())


class StreamedBatches(Batches):
    """The training set of a stream in batches of randomly cropped and normalised images."""

    def __init__(self, dataset: StreamedDataset, batch_size: int, placement: Placement) -> None:
        super().__init__(len(dataset.train_files), batch_size, placement)
        self._dataset = dataset

    def _epoch(self, seed: int, parts: list[slice]) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        files, labels = self._dataset.train_files, self._dataset.train_labels
        order = torch.randperm(len(files), generator=generator)
        seeds = torch.randint(2**62, (len(files),), generator=generator)

        def requests() -> Iterator[list[_Request]]:
            for part in parts:
                drawn = zip(order[part].tolist(), seeds[part].tolist(), strict=True)
                yield [(files[i], int(labels[i]), draw) for i, draw in drawn]

        return _read(self._dataset, self._placement, requests())


def _read(
    dataset: StreamedDataset, placement: Placement, requests: Iterable[list[_Request]]
) -> Iterator[Batch]:
    """The images of each list of requests, as normalised batches on the device."""
    normalise = Normalise(dataset.statistics, dataset.image_size, placement)
    loader: DataLoader[Any] = DataLoader(
        _Decoder(dataset.root, dataset.image_size),
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
            images, labels = (part.to(placement.device, non_blocking=True) for part in batch)
            yield normalise(images), labels
    finally:
        # This ends the workers. An error's traceback would keep them until garbage is collected,
        # and then they end only after a timeout of seconds.
        del batches


class _Decoder(TorchDataset[tuple[Tensor, int] | TrainError]):
    """What a worker runs; it is asked for :data:`_Request`, so it holds no list of files."""

    def __init__(self, root: Path, image_size: int) -> None:
        self._root = root
        self._size = image_size

    def __getitem__(self, request: _Request) -> tuple[Tensor, int] | TrainError:
        """uint8 [S, S, 3] and the label. An error is a value: raised in a worker, it would arrive
        with the worker's traceback in its message."""
        name, label, seed = request
        try:
            image = read_rgb(self._root / name)
        except TrainError as error:
            return error
        return torch.from_numpy(np.array(self._cut(image, seed))), label

    def _cut(self, image: Any, seed: int | None) -> Any:
        transforms = import_extra("torchvision.transforms")
        cut, size = transforms.functional, [self._size] * 2
        if seed is None:
            resized = cut.resize(image, round(self._size * 256 / 224))
            return cut.center_crop(resized, size)
        # torchvision draws from the global generator, which is the run's without workers.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            window = transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            mirrored = bool(torch.rand(()) < 0.5)
        image = cut.resized_crop(image, *window, size)
        return cut.hflip(image) if mirrored else image


def _collate(items: Sequence[tuple[Tensor, int] | TrainError]) -> Batch | TrainError:
    """uint8 [B, S, S, 3] and int64 [B], or the first error."""
    images, labels = [], []
    for item in items:
        if isinstance(item, TrainError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def load_stream(
    folder: str | Path,
    image_size: int = 224,
    normalise: str = "dataset",
    shares: tuple[float, float] = (1.0, 1.0),
    min_per_class: int = 10,
    validation: bool = False,
) -> StreamedDataset:
    """Lists ``folder/train/<class>/**`` and ``folder/val/<class>/**``.

    If the folder holds the official archives of ILSVRC 2012, or the ``meta.bin`` that torchvision
    makes of them, ``torchvision.datasets.ImageNet`` unpacks them first. The arguments are those of
    :func:`~swa_fast.train.data.load_dataset`, whose fractions of training and test images are
    ``shares``; ``normalise="dataset"`` stands for ``imagenet``,
    since the images are not read beforehand.

    Raises:
        TrainError: torchvision is not installed, a folder is missing or has no images of a class,
            the classes of train and val differ, or archives are incomplete.
    """
    root = Path(folder).expanduser().absolute()
    check_normalise(normalise, channels=3)
    datasets = import_extra("torchvision.datasets")
    official = (root / "meta.bin").exists() or any(root.glob("ILSVRC2012_*.tar*"))
    for part in ("train", "val"):
        if official:
            try:
                datasets.ImageNet(str(root), split=part)
            # Missing archives are RuntimeErrors, missing classes FileNotFoundErrors, the devkit
            # needs scipy (ImportError).
            except Exception as error:
                raise TrainError(
                    f"{root / part}: expected images in one folder per class, found: "
                    f"{' '.join(str(error).split())}"
                ) from error
        elif not (root / part).is_dir():
            raise TrainError(
                f"{root / part}: expected a folder with one folder per class, or the archives of "
                f"ILSVRC 2012 in {root}, found none"
            )
    # The classes of the official images are their synset identifiers, since two are named "crane",
    # and two "maillot".
    train, val = list_images(root, "train", "val")
    parts = validation_split(train.labels) if validation else (None, None)

    def share(
        listing: Listing, part: Tensor | None, fraction: float
    ) -> tuple[tuple[str, ...], Tensor]:
        part = torch.arange(len(listing.files)) if part is None else part
        kept = part[balanced_share(listing.labels[part], fraction, min_per_class)]
        files = (listing.files[i].removeprefix(f"{root}{os.sep}") for i in kept.tolist())
        return tuple(file.replace(os.sep, "/") for file in files), listing.labels[kept]

    return StreamedDataset(
        root,
        train.classes,
        *share(train, parts[0], shares[0]),
        *share(train if validation else val, parts[1], shares[1]),
        image_size=image_size,
        normalise="imagenet" if normalise == "dataset" else normalise,
        fraction=shares[0],
    )
