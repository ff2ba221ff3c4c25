"""Small runs of the trainer, their comparison bit by bit, and their damage."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swa_fast.train import cli, data, progress
from swa_fast.train.config import TrainConfig
from swa_fast.train.data.memory import MemoryDataset
from swa_fast.train.distributed import World
from swa_fast.train.methods import plan
from swa_fast.train.trainer import Run, Trainer

EPOCHS = 4
STEPS = 2  # 60 images in batches of 32
FIRST = 3  # swa_start 0.5 of 4 epochs: captures after epochs 3 and 4

OPTIONS: dict[str, Any] = {
    "model": "preresnet8",
    "width": 2,
    "epochs": EPOCHS,
    "batch_size": 32,
    "swa_start": 0.5,
    "seed": 7,
    "threads": 1,
}

#: All methods, reported after 4 and 6 epochs.
ALL: dict[str, Any] = {
    **OPTIONS,
    "methods": ("sgd", "ema", "fge", "swa", "swa-cyclic", "swa-fixed"),
    "budgets": (1.0, 1.5),
    "cycle_epochs": 2,
    "fge_start": 0.5,
    "fixed_start": 0.5,
}

# Epochs of each trajectory, in the order of training.
PARTS = {
    "sgd": range(1, 5),
    "swa": range(1, 7),
    "swa-cyclic": range(3, 7),
    "fge": range(3, 5),
    "swa-fixed": range(1, 7),
}


def small_digits() -> MemoryDataset:
    """60 training and 20 test images, enough to tell weights apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 80, (60, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images += (60 * labels)[:, None, None, None].to(torch.uint8)
    return MemoryDataset(
        ("a", "b", "c"), images, labels, images[:20], labels[:20], pad=1, flip=False
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The small dataset stands for the digits."""
    monkeypatch.setattr(data, "load_digits", small_digits)
    threads = torch.get_num_threads()
    torch.set_num_threads(OPTIONS["threads"])  # as in the runs, so that bits agree
    yield
    torch.set_num_threads(threads)


def words(options: dict[str, Any]) -> list[str]:
    """Settings as command-line options."""
    found = []
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return found


def arguments(out: Path, **changes: Any) -> list[str]:
    return ["train", "--out", str(out), *words({**OPTIONS, **changes})]


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def records(folder: Path) -> list[dict[str, Any]]:
    """Records without their times, which no two runs share."""
    return without_times(json.loads((folder / "results.json").read_text())["records"])


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def newest(folder: Path, trajectory: str) -> Path:
    return sorted((folder / "checkpoints").glob(f"{trajectory}-0*.pt"))[-1]


def assert_same(a: Any, b: Any) -> None:
    """Equality bit by bit of nested dictionaries and lists of tensors and values."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_runs(a: Path, b: Path) -> None:
    """Records, final weights and last checkpoints, bit by bit."""
    assert records(a) == records(b)
    models = sorted(p.name for p in a.glob("model_*.pt"))
    assert models == sorted(p.name for p in b.glob("model_*.pt"))
    for name in models:
        assert_same(load(a / name), load(b / name))
    for trajectory in {r["trajectory"] for r in records(a)}:
        assert_same(load(newest(a, trajectory)), load(newest(b, trajectory)))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted run of all methods; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(data, "load_digits", small_digits)
        assert cli.main(["train", "--out", str(folder), *words(ALL)]) == 0
    return folder


def kill_after(
    steps: int,
    patch: pytest.MonkeyPatch,
    signals: int = 2,
    number: signal.Signals = signal.SIGINT,
) -> None:
    """Ends the run after the trainer's ``steps``-th step: one signal asks it to stop there and to
    save its state, two stop it at once."""
    done = 0

    def step(self: progress.Progress) -> None:
        nonlocal done
        done += 1
        if done == steps:
            for _ in range(signals):
                signal.raise_signal(number)

    patch.setattr(progress.Progress, "step", step)


def follow(options: dict[str, Any], name: str) -> Iterator[tuple[Trainer, Run]]:
    """A trajectory from initial weights, epoch by epoch, without the files of a run."""
    config = TrainConfig.from_options(options)
    trainer = Trainer(config, small_digits(), World())
    trajectory = next(t for t in plan(config) if t.name == name)
    run = trainer.start(trajectory)
    while run.epoch < trajectory.end:
        trainer.train_epoch(run)
        yield trainer, run


@pytest.fixture
def interrupted(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of sgd and swa, stopped in the SWA run's last epoch."""
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        kill_after(7 * STEPS + 1, patch)
        assert cli.main(arguments(folder)) == 130
    return folder


def change_results(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "results.json").read_text())
        edit(content)
        (folder / "results.json").write_text(json.dumps(content))

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit of a weight."""
    content, weight = bytearray(path.read_bytes()), load(path)["model"]["fc.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def assert_every_epoch_once(folder: Path) -> None:
    """Of some curves, as TensorBoard shows them."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for name, tag, epochs in (
        ("sgd", "train/loss", [1, 2, 3, 4]),
        ("ema-average", "test/accuracy", [1, 2, 3, 4]),
        ("swa-cyclic", "lr", [3, 4, 5, 6]),
        ("swa", "seconds/bn", [1, 2, 3, 4, 5, 6]),  # of which two are 0
        ("swa-average", "test/accuracy", [3, 4, 5, 6]),
    ):
        events = module.EventAccumulator(str(folder / "tensorboard" / name)).Reload()
        assert [event.step for event in events.Scalars(tag)] == epochs, name
