"""ImageNet-like datasets, decoded from their files by worker processes while the network trains.

What the workers do depends on nothing but the file and a seed that goes with it, so batches are the
same for every number of workers, and an epoch can be entered at any batch. Images travel to the
device as bytes and are normalised there.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .batches import (
    Normalise,
    Shares,
    Statistics,
    balanced_share,
    check_labels,
    check_normalise,
    named_statistics,
)
from .errors import TrainError, import_extra
from .files import check_same_classes, read_rgb

__all__ = [
    "StreamedBatches",
    "StreamedDataset",
    "crop_window",
    "load_stream",
    "stream_eval_batches",
]

# What a worker is asked for: a file, its label, and the seed of its crop; None is a test image.
_Request = tuple[str, int, int | None]


@dataclass(frozen=True)
class StreamedDataset:
    """Lists of training and test images that stay in their files.

    A training image is a random window of 8 to 100 % of the area and of an aspect ratio of 3/4 to
    4/3, resized to ``image_size`` pixels and mirrored with probability one half (Szegedy et al.,
    2015); a test image is resized to 256/224 of that along its shorter side and cut at the centre.

    Attributes:
        root: the folder of all files.
        classes: names of the class folders; labels are positions in it.
        train_files, test_files: paths below ``root``.
        train_labels, test_labels: int64 [N].
        image_size: side in pixels of the network's input.
        normalise: a name of :data:`~swa_fast.train.batches.NORMALISATIONS`.
        fraction: the share of a larger dataset that this one is.
        skipped_files: always 0, as with datasets that are no image folders.

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
        for what, files, labels in (
            ("training", self.train_files, self.train_labels),
            ("test", self.test_files, self.test_labels),
        ):
            check_labels(labels, images=len(files), classes=len(self.classes), what=what)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image that the network sees."""
        return 3, self.image_size, self.image_size

    @property
    def train_count(self) -> int:
        """Number of training images."""
        return len(self.train_files)

    @property
    def test_count(self) -> int:
        """Number of test images."""
        return len(self.test_files)

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation that :attr:`normalise` names, in units of pixel values."""
        return named_statistics(self.normalise)

    @cached_property
    def sha256(self) -> str:
        """Hash of all class names, file names and labels; the files are not read."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for files, labels in (
            (self.train_files, self.train_labels),
            (self.test_files, self.test_labels),
        ):
            digest.update(f"\n\n{len(files)}\n".encode())
            digest.update("\n".join(files).encode())
            digest.update(labels.numpy().data)
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Sizes, class names, normalisation and hash, as JSON values."""
        mean, std = self.statistics
        return {
            "train_images": self.train_count,
            "test_images": self.test_count,
            "image_shape": list(self.image_shape),
            "classes": list(self.classes),
            "mean": mean,
            "std": std,
            "normalise": self.normalise,
            "fraction": self.fraction,
            "skipped_files": self.skipped_files,
            "sha256": self.sha256,
        }


def load_stream(
    folder: str | Path,
    *,
    image_size: int = 224,
    normalise: str = "dataset",
    fraction: float = 1.0,
    min_per_class: int = 10,
) -> StreamedDataset:
    """Lists ``folder/train/<class>/**`` and ``folder/val/<class>/**``.

    If the folder holds the official archives of ILSVRC 2012, or the ``meta.bin`` that torchvision
    makes of them, ``torchvision.datasets.ImageNet`` unpacks them first.

    Args:
        folder: the folder that holds train and val.
        image_size: side in pixels of the network's input.
        normalise: a name of :data:`~swa_fast.train.batches.NORMALISATIONS`; ``dataset`` stands for
            ``imagenet``, since the images are not read beforehand.
        fraction: share of every class of train and val to take.
        min_per_class: images that a class keeps at least.

    Raises:
        TrainError: torchvision is not installed, a folder is missing or has no images of a class,
            the classes of train and val differ, or archives are incomplete.
    """
    root = Path(folder).expanduser().absolute()
    check_normalise(normalise, channels=3)
    datasets = import_extra("torchvision.datasets")
    official = (root / "meta.bin").exists() or any(root.glob("ILSVRC2012_*.tar*"))
    found: dict[str, Any] = {}
    for part in ("train", "val"):
        if not official and not (root / part).is_dir():
            raise TrainError(
                f"{root / part}: expected a folder with one folder per class, or the archives of "
                f"ILSVRC 2012 in {root}, found none"
            )
        try:
            found[part] = (
                datasets.ImageNet(str(root), split=part)
                if official
                else datasets.ImageFolder(str(root / part))
            )
        # Missing archives are RuntimeErrors, missing classes FileNotFoundErrors, the devkit needs
        # scipy (ImportError).
        except Exception as error:
            raise TrainError(
                f"{root / part}: expected images in one folder per class, found: "
                f"{' '.join(str(error).split())}"
            ) from error

    # Of the official classes the synset identifiers: two are named "crane", and two "maillot".
    classes = {part: getattr(found[part], "wnids", found[part].classes) for part in found}
    check_same_classes(root, classes)
    files: dict[str, tuple[str, ...]] = {}
    labels: dict[str, Tensor] = {}
    for part, listing in found.items():
        all_labels = torch.tensor(listing.targets, dtype=torch.int64)
        kept = balanced_share(all_labels, fraction, min_per_class)
        # Not by way of Path, which takes ten seconds for the paths of ImageNet.
        files[part] = tuple(
            listing.samples[i][0].removeprefix(f"{root}{os.sep}").replace(os.sep, "/")
            for i in kept.tolist()
        )
        labels[part] = all_labels[kept]
    return StreamedDataset(
        root=root,
        classes=tuple(classes["train"]),
        train_files=files["train"],
        train_labels=labels["train"],
        test_files=files["val"],
        test_labels=labels["val"],
        image_size=image_size,
        normalise="imagenet" if normalise == "dataset" else normalise,
        fraction=fraction,
    )


def crop_window(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """A random window of 8 to 100 % of the area, with an aspect ratio of 3/4 to 4/3.

    The area is uniform and the ratio uniform in its logarithm; what does not fit is drawn again.
    After ten failures it is the largest window at the centre with a ratio in the range, as in
    ``torchvision.transforms.RandomResizedCrop``.

    Returns:
        (top, left, height, width) in pixels.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w


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
        transforms = import_extra("torchvision.transforms.functional")
        size = self._size
        if seed is None:
            resized = transforms.resize(image, round(size * 256 / 224))
            return transforms.center_crop(resized, [size, size])
        draw = random.Random(seed)
        top, left, height, width = crop_window(image.width, image.height, draw)
        cut = transforms.resized_crop(image, top, left, height, width, [size, size])
        return transforms.hflip(cut) if draw.random() < 0.5 else cut


def _collate(
    items: Sequence[tuple[Tensor, int] | TrainError],
) -> tuple[Tensor, Tensor] | TrainError:
    """uint8 [B, S, S, 3] and int64 [B], or the first error."""
    images, labels = [], []
    for item in items:
        if isinstance(item, TrainError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


class _Reader:
    """Turns lists of requests into normalised batches on the device."""

    def __init__(
        self,
        dataset: StreamedDataset,
        *,
        device: torch.device,
        channels_last: bool,
        workers: int,
    ) -> None:
        self._decoder = _Decoder(dataset.root, dataset.image_size)
        self._device = device
        self._workers = workers
        self._normalise = Normalise(
            dataset.statistics,
            width=dataset.image_size,
            device=device,
            channels_last=channels_last,
        )

    def read(self, requests: Sequence[list[_Request]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of each list, in order."""
        loader: DataLoader[Any] = DataLoader(
            self._decoder,
            batch_sampler=requests,
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            # Not the global one, from which a loader would draw.
            generator=torch.Generator().manual_seed(0),
        )
        for images, labels in self._on_device(iter(loader)):
            yield self._normalise(images), labels

    def _on_device(
        self, batches: Iterator[tuple[Tensor, Tensor] | TrainError]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the device; on CUDA the next one is copied while this one is worked on."""
        try:
            if self._device.type != "cuda":
                for batch in batches:
                    yield _raised(batch)
                return
            side = torch.cuda.Stream(self._device)
            ahead: _Copied | None = None
            for batch in batches:
                images, labels = _raised(batch)
                with torch.cuda.stream(side):
                    copied = _Copied(
                        images.to(self._device, non_blocking=True),
                        labels.to(self._device, non_blocking=True),
                        side.record_event(),
                    )
                if ahead is not None:
                    yield ahead.joined()
                ahead = copied
            if ahead is not None:
                yield ahead.joined()
        finally:
            # This ends the workers. An error's traceback would keep them until garbage is
            # collected, and then they end only after a timeout of seconds.
            del batches


@dataclass(frozen=True)
class _Copied:
    """A batch that a side stream copies to the device."""

    images: Tensor
    labels: Tensor
    done: torch.cuda.Event

    def joined(self) -> tuple[Tensor, Tensor]:
        """The batch, for use on the current stream, which waits for this copy and no later one."""
        current = torch.cuda.current_stream(self.images.device)
        current.wait_event(self.done)
        for tensor in (self.images, self.labels):
            tensor.record_stream(current)
        return self.images, self.labels


def _raised(batch: tuple[Tensor, Tensor] | TrainError) -> tuple[Tensor, Tensor]:
    if isinstance(batch, TrainError):
        raise batch
    return batch


class StreamedBatches:
    """The training set of a stream in batches of randomly cropped and normalised images.

    Every epoch draws its order and a seed for every image at once from a CPU generator of its own,
    so batches depend on the seed only, not on the number of workers or on what ran before. The last
    batch may be smaller. The batches of all processes at a step are together that of a single
    process; see :class:`~swa_fast.train.batches.Shares`.

    Args:
        dataset: whose training images to take.
        batch_size: images per step, over all processes.
        device: where the batches are made.
        channels_last: memory format of the batches.
        rank: this process.
        world_size: number of processes.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError, TrainError: as :class:`~swa_fast.train.batches.Shares`.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        *,
        batch_size: int,
        device: torch.device,
        channels_last: bool,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 4,
    ) -> None:
        self._dataset = dataset
        self._shares = Shares(dataset.train_count, batch_size, rank, world_size)
        self._reader = _Reader(dataset, device=device, channels_last=channels_last, workers=workers)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self._shares)

    @property
    def images(self) -> int:
        """Images per epoch, over all processes."""
        return self._shares.images

    def epoch(self, seed: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`Batches.epoch <swa_fast.train.batches.Batches.epoch>`."""
        generator = torch.Generator().manual_seed(seed)
        count = self._dataset.train_count
        order = torch.randperm(count, generator=generator)
        seeds = torch.randint(2**62, (count,), generator=generator)
        files, labels = self._dataset.train_files, self._dataset.train_labels
        requests = _Requests(
            lambda step: [
                (files[i], int(labels[i]), draw)
                for i, draw in zip(
                    order[self._shares.part(step)].tolist(),
                    seeds[self._shares.part(step)].tolist(),
                    strict=True,
                )
            ],
            self._shares.steps(first),
        )
        return self._reader.read(requests)


class _Requests(Sequence[list[_Request]]):
    """The requests of some steps, made one step at a time."""

    def __init__(self, make: Callable[[int], list[_Request]], steps: range) -> None:
        self._make = make
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, position: Any) -> Any:
        return self._make(self._steps[position])


def stream_eval_batches(
    dataset: StreamedDataset,
    *,
    batch_size: int,
    device: torch.device,
    channels_last: bool,
    rank: int,
    world_size: int,
    workers: int,
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """As :func:`~swa_fast.train.data.eval_batches`, for streams."""
    reader = _Reader(dataset, device=device, channels_last=channels_last, workers=workers)
    mine = range(rank, dataset.test_count, world_size)

    def make(step: int) -> list[_Request]:
        return [
            (dataset.test_files[i], int(dataset.test_labels[i]), None)
            for i in mine[step * batch_size : (step + 1) * batch_size]
        ]

    requests = _Requests(make, range(-(-len(mine) // batch_size)))
    return lambda: reader.read(requests)
