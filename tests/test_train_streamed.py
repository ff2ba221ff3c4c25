"""Streamed datasets: lists of files, workers, crops, and their independence of each other."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swa_fast.train.data import NORMALISATIONS, Placement, load_dataset, streamed
from swa_fast.train.data.streamed import StreamedDataset, load_stream
from swa_fast.train.errors import TrainError, import_extra

CPU = torch.device("cpu")

# Python 3.12 and 3.13 warn of every fork in a process that has threads, as torch's have.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 5, 6 and 7 training and 2 test images each, all of different sizes. Red
    grows from left to right, green from top to bottom, blue is the image's number."""
    number = 0
    for part in ("train", "val"):
        for i, name in enumerate(("n1", "n2", "n3")):
            for j in range(5 + i if part == "train" else 2):
                width, height = 40 + number, 60 - number
                pixels = np.zeros((height, width, 3), dtype=np.uint8)
                pixels[..., 0] = np.linspace(0, 255, width)
                pixels[..., 1] = np.linspace(0, 255, height)[:, None]
                pixels[..., 2] = 10 * number
                path = tmp_path / part / name / f"{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                number += 1
    return tmp_path


def training(
    dataset: StreamedDataset,
    *,
    batch_size: int = 4,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> streamed.StreamedBatches:
    return dataset.train_batches(
        batch_size, Placement(CPU, rank=rank, world_size=world_size, workers=workers)
    )


def as_bytes(images: Tensor, name: str = "imagenet") -> Tensor:
    """uint8 [B, 3, H, W] of normalised images."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in NORMALISATIONS[name])
    values = 255 * (images.double() * std + mean)
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8)


def assert_equal(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for (images, labels), (images_expected, labels_expected) in zip(found, expected, strict=True):
        assert torch.equal(images, images_expected) and torch.equal(labels, labels_expected)


def test_listing(folder: Path) -> None:
    (folder / "train/n1/notes.txt").write_text("no image")
    dataset = load_dataset("imagenet", folder)
    assert isinstance(dataset, StreamedDataset)
    assert dataset.classes == ("n1", "n2", "n3")
    assert dataset.train_labels.tolist() == [0] * 5 + [1] * 6 + [2] * 7
    assert dataset.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.train_files[4:6] == ("train/n1/4.png", "train/n2/0.png")
    values = dataset.to_json()
    assert values["train_images"] == 18 and values["test_images"] == 6
    assert values["image_shape"] == [3, 224, 224] == list(dataset.image_shape)
    assert values["normalise"] == "imagenet"
    assert values["mean"] == [255 * m for m in (0.485, 0.456, 0.406)]
    assert load_dataset("imagenet", folder, normalise="cifar").to_json()["normalise"] == "cifar"
    (folder / "val/n3/1.png").rename(folder / "val/n3/7.png")
    assert load_stream(folder).sha256 != dataset.sha256


def test_fraction(folder: Path) -> None:
    dataset = load_stream(folder, shares=(0.5, 0.5), min_per_class=2)
    whole = load_stream(folder, shares=(0.5, 1.0), min_per_class=2)
    assert whole.train_files == dataset.train_files
    assert len(whole.test_labels) == len(load_stream(folder).test_labels)
    assert torch.bincount(dataset.train_labels).tolist() == [3, 3, 4]
    assert torch.bincount(dataset.test_labels).tolist() == [2, 2, 2]
    for name, label in zip(dataset.train_files, dataset.train_labels, strict=True):
        assert name.split("/")[1] == dataset.classes[label]
    assert dataset.to_json()["fraction"] == 0.5


def test_validation(folder: Path) -> None:
    """The last of every class that is trained on."""
    whole, split = load_stream(folder), load_stream(folder, validation=True)
    files = dict(zip(whole.train_files, whole.train_labels.tolist(), strict=True))
    last = {label: file for file, label in files.items()}  # one of fewer than twenty
    assert split.test_files == tuple(last.values())
    assert split.train_files == tuple(f for f in files if f not in last.values())
    assert split.test_labels.tolist() == list(last)


def test_an_epoch_holds_every_image_once(folder: Path) -> None:
    dataset = load_stream(folder, image_size=16)
    batches = training(dataset)
    assert len(batches) == 5 and batches.images == 18
    parts = list(batches.epoch(3))
    assert [len(labels) for _, labels in parts] == [4, 4, 4, 4, 2]
    for images, labels in parts:
        assert images.shape == (len(labels), 3, 16, 16) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
    numbers = torch.cat([as_bytes(images)[:, 2, 0, 0] // 10 for images, _ in parts])
    assert sorted(numbers.tolist()) == list(range(18))
    labels = torch.cat([labels for _, labels in parts])
    assert torch.equal(labels, dataset.train_labels[numbers.long()])


def test_crops_vary_and_are_mirrored(folder: Path) -> None:
    batches = training(load_stream(folder, image_size=16), batch_size=18)
    crops = torch.cat([as_bytes(images) for seed in range(4) for images, _ in batches.epoch(seed)])
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)
    steps = crops.int()[:, 0, 8, -1] - crops.int()[:, 0, 8, 0]
    assert 20 < (steps < 0).sum() < 52  # of 72
    assert (crops.int()[:, 1, -1, 8] > crops.int()[:, 1, 0, 8]).all()
    # How much of the image's width and height a crop shows: both large and small windows occur.
    shown = steps.abs() / 255
    assert shown.min() < 0.4 < 0.8 < shown.max()


def test_crops_are_torchvisions(folder: Path) -> None:
    """By hand, with torchvision's own class and the seed of the request."""
    dataset = load_stream(folder, image_size=16)
    transforms = import_extra("torchvision.transforms")
    crop = transforms.RandomResizedCrop(16)
    decoder = streamed._Decoder(dataset.root, 16)
    for seed, name in enumerate(dataset.train_files):
        with Image.open(folder / name) as image, torch.random.fork_rng():
            torch.manual_seed(seed)
            cut = crop(image)
            expected = transforms.functional.hflip(cut) if torch.rand(()) < 0.5 else cut
        assert np.array_equal(decoder[(name, 0, seed)][0].numpy(), np.array(expected))


@pytest.mark.parametrize(("image_size", "resize"), [(28, 32), (224, 256)])
def test_test_images_are_torchvisions(folder: Path, image_size: int, resize: int) -> None:
    transforms = import_extra("torchvision.transforms")
    expected = transforms.Compose(
        [transforms.Resize(resize), transforms.CenterCrop(image_size), transforms.PILToTensor()]
    )
    dataset = load_stream(folder, image_size=image_size, normalise="cifar")
    batches = dataset.test_batches(4, Placement(CPU, False))
    for _ in range(2):
        parts = list(batches())
        assert [len(labels) for _, labels in parts] == [4, 2]
        assert torch.equal(torch.cat([labels for _, labels in parts]), dataset.test_labels)
        images = as_bytes(torch.cat([images for images, _ in parts]), "cifar")
        for image, name in zip(images, dataset.test_files, strict=True):
            with Image.open(folder / name) as file:
                assert torch.equal(image, expected(file))


def test_the_number_of_workers_does_not_matter(folder: Path) -> None:
    dataset = load_stream(folder, image_size=16)
    expected = list(training(dataset).epoch(7))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert_equal(list(training(dataset, workers=2).epoch(7)), expected)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    random.seed(6)
    assert_equal(list(training(dataset).epoch(7)), expected)
    other = list(training(dataset).epoch(8))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(other, expected, strict=True))
    test = dataset.test_batches(4, Placement(CPU, workers=2))
    assert_equal(
        list(test()),
        list(dataset.test_batches(4, Placement(CPU))()),
    )


def test_an_epoch_can_be_entered_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = training(load_stream(folder, image_size=16))
    expected = list(batches.epoch(7))
    read = []
    original = streamed.read_rgb
    monkeypatch.setattr(streamed, "read_rgb", lambda path: read.append(path) or original(path))
    for first, images in ((0, 18), (2, 10), (4, 2), (5, 0)):
        read.clear()
        assert_equal(list(batches.epoch(7, first=first)), expected[first:])
        assert len(read) == images


@pytest.mark.parametrize(("world", "batch_size"), [(2, 4), (3, 7), (2, 17)])
def test_the_processes_share_every_batch(folder: Path, world: int, batch_size: int) -> None:
    dataset = load_stream(folder, image_size=16)
    alone = list(training(dataset, batch_size=batch_size).epoch(2))
    parts = [
        training(dataset, batch_size=batch_size, rank=r, world_size=world) for r in range(world)
    ]
    if 18 % batch_size < 2 * world:
        alone = alone[:-1]
    assert {part.images for part in parts} == {sum(len(labels) for _, labels in alone)}
    epochs: list[Iterator[tuple[Tensor, Tensor]]] = [part.epoch(2) for part in parts]
    for images, labels in alone:
        for rank, epoch in enumerate(epochs):
            mine, my_labels = next(epoch)
            assert torch.equal(mine, images[rank::world])
            assert torch.equal(my_labels, labels[rank::world])
    assert [next(epoch, None) for epoch in epochs] == [None] * world


@pytest.mark.parametrize("world", [1, 4, 7])
def test_every_test_image_is_evaluated_by_one_process(folder: Path, world: int) -> None:
    dataset = load_stream(folder, image_size=16)
    ((everything, labels),) = dataset.test_batches(6, Placement(CPU))()
    for rank in range(world):
        batches = dataset.test_batches(1, Placement(CPU, rank=rank, world_size=world))
        assert_equal(
            list(batches()),
            [(everything[i : i + 1], labels[i : i + 1]) for i in range(rank, 6, world)],
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named(folder: Path, workers: int) -> None:
    (folder / "train/n2/3.png").write_bytes(b"text")
    dataset = load_stream(folder, image_size=16)
    with pytest.raises(TrainError) as caught:
        list(training(dataset, workers=workers).epoch(0))
    assert not multiprocessing.active_children()  # although the traceback is still held
    path = folder / "train/n2/3.png"
    assert str(caught.value).startswith(f"{path}: expected a readable image, found: ")
    assert "Traceback" not in str(caught.value)


def test_what_workers_get_is_small_and_can_be_sent(folder: Path) -> None:
    dataset = load_stream(folder, image_size=16)
    decoder = streamed._Decoder(dataset.root, 16)
    content = pickle.dumps(decoder)
    assert len(content) < 500
    image, label = pickle.loads(content)[(dataset.train_files[0], 0, 3)]
    assert torch.equal(image, decoder[(dataset.train_files[0], 0, 3)][0]) and label == 0


def test_the_official_metadata_is_used(folder: Path) -> None:
    names = {"n1": ("tench",), "n2": ("crane",), "n3": ("crane",)}
    torch.save((names, ["n1", "n2", "n3"]), folder / "meta.bin")
    dataset = load_stream(folder)
    # Names are not unique, synset identifiers are.
    assert dataset.classes == ("n1", "n2", "n3")
    assert dataset.train_labels.tolist() == [0] * 5 + [1] * 6 + [2] * 7
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(TrainError, match=r"val: expected images .* ILSVRC2012_img_val.tar"):
        load_stream(folder)


def test_bad_folders(folder: Path) -> None:
    (folder / "val/n3").rename(folder / "val/n4")
    message = "expected the same classes in train and val; only in train: n3; only in val: n4"
    with pytest.raises(TrainError, match=message):
        load_stream(folder)
    for path in (folder / "val/n4").iterdir():
        path.unlink()
    with pytest.raises(TrainError, match=r"val/n4: expected images of the class"):
        load_stream(folder)
    (folder / "val").rename(folder / "test")
    with pytest.raises(TrainError, match="val: expected a folder with one folder per class, or"):
        load_stream(folder)
    with pytest.raises(TrainError, match="--normalise: expected one of dataset, cifar"):
        load_stream(folder, normalise="mnist")
    with pytest.raises(TrainError, match="--fraction: expected a number in"):
        load_dataset("imagenet", folder, fraction=-1)


def test_labels_are_checked(folder: Path) -> None:
    files = ("a.png", "b.png")
    with pytest.raises(TrainError, match="test labels: expected 0 to 0, found 1 at image 1"):
        StreamedDataset(folder, ("a",), files, torch.tensor([0, 0]), files, torch.tensor([0, 1]))
    with pytest.raises(TrainError, match="training labels: expected one for each of 2"):
        StreamedDataset(folder, ("a",), files, torch.tensor([0]), files, torch.tensor([0, 0]))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_cuda(folder: Path, workers: int) -> None:
    dataset = load_stream(folder, image_size=16)
    expected = list(training(dataset).epoch(7))
    batches = dataset.train_batches(4, Placement(torch.device("cuda", 0), workers=workers))
    for (images, labels), (images_cpu, labels_cpu) in zip(batches.epoch(7), expected, strict=True):
        assert images.device.type == labels.device.type == "cuda"
        torch.testing.assert_close(images.cpu(), images_cpu)
        assert torch.equal(labels.cpu(), labels_cpu)
