"""Several processes train one network: gloo on the CPU, as torchrun starts them."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_processes
from torch import Tensor, nn

from swa_fast import update_bn
from swa_fast.train import cli, data, progress, session
from swa_fast.train import trainer as trainer_module
from swa_fast.train.averages import WeightAverage
from swa_fast.train.config import TrainConfig
from swa_fast.train.data import Placement
from swa_fast.train.data.memory import MemoryDataset
from swa_fast.train.distributed import World
from swa_fast.train.methods import plan
from swa_fast.train.models import build_model
from swa_fast.train.randomness import derive_seed
from swa_fast.train.trainer import Trainer

RANKS = 2
OPTIONS: dict[str, Any] = {
    "model": "preresnet8",
    "width": 2,
    "epochs": 4,
    "batch_size": 32,
    "methods": ("sgd", "ema", "swa", "fge"),
    "swa_start": 0.5,
    "fge_start": 0.5,
    "threads": 1,
    "device": "cpu",
}


def images() -> MemoryDataset:
    """93 training images: the last of three batches has 29, 15 for one process and 14 for the
    other; and an odd number of test images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(93) % 3
    pixels = torch.randint(0, 80, (93, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pixels += (60 * labels)[:, None, None, None].to(torch.uint8)
    return MemoryDataset(
        ("a", "b", "c"), pixels, labels, pixels[:21], labels[:21], pad=1, flip=False
    )


def _child(rank: int, work: Callable[[Path, int], None], folder: Path, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    data.load_digits = images
    work(folder, rank)


def processes(work: Callable[[Path, int], None], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(_child, (work, folder, port), RANKS)


def in_group(work: Callable[[World, Path, int], None]) -> Callable[[Path, int], None]:
    """The work between joining the group and leaving it, when its networks are gone."""

    @functools.wraps(work)
    def run(folder: Path, rank: int) -> None:
        world = World()
        work(world, folder, rank)
        world.close()

    return run


def test_networks_go_before_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one in a reference cycle. With torch 2.13 one that is left may wait forever. And the
    group's threads have had time to give back the tensors of the last collective."""

    class Network:
        def __init__(self) -> None:
            self.itself = self

    world = World()
    world.size = 2
    network = weakref.ref(Network())
    left: list[bool] = []
    slept: list[float] = []
    monkeypatch.setattr("swa_fast.train.distributed.time.sleep", slept.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.distributed,
        "destroy_process_group",
        lambda: left.append(network() is None and len(slept) == 1),
    )
    world.close()
    assert left == [True]


@in_group
def train(world: World, folder: Path, rank: int) -> None:
    """The trajectories sgd, with ema, and swa by hand; each process writes what it has."""
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, images(), world)
    found: dict[str, Any] = {}
    for trajectory in plan(config)[:2]:
        run = trainer.start(trajectory)
        while run.epoch < trajectory.end:
            trainer.train_epoch(run)
        found[f"{trajectory.name} parameters"] = [p.detach() for p in run.model.parameters()]
        # The network was evaluated, so that all have the statistics of the first.
        found[f"{trajectory.name} statistics"] = list(run.model.buffers())
        found[f"{trajectory.name} records"] = [r["train_loss"] for r in run.records]
        for method, average in run.averages.items():
            assert isinstance(average, WeightAverage)
            found[method] = average.averaged.module.state_dict()
    torch.save(found, folder / f"{rank}.pt")


def test_averages_are_equal_everywhere_and_statistics_those_of_all_data(tmp_path: Path) -> None:
    processes(train, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for key, value in first.items():
        other = second[key]
        if isinstance(value, dict):
            value, other = list(value.values()), list(other.values())
        for a, b in zip(value, other, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), key

    # One process that sees the batches of both, one after the other.
    config = TrainConfig.from_options(OPTIONS)
    torch.manual_seed(0)
    model = build_model("preresnet8", in_channels=1, num_classes=3, width=2)
    model.load_state_dict(first["swa"])
    seed = derive_seed(config.seed, "bn", config.epochs - 1)
    batches = [
        batch
        for rank in range(RANKS)
        for batch, _ in images()
        .train_batches(32, Placement(torch.device("cpu"), rank=rank, world_size=RANKS))
        .epoch(seed)
    ]
    assert sum(len(batch) for batch in batches) == 93
    update_bn(batches, model, estimator="weighted")
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, first["swa"][name], rtol=1e-5, atol=1e-6)


class _Plain(nn.Module):
    """A network without BatchNorm, for which sharing a batch changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


@in_group
def plain(world: World, folder: Path, rank: int) -> None:
    trainer_module.build_model = lambda *args, **kwargs: _Plain()  # type: ignore[assignment]
    config = TrainConfig.from_options({**OPTIONS, "methods": ("sgd",)})
    trainer = Trainer(config, images(), world)
    run = trainer.start(plan(config)[0])
    record = None
    for _ in range(2):
        record = trainer.train_epoch(run)
    if rank == 0:
        assert record is not None
        numbers = {k: v for k, v in record.items() if isinstance(v, float)}
        torch.save((run.model.state_dict(), numbers), folder / f"plain{world.size}.pt")


def test_every_image_weighs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the last batch, which the processes share unevenly."""
    processes(plain, tmp_path)
    monkeypatch.setattr(trainer_module, "build_model", None)  # set by plain, restored here
    plain(tmp_path, 0)
    (shared, record), (alone, expected) = (torch.load(tmp_path / f"plain{n}.pt") for n in (2, 1))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-6)
    assert record == pytest.approx(expected, rel=1e-5) and "test_accuracy" in expected


def arguments(folder: Path) -> list[str]:
    words = []
    for name, value in OPTIONS.items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return ["train", "--out", str(folder), *words]


def whole(folder: Path, rank: int) -> None:
    assert cli.main(arguments(folder / "whole")) == 0


def stopped(folder: Path, rank: int) -> None:
    """One process gets a signal in its fifth step; both stop at the end of that epoch."""
    steps = 0
    original = progress.Progress.step

    def step(self: progress.Progress) -> None:
        nonlocal steps
        steps += 1
        if rank == 1 and steps == 5:
            signal.raise_signal(signal.SIGTERM)
        original(self)

    progress.Progress.step = step  # type: ignore[method-assign]
    assert cli.main(arguments(folder / "stopped")) == 130


def resumed(folder: Path, rank: int) -> None:
    assert cli.main(["train", "--resume", str(folder / "stopped")]) == 0


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    processes(whole, folder)
    return folder / "whole"


def test_a_stopped_run_goes_on(whole_run: Path, tmp_path: Path) -> None:
    processes(stopped, tmp_path)
    results = json.loads((tmp_path / "stopped/results.json").read_text())
    assert (results["status"], len(results["records"])) == ("running", 2)
    assert results["environment"]["processes"] == RANKS
    processes(resumed, tmp_path)
    folders = whole_run, tmp_path / "stopped"
    a, b = (json.loads((folder / "results.json").read_text()) for folder in folders)
    for results in (a, b):
        for record in results["records"]:
            del record["seconds"]
    assert a["records"] == b["records"] and b["status"] == "complete"
    names = sorted(p.stem for p in whole_run.glob("model_*.pt"))
    assert names == [f"model_{x}" for x in ("ema", "fge-01", "fge-average", "sgd", "swa")]
    for name in names:
        x, y = (torch.load(folder / f"{name}.pt") for folder in folders)
        assert all(torch.equal(x[key], y[key]) for key in x), name


def sharded(folder: Path, rank: int) -> None:
    assert cli.main([*arguments(folder / "sharded"), "--shard", "fsdp2"]) == 0


def expect_alike(found: Path, expected: Path) -> None:
    """Sums are rounded in other orders."""
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (expected, found))
    assert a["status"] == b["status"] == "complete"
    for x, y in zip(a["records"], b["records"], strict=True):
        pairs = [(x, y), *((x["averages"][m], y["averages"][m]) for m in x["averages"])]
        for one, other in pairs:
            assert one.keys() == other.keys()
            for key in one.keys() - {"seconds", "averages"}:
                if isinstance(one[key], float):
                    assert other[key] == pytest.approx(one[key], rel=1e-4), key
                else:
                    assert other[key] == one[key], key
    for path in expected.glob("model_*.pt"):
        torch.testing.assert_close(
            torch.load(found / path.name), torch.load(path), rtol=1e-3, atol=1e-4
        )


def test_a_sharded_run_is_that_of_whole_networks(whole_run: Path, tmp_path: Path) -> None:
    processes(sharded, tmp_path)
    expect_alike(tmp_path / "sharded", whole_run)


def sharded_and_stopped(folder: Path, rank: int) -> None:
    """In the middle of the second epoch, to which the others have to agree."""
    trainer_module.build_model = lambda *args, **kwargs: _Plain()  # type: ignore[assignment]
    session._AGREE_EVERY = 1
    steps = 0
    original = progress.Progress.step

    def step(self: progress.Progress) -> None:
        nonlocal steps
        steps += 1
        if rank == 1 and steps == 5:
            signal.raise_signal(signal.SIGTERM)
        original(self)

    progress.Progress.step = step  # type: ignore[method-assign]
    assert cli.main([*arguments(folder / "moved"), "--shard", "fsdp2"]) == 130


def test_another_number_of_processes_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two began and one ends, without BatchNorm, whose batches would be others."""
    processes(sharded_and_stopped, tmp_path)
    results = json.loads((tmp_path / "moved/results.json").read_text())
    assert (results["status"], len(results["records"])) == ("running", 1)
    monkeypatch.setattr(data, "load_digits", images)
    monkeypatch.setattr(trainer_module, "build_model", lambda *args, **kwargs: _Plain())
    assert cli.main(["train", "--resume", str(tmp_path / "moved")]) == 0
    assert cli.main([*arguments(tmp_path / "alone"), "--shard", "fsdp2"]) == 0
    expect_alike(tmp_path / "moved", tmp_path / "alone")


def test_sharding_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments(tmp_path / "x")
    for more, message in (
        (["--compile"], "without --compile"),
        (["--methods", "swag"], "other than swag"),
        ([], "expected one of none, fsdp2"),
    ):
        shard = "fsdp2" if more else "fsdp3"
        assert cli.main([*options, "--shard", shard, *more]) == 2
        assert message in capsys.readouterr().err


def test_command_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.command("x") == ["python", "-m", "x"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert World.command("x") == ["torchrun", "--nproc-per-node", "2", "-m", "x"]


def test_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real command, and its refusal to go on with another number of processes."""
    options = ["--dataset", "synthetic", "--fraction", "0.05", "--methods", "swa", "--epochs", "2"]
    options += ["--model", "preresnet8", "--width", "2", "--batch-size", "64", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    answer = subprocess.run(
        [*run, str(RANKS), "-m", "swa_fast.train", *options, "--out", "a"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("SWA epoch 2/2") == 1 and "2 processes" in answer.stdout
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["status"] == "complete" and results["environment"]["processes"] == 2
    results["status"] = "running"
    (tmp_path / "a/results.json").write_text(json.dumps(results))
    assert cli.main(["train", "--resume", str(tmp_path / "a")]) == 2
    assert "expected 1 processes, found the state of 2" in capsys.readouterr().err
