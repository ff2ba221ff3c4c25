"""The trainer's datasets, augmentation and normalisation."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from swa_fast.train.data import Placement, load_dataset
from swa_fast.train.data.dataset import Normalise, balanced_share, validation_split
from swa_fast.train.data.memory import MemoryDataset, channel_statistics
from swa_fast.train.data.sources import load_digits, load_images, load_synthetic
from swa_fast.train.errors import TrainError, import_extra

CPU = torch.device("cpu")


def make_dataset(
    count: int,
    *,
    size: tuple[int, int] = (8, 9),
    channels: int = 3,
    pad: int = 2,
    flip: bool = True,
) -> MemoryDataset:
    """Images whose pixels are all different from zero, so that padding can be told apart; the label
    is the image's number."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count)
    return MemoryDataset(
        tuple(map(str, range(count))), images, labels, images[:5], labels[:5], pad=pad, flip=flip
    )


def denormalise(batch: torch.Tensor, dataset: MemoryDataset) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in dataset.statistics)
    return (batch.double() * std + mean).round().to(torch.uint8)


def write(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, dark and bright: three training images and one test image each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        for name, low in (("bright", 150), ("dark", 0)):
            for i in range(count):
                pixels = rng.integers(low, low + 100, (10, 12, 3), dtype=np.uint8)
                write(tmp_path / part / name / f"{i}.png", pixels)
    return tmp_path


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(flip: bool) -> None:
    dataset = make_dataset(3, flip=flip)
    batches = dataset.train_batches(2, Placement(CPU))
    padded = torch.nn.functional.pad(dataset.train_images, (2, 2, 2, 2))
    seen: set[tuple[int, int, bool]] = set()
    for epoch in range(150):
        for images, labels in batches.epoch(epoch):
            for image, label in zip(denormalise(images, dataset), labels, strict=True):
                matches = [
                    (y, x, mirrored)
                    for y in range(5)
                    for x in range(5)
                    for mirrored in (False, True)
                    if torch.equal(
                        image,
                        padded[label, :, y : y + 8, x : x + 9].flip(2)
                        if mirrored
                        else padded[label, :, y : y + 8, x : x + 9],
                    )
                ]
                assert len(matches) == 1
                seen.update(matches)
    mirrors = (False, True) if flip else (False,)
    assert seen == {(y, x, m) for y in range(5) for x in range(5) for m in mirrors}


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 20),
    batch=st.integers(1, 25),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
    channels_last=st.booleans(),
)
def test_an_epoch_holds_every_image_once(
    count: int, batch: int, channels: int, seed: int, channels_last: bool
) -> None:
    dataset = make_dataset(count, channels=channels)
    batches = dataset.train_batches(batch, Placement(CPU, channels_last))
    parts = list(batches.epoch(seed))
    assert len(parts) == len(batches)
    assert [len(labels) for _, labels in parts[:-1]] == [batch] * (len(parts) - 1)
    assert sorted(torch.cat([labels for _, labels in parts]).tolist()) == list(range(count))
    form = torch.channels_last if channels_last else torch.contiguous_format
    for images, labels in parts:
        assert images.shape == (len(labels), channels, 8, 9)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=form)


def test_batches_depend_on_the_seed_only() -> None:
    batches = make_dataset(9).train_batches(4, Placement(CPU))
    first = list(batches.epoch(5))
    torch.manual_seed(99)
    list(batches.epoch(6))
    again = list(batches.epoch(5))
    other = list(batches.epoch(7))
    for (images, labels), (images_again, labels_again) in zip(first, again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert not all(torch.equal(x[1], y[1]) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_can_be_entered_anywhere(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_dataset(9).train_batches(4, Placement(CPU))
    whole = list(batches.epoch(5))
    made = []
    normalise = Normalise.__call__
    monkeypatch.setattr(
        Normalise, "__call__", lambda self, pixels: made.append(1) or normalise(self, pixels)
    )
    rest = list(batches.epoch(5, first=first))
    assert len(rest) == len(made) == 3 - first
    for (images, labels), (images_whole, labels_whole) in zip(rest, whole[first:], strict=True):
        assert torch.equal(images, images_whole) and torch.equal(labels, labels_whole)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 17),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_the_processes_share_every_batch(
    count: int, batch: int, world: int, seed: int, data: st.DataObject
) -> None:
    assume(world == 1 or min(count, batch) >= 2 * world)
    dataset = make_dataset(count)
    alone = dataset.train_batches(batch, Placement(CPU))
    ranks = [
        dataset.train_batches(batch, Placement(CPU, rank=r, world_size=world)) for r in range(world)
    ]
    last = count % batch
    left_out = last if world > 1 and last < 2 * world else 0
    first = data.draw(st.integers(0, len(ranks[0])))
    expected = list(alone.epoch(seed))[first : -1 if left_out else None]
    parts = [list(r.epoch(seed, first=first)) for r in ranks]
    for r, mine in zip(ranks, parts, strict=True):
        assert len(r) - first == len(mine) == len(expected)
        assert r.images == count - left_out
    for step, (images, labels) in enumerate(expected):
        together, together_labels = torch.empty_like(images), torch.empty_like(labels)
        for r, mine in enumerate(parts):
            assert len(mine[step][1]) >= (1 if world == 1 else 2)
            together[r::world], together_labels[r::world] = mine[step]
        assert torch.equal(together, images) and torch.equal(together_labels, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5, 0, 3),
         "--batch-size: expected 6 or more images, 2 for each of 3 processes, found 5"),
        ((5, 8, 0, 3), "training set: expected 6 or more images, .* found 5"),
    ],
)  # fmt: skip
def test_impossible_shares(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        count, batch_size, *ranks = arguments
        make_dataset(count).train_batches(batch_size, Placement(CPU, True, *ranks))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), batch=st.integers(1, 5), world=st.integers(1, 14))
def test_every_test_image_is_evaluated_by_one_process(count: int, batch: int, world: int) -> None:
    base = make_dataset(12)
    dataset = MemoryDataset(
        base.classes, base.train_images, base.train_labels,
        base.train_images[:count], base.train_labels[:count], pad=1, flip=False,
    )  # fmt: skip
    (everything,) = dataset.test_batches(99, Placement(CPU))()
    seen = []
    for rank in range(world):
        mine = dataset.test_batches(batch, Placement(CPU, rank=rank, world_size=world))
        for images, labels in mine():
            assert 1 <= len(labels) <= batch
            assert torch.equal(images, everything[0][labels])
            seen.append(labels)
    assert sorted(torch.cat(seen).tolist()) == list(range(count))


def test_evaluation_is_in_order_and_normalised() -> None:
    dataset = make_dataset(6)
    batches = dataset.test_batches(2, Placement(CPU, False))
    for _ in range(2):
        parts = list(batches())
        assert [len(labels) for _, labels in parts] == [2, 2, 1]
        images = torch.cat([images for images, _ in parts])
        assert torch.equal(torch.cat([labels for _, labels in parts]), dataset.test_labels)
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in dataset.statistics)
        expected = (dataset.test_images.double() - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)


def test_channel_statistics() -> None:
    images = make_dataset(50).train_images
    mean, std = channel_statistics(images)
    values = images.double()
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), values.mean((0, 2, 3)))
    torch.testing.assert_close(
        torch.tensor(std, dtype=torch.float64), values.std((0, 2, 3), correction=0)
    )
    order = torch.randperm(50)
    assert channel_statistics(images[order]) == (mean, std)
    assert channel_statistics(torch.full((2, 1, 8, 8), 7, dtype=torch.uint8)) == ([7.0], [1.0])


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("pyramidnet", (125.3 / 255, 123 / 255, 113.9 / 255), (63 / 255, 62.1 / 255, 66.7 / 255)),
        ("shakeshake", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_named_normalisation(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool
) -> None:
    base = make_dataset(5)
    dataset = MemoryDataset(
        base.classes, base.train_images, base.train_labels, base.test_images, base.test_labels,
        pad=0, flip=False, normalise=name,
    )  # fmt: skip
    m, s = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    expected = (base.train_images.double() / 255 - m) / s
    training = dataset.train_batches(5, Placement(CPU, channels_last))
    test = dataset.test_batches(5, Placement(CPU, channels_last))
    for batch in (training.epoch(0), test()):
        ((images, labels),) = batch
        torch.testing.assert_close(images.double(), expected[labels], rtol=1e-5, atol=1e-5)
    values = dataset.to_json()
    assert values["normalise"] == name
    np.testing.assert_allclose(np.array(values["mean"]) / 255, mean)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("cifar", 1, r"--normalise: expected dataset for images of 1 channel\(s\), found 'cifar'"),
        ("none", 3, "--normalise: expected one of dataset, cifar, imagenet, .*, found 'none'"),
    ],
)
def test_unfit_normalisation(name: str, channels: int, message: str) -> None:
    images = torch.zeros(2, channels, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TrainError, match=message):
        MemoryDataset(("a",), images, labels, images, labels, pad=1, flip=False, normalise=name)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, 2, 3], [0], r"training labels: expected 0 to 1, found 2 at image 2 \(2 of 4 are"),
        ([0, 1, 1, 0], [-1], r"test labels: expected 0 to 1, found -1 at image 0 \(1 of 1"),
        ([0, 1, 1], [0], "training labels: expected one for each of 4 images, found 3"),
        ([0, 1, 1, 0], [0, 1], "test labels: expected one for each of 1 images, found 2"),
    ],
)
def test_labels_are_checked(train: list[int], test: list[int], message: str) -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(TrainError, match=message):
        MemoryDataset(
            ("a", "b"), images, torch.tensor(train), images[:1], torch.tensor(test),
            pad=1, flip=False,
        )  # fmt: skip


def test_parts_are_checked() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TrainError, match="test images: expected 1 or more, found none"):
        MemoryDataset(("a",), images, labels, images[:0], labels[:0], pad=1, flip=False)
    with pytest.raises(TrainError, match=r"the training images, \(3, 8, 8\), found \(3, 8, 7\)"):
        MemoryDataset(("a",), images, labels, images[..., :7], labels, pad=1, flip=False)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.99),
    least=st.integers(1, 5),
)
def test_a_share_is_balanced(sizes: list[int], fraction: float, least: int) -> None:
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    kept = balanced_share(labels, fraction, least)
    assert torch.equal(kept, kept.unique())  # sorted, each once
    for i, n in enumerate(sizes):
        count = int((labels[kept] == i).sum())
        assert count >= min(n, least)
        if count > min(n, least):
            assert abs(count - n * fraction) <= 0.5
    assert torch.equal(balanced_share(labels, fraction, least), kept)
    smaller = balanced_share(labels, fraction / 2, least)
    assert set(smaller.tolist()) <= set(kept.tolist())


def test_a_share_is_no_prefix_of_the_class() -> None:
    kept = balanced_share(torch.zeros(1000, dtype=torch.int64), 0.1, 1)
    assert len(kept) == 100 and 300 < kept.double().mean() < 700


def test_another_fraction_of_the_test_images() -> None:
    half, both = load_dataset("digits", fraction=0.5), load_dataset("digits")
    found = load_dataset("digits", fraction=0.5, test_fraction=1.0)
    assert torch.equal(found.train_images, half.train_images)
    assert torch.equal(found.test_images, both.test_images)
    found = load_dataset("digits", test_fraction=0.5)
    assert torch.equal(found.train_images, both.train_images)
    assert torch.equal(found.test_images, half.test_images)
    with pytest.raises(TrainError, match=r"--test-fraction: expected a number in \(0, 1\]"):
        load_dataset("digits", test_fraction=1.5)


def test_noise_is_the_same_every_time() -> None:
    plain, found = load_dataset("digits"), load_dataset("digits", noise=20.0)
    assert torch.equal(found.train_images, load_dataset("digits", noise=20.0).train_images)
    # Where nothing is clamped the deviation is the one asked for.
    grey = (plain.train_images > 90) & (plain.train_images < 165)
    change = (found.train_images.double() - plain.train_images.double())[grey]
    assert change.std().item() == pytest.approx(20.0, rel=0.02)
    assert abs(change.mean().item()) < 0.5
    assert not torch.equal(found.test_images, plain.test_images)
    for wrong in (-1.0, 256.0, float("nan")):
        with pytest.raises(TrainError, match=r"--noise: expected grey values in \[0, 255\]"):
            load_dataset("digits", noise=wrong)
    with pytest.raises(TrainError, match="--noise: expected 0 for images that are read anew"):
        load_dataset("imagenet", "somewhere", noise=1.0)


def test_fraction_of_a_dataset() -> None:
    whole = load_dataset("synthetic")
    part = load_dataset("synthetic", fraction=0.1, min_per_class=20)
    assert isinstance(whole, MemoryDataset) and isinstance(part, MemoryDataset)
    assert torch.bincount(part.train_labels).tolist() == [50] * 10
    assert torch.bincount(part.test_labels).tolist() == [20] * 10
    assert part.to_json()["fraction"] == 0.1
    for name in ("train", "test"):
        (all_images, all_labels), (images, labels) = (
            (getattr(d, f"{name}_images"), getattr(d, f"{name}_labels")) for d in (whole, part)
        )
        label_of = {
            image.numpy().tobytes(): int(label)
            for image, label in zip(all_images, all_labels, strict=True)
        }
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


@pytest.mark.parametrize(
    ("labels", "held"),
    [
        ([0, 1] * 15, [27, 28, 29]),  # the last tenth, as of CIFAR's 50,000
        ([1, 0], [1]),
        ([0] * 20 + [1] * 10 + [2] * 2, [18, 19, 29, 31]),  # of each class in a folder's order
    ],
)
def test_validation_split(labels: list[int], held: list[int]) -> None:
    train, validation = validation_split(torch.tensor(labels))
    assert validation.tolist() == held
    assert train.tolist() == [i for i in range(len(labels)) if i not in held]


def test_validation_images_are_training_images() -> None:
    whole, split = load_dataset("digits"), load_dataset("digits", validation=True)
    assert isinstance(whole, MemoryDataset) and isinstance(split, MemoryDataset)
    assert torch.equal(split.train_images, whole.train_images[:-143])
    assert torch.equal(split.test_images, whole.train_images[-143:])
    assert torch.equal(split.test_labels, whole.train_labels[-143:])
    assert split.sha256 != whole.sha256


def test_synthetic_is_deterministic_and_learnable() -> None:
    dataset = load_synthetic(classes=5, image_size=12, train_images=503, test_images=200)
    again = load_synthetic(classes=5, image_size=12, train_images=503, test_images=200)
    other = load_synthetic(classes=5, image_size=12, train_images=503, test_images=200, seed=1)
    assert dataset.sha256 == again.sha256 != other.sha256
    assert dataset.train_images.shape == (503, 3, 12, 12)
    assert torch.bincount(dataset.train_labels).tolist() == [101, 101, 101, 100, 100]
    means = torch.stack(
        [dataset.train_images[dataset.train_labels == i].double().mean(0) for i in range(5)]
    )
    distances = (dataset.test_images.double()[:, None] - means).flatten(2).norm(dim=2)
    accuracy = (distances.argmin(1) == dataset.test_labels).double().mean()
    assert 0.7 < accuracy < 1
    assert len({image.numpy().tobytes() for image in dataset.train_images}) == 503


# ------------------------------------------------------------------------------- datasets by name


class OldDtype:
    """Unpickling it warns, as unpickling CIFAR's dtypes does under NumPy 2.4.0 to 2.4.4."""

    def __reduce__(self) -> Any:
        return warnings.warn, ("dtype(): align should be passed as Python or NumPy boolean",)


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Ten images a file in the format of CIFAR, and its checksums in torchvision; the pixels."""
    datasets = import_extra("torchvision.datasets")
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    classes = 10 if name == "cifar10" else 100
    rng = np.random.default_rng(4)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    pixels: dict[str, list[np.ndarray]] = {}

    def put(file: str, values: dict[str, Any]) -> str:
        content = pickle.dumps({**values, "old": OldDtype()}, protocol=2)
        (folder / file).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(kind, attribute):
            data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
            labels = [(7 * i) % classes for i in range(10)]
            key = "labels" if name == "cifar10" else "fine_labels"
            sums.append([file, put(file, {"data": data, key: labels})])
            pixels.setdefault(attribute, []).append(data.reshape(10, 3, 32, 32))
        monkeypatch.setattr(kind, attribute, sums)
    names = [f"class {i}" for i in range(classes)]
    md5 = put(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return {attribute: np.concatenate(parts) for attribute, parts in pixels.items()}


def write_fashion(root: Path) -> dict[str, np.ndarray]:
    """Fashion-MNIST's four files, with twelve training and five test images; the pixels."""
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    pixels = {}
    for part, count in (("train", 12), ("t10k", 5)):
        images = np.random.default_rng(5).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        labels = bytes(i % 10 for i in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)
        pixels[part] = images
    return pixels


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever downloaded by these tests."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "train"), [("cifar10", 50), ("cifar100", 10)])
def test_cifar(name: str, train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path / "data" / name, name, monkeypatch)
    monkeypatch.chdir(tmp_path)  # the folder need not be given
    dataset = load_dataset(name, normalise="cifar")
    assert isinstance(dataset, MemoryDataset)
    classes = 10 if name == "cifar10" else 100
    assert dataset.classes == tuple(f"class {i}" for i in range(classes))
    assert np.array_equal(dataset.train_images.numpy(), pixels["train_list"])
    assert np.array_equal(dataset.test_images.numpy(), pixels["test_list"])
    assert dataset.train_labels.tolist() == [(7 * i) % classes for i in range(10)] * (train // 10)
    assert dataset.train_labels.dtype == torch.int64
    assert (dataset.pad, dataset.flip, dataset.normalise) == (4, True, "cifar")
    named = load_dataset(name, tmp_path / "data" / name, normalise="cifar")
    assert named.to_json() == dataset.to_json()


@pytest.mark.usefixtures("offline")
def test_fashion_mnist(tmp_path: Path) -> None:
    pixels = write_fashion(tmp_path)
    dataset = load_dataset("fashion-mnist", tmp_path)
    assert isinstance(dataset, MemoryDataset)
    assert np.array_equal(dataset.train_images.numpy(), pixels["train"][:, None])
    assert np.array_equal(dataset.test_images.numpy(), pixels["t10k"][:, None])
    assert dataset.test_labels.tolist() == [0, 1, 2, 3, 4]
    assert dataset.classes[1] == "Trouser"
    assert (dataset.pad, dataset.flip) == (4, True)
    resized = load_dataset("fashion-mnist", tmp_path, image_size=32)
    assert resized.image_shape == (1, 32, 32)
    with pytest.raises(TrainError, match=r"--normalise: expected dataset for images of 1 channel"):
        load_dataset("fashion-mnist", tmp_path, normalise="imagenet")


@pytest.mark.parametrize("size", [8, 20, 32])
def test_resizing_is_pillows_bilinear(size: int, tmp_path: Path) -> None:
    pixels = write_fashion(tmp_path)
    resized = load_dataset("fashion-mnist", tmp_path, image_size=size)
    assert isinstance(resized, MemoryDataset)
    for i in range(5):
        expected = Image.fromarray(pixels["t10k"][i]).resize((size, size), Image.BILINEAR)
        difference = resized.test_images[i, 0].int() - torch.from_numpy(np.array(expected)).int()
        assert difference.abs().max() <= 1


def test_resized_digits() -> None:
    dataset = load_dataset("digits", image_size=16)
    assert dataset.image_shape == (1, 16, 16)
    assert isinstance(dataset, MemoryDataset)
    small = torch.nn.functional.avg_pool2d(dataset.test_images.double(), 2)
    correlation = torch.corrcoef(
        torch.stack([small.flatten(), load_digits().test_images.double().flatten()])
    )
    assert correlation[0, 1] > 0.95


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "kind", "below"),
    [
        ("cifar10", "CIFAR10", "cifar-10-batches-py"),
        ("cifar100", "CIFAR100", "cifar-100-python"),
        ("fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
    ],
)
def test_failed_download(name: str, kind: str, below: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError) as caught:
        load_dataset(name, tmp_path / "x")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x'}: expected the files of {kind} in {below}, or to")
    assert "where there is no network, put the files there by hand" in message
    assert "\n" not in message


@pytest.mark.usefixtures("offline")
def test_missing_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "there")
    module = import_extra("torchvision.datasets.mnist")
    resources = [(f"{file.name}.gz", None) for file in (tmp_path / "there").rglob("*-ubyte")]
    monkeypatch.setattr(module.FashionMNIST, "resources", resources)
    urls = []

    def download(url: str, download_root: str, filename: str, md5: object) -> None:
        urls.append(url)
        name = filename.removesuffix(".gz")
        content = (tmp_path / "there/FashionMNIST/raw" / name).read_bytes()
        Path(download_root, filename).write_bytes(gzip.compress(content))
        Path(download_root, name).write_bytes(content)

    monkeypatch.setattr(module, "download_and_extract_archive", download)
    load_dataset("fashion-mnist", tmp_path / "new")
    assert len(urls) == 4
    load_dataset("fashion-mnist", tmp_path / "new")
    assert len(urls) == 4


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.joinpath("train-images-idx3-ubyte").write_bytes(b"\0\0"),
         "expected the files of FashionMNIST in .* and remove broken ones"),
        (lambda f: f.joinpath("t10k-labels-idx1-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (0x801, 5)) + b"\1\2\3\4\12"),
         "FashionMNIST/raw: test labels: expected 0 to 9, found 10 at image 4"),
        (lambda f: f.joinpath("train-labels-idx1-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (0x801, 2)) + b"\1\2"),
         "FashionMNIST/raw: training labels: expected one for each of 12 images, found 2"),
    ],
)  # fmt: skip
def test_damaged_fashion_mnist(tmp_path: Path, damage: Any, message: str) -> None:
    write_fashion(tmp_path)
    damage(tmp_path / "FashionMNIST/raw")
    with pytest.raises(TrainError, match=message):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "--dataset: expected one of digits, images, cifar10, .*, found 'mnist'"),
        ("digits", {"image_size": 7}, "--image-size: expected 8 or more pixels, found 7"),
        ("digits", {"data_dir": "x"}, "--data-dir: expected none with --dataset digits"),
        ("images", {}, "--data-dir: expected a folder with train/<class>/ and test/<class>/"),
        ("imagenet", {}, "--data-dir: expected a folder with train/<class>/ and val/<class>/"),
        ("digits", {"fraction": 0.0}, r"--fraction: expected a number in \(0, 1\], found 0.0"),
        ("digits", {"fraction": 1.5}, "--fraction: expected a number"),
        ("digits", {"fraction": float("nan")}, "--fraction: expected a number"),
        ("digits", {"normalise": "cifar"}, "--normalise: expected dataset for images of 1"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        load_dataset(name, **options)


def test_images_by_name(folder: Path) -> None:
    counts = []
    dataset = load_dataset(
        "images", folder, image_size=9, threads=2, fraction=0.4, min_per_class=1,
        progress=lambda items, count: counts.append(count) or items,  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert dataset.image_shape == (3, 9, 9)
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (2, 2)
    assert counts == [8]


def test_digits() -> None:
    dataset = load_digits()
    assert dataset.train_images.shape == (1437, 1, 8, 8)
    assert dataset.test_images.shape == (360, 1, 8, 8)
    assert dataset.train_images.dtype == torch.uint8
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 255)
    assert not dataset.flip
    shares = torch.bincount(dataset.test_labels) / torch.bincount(dataset.train_labels)
    assert ((shares - 0.25).abs() < 0.02).all()
    assert load_digits().sha256 == dataset.sha256


def test_image_folder(folder: Path) -> None:
    write(folder / "train/dark/deeper/9.PNG", np.full((10, 12, 3), 40, dtype=np.uint8))
    (folder / "train/dark/.hidden.png").write_bytes(b"no image")
    (folder / "train/.cache").mkdir()
    (folder / "train/dark/notes.txt").write_text("no image")
    (folder / "test/README").write_text("no image")
    dataset = load_images(folder, threads=2)
    assert dataset.classes == ("bright", "dark")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert dataset.test_labels.tolist() == [0, 1]
    assert dataset.train_images.shape == (7, 3, 10, 12)
    assert dataset.skipped_files == 2
    assert dataset.flip and dataset.pad == 4
    with Image.open(folder / "train/dark/1.png") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(dataset.train_images[4], expected)
    before = dataset.sha256
    write(folder / "test/dark/0.png", np.full((10, 12, 3), 1, dtype=np.uint8))
    assert load_images(folder).sha256 != before


def test_image_modes_and_resizing(folder: Path) -> None:
    grey = np.full((20, 30), 90, dtype=np.uint8)
    write(folder / "train/dark/grey.jpg", grey, quality=95)
    write(folder / "train/dark/alpha.png", np.full((9, 9, 4), 60, dtype=np.uint8))
    with Image.fromarray(grey).convert("P") as palette:
        palette.save(folder / "train/dark/palette.png", transparency=b"\x00\x80\xff")
    dataset = load_images(folder, image_size=16)
    assert dataset.train_images.shape[1:] == (3, 16, 16)
    by_name = dict(
        zip(["0", "1", "2", "alpha", "grey", "palette"], dataset.train_images[3:], strict=True)
    )
    assert (by_name["alpha"] == 60).all()
    assert ((by_name["grey"].int() - 90).abs() <= 2).all()
    assert (by_name["palette"] == 90).all()


@pytest.mark.parametrize("kind", ["eps", "eps named png", "pipe", "folder by a link"])
def test_only_regular_files_of_named_formats_are_images(folder: Path, kind: str) -> None:
    """Pillow hands EPS to Ghostscript, and would wait for a pipe."""
    path = folder / ("train/dark/9.eps" if kind == "eps" else "train/dark/9.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind.startswith("eps"):
        Image.fromarray(np.full((10, 12, 3), 40, dtype=np.uint8)).save(path, format="EPS")
    else:
        path.symlink_to(folder / "train")
    if kind == "eps":
        assert load_images(folder).skipped_files == 1
        return
    if kind == "folder by a link":
        assert load_images(folder).skipped_files == 0  # os.walk does not follow it
        return
    with pytest.raises(TrainError, match=r"9\.png: expected a readable image"):
        load_images(folder)


def test_names_that_are_no_text(folder: Path) -> None:
    """Bytes that are not UTF-8."""
    for part in ("train", "test"):
        (folder / part / "dark").rename(os.fsdecode(bytes(folder / part) + b"/\xff"))
    write(Path(os.fsdecode(bytes(folder / "train/bright") + b"/\xfe.png")),
          np.full((10, 12, 3), 40, dtype=np.uint8))  # fmt: skip
    dataset = load_images(folder)
    assert len(dataset.classes) == 2 and len(dataset.sha256) == 64


def test_image_progress(folder: Path) -> None:
    counts = []
    load_images(folder, progress=lambda items, count: counts.append(count) or items)  # type: ignore[func-returns-value]
    assert counts == [8]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-150])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "test").rename(f / "x"), "test: expected a folder with one"),
        (lambda f: (f / "train/dark").rename(f / "train/dim"),
         "expected the same classes in train and test; only in train: dim; only in test: dark"),
        (lambda f: truncate(f / "train/dark/1.png"), r"dark/1\.png: expected a readable image"),
        (lambda f: (f / "test/dark/0.png").write_bytes(b""), r"test/dark/0\.png: expected a read"),
        (lambda f: (f / "train/dark/0.jpg").write_text("text"), r"0\.jpg: expected a readable"),
        (lambda f: write(f / "train/dark/2.png", np.zeros((10, 10, 3), np.uint8)),
         r"dark/2\.png: expected 12x10 pixels like .*bright/0\.png, found 10x10; --image-size"),
        (lambda f: write(f / "train/bright/0.png", np.zeros((7, 9, 3), np.uint8)),
         r"0\.png: expected images of 8x8 pixels or more, found 9x7"),
        (lambda f: write(f / "train/dark/0.png", np.zeros((10, 12), np.uint16)),
         r"dark/0\.png: expected 8 bits per channel, found Pillow mode I"),
        (lambda f: (f / "train/empty").mkdir(), "empty: expected images of the class"),
        (lambda f: [p.rename(p.with_suffix(".txt")) for p in (f / "test/dark").iterdir()],
         "test/dark: expected images of the class 'dark', found none"),
    ],
)  # fmt: skip
def test_bad_image_folders(folder: Path, damage: object, message: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(TrainError, match=message):
        load_images(folder, threads=2)


def test_empty_and_single_class_folders(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="train: expected a folder"):
        load_images(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(TrainError, match="train: expected one folder per class, found none"):
        load_images(tmp_path)
    for part in ("train", "test"):
        write(tmp_path / part / "only" / "0.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(TrainError, match="expected 2 or more class folders, found 1"):
        load_images(tmp_path)


def test_missing_package_tells_the_remedy() -> None:
    with pytest.raises(TrainError, match=r'pip install "swa_fast\[train\]"'):
        import_extra("swa_fast_has_no_such_dependency")
