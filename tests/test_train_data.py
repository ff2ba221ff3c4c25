"""The trainer's datasets, augmentation and normalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swa_fast.train.data import (
    Dataset,
    TrainBatches,
    channel_statistics,
    eval_batches,
    load_digits,
    load_images,
)
from swa_fast.train.errors import TrainError, import_extra

CPU = torch.device("cpu")


def make_dataset(
    count: int,
    *,
    size: tuple[int, int] = (8, 9),
    channels: int = 3,
    pad: int = 2,
    flip: bool = True,
) -> Dataset:
    """Images whose pixels are all different from zero, so that padding can be told apart; the label
    is the image's number."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count)
    return Dataset(
        tuple(map(str, range(count))), images, labels, images[:5], labels[:5], pad=pad, flip=flip
    )


def denormalise(batch: torch.Tensor, dataset: Dataset) -> torch.Tensor:
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
    batches = TrainBatches(dataset, batch_size=2, device=CPU, channels_last=True)
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
    batches = TrainBatches(dataset, batch_size=batch, device=CPU, channels_last=channels_last)
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
    batches = TrainBatches(make_dataset(9), batch_size=4, device=CPU, channels_last=True)
    first = list(batches.epoch(5))
    torch.manual_seed(99)
    list(batches.epoch(6))
    again = list(batches.epoch(5))
    other = list(batches.epoch(7))
    for (images, labels), (images_again, labels_again) in zip(first, again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert not all(torch.equal(x[1], y[1]) for x, y in zip(first, other, strict=True))


def test_evaluation_is_in_order_and_normalised() -> None:
    dataset = make_dataset(6)
    batches = eval_batches(dataset, batch_size=2, device=CPU, channels_last=False)
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
