"""The trainer as a whole: its methods, files, continuation after a kill, errors, command line."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from swa_fast.schedules import paper_lr, paper_swa_lr
from swa_fast.train import cli, data, errors, progress
from swa_fast.train.config import TrainConfig
from swa_fast.train.data import Dataset
from swa_fast.train.distributed import World
from swa_fast.train.errors import TrainError
from swa_fast.train.loop import Run, Trainer, derive_seed
from swa_fast.train.methods import Ensemble, plan
from swa_fast.train.models import build_model
from swa_fast.train.report import draw_curves, format_phases, format_table, overhead, summarise
from swa_fast.train.state import RunFolder, write_atomically

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


def small_digits() -> Dataset:
    """60 training and 20 test images, enough to tell weights apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 80, (60, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images += (60 * labels)[:, None, None, None].to(torch.uint8)
    return Dataset(("a", "b", "c"), images, labels, images[:20], labels[:20], pad=1, flip=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted run of all methods; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(data, "load_digits", small_digits)
        assert cli.main(["train", "--out", str(folder), *words(ALL)]) == 0
    return folder


def kill_after(steps: int, patch: pytest.MonkeyPatch, signals: int = 2) -> None:
    """Ends the run after the trainer's ``steps``-th step: one signal asks it to stop there and to
    save its state, two stop it at once."""
    done = 0

    def step(self: progress.Progress) -> None:
        nonlocal done
        done += 1
        if done == steps:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)

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


def test_all_files(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints",
        "curves.png",
        "log.txt",
        "model_ema.pt",
        "model_fge-01.pt",
        "model_sgd.pt",
        "model_swa-1.pt",
        "model_swa-cyclic-1.pt",
        "model_swa-cyclic.pt",
        "model_swa-fixed-1.pt",
        "model_swa-fixed.pt",
        "model_swa.pt",
        "results.json",
        "tensorboard",
    ]
    states = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert states == [
        "fge-00003-0000000.pt",
        "fge-00004-0000000.pt",
        "sgd-00003-0000000.pt",
        "sgd-00004-0000000.pt",
        "sgd-branch-00002-copy.pt",
        "sgd-branch-00002.pt",
        "swa-00005-0000000.pt",
        "swa-00006-0000000.pt",
        "swa-cyclic-00005-0000000.pt",
        "swa-cyclic-00006-0000000.pt",
        "swa-fixed-00005-0000000.pt",
        "swa-fixed-00006-0000000.pt",
    ]
    results = json.loads((finished / "results.json").read_text())
    assert (results["schema"], results["schema_version"]) == ("swa_fast.train.results", 2)
    assert (results["status"], results["preset"], results["scale"]) == ("complete", None, 1.0)
    assert results["config"]["seed"] == 7 and results["config"]["device"] in ("cpu", "cuda:0")
    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["processes"] == 1
    assert results["data"]["classes"] == ["a", "b", "c"]
    assert re.search(r"^[-0-9]+ [:0-9]+ SGD epoch 4/4 ", (finished / "log.txt").read_text(), re.M)
    with Image.open(finished / "curves.png") as figure:
        figure.load()
        assert figure.format == "PNG" and min(figure.size) > 500
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def assert_every_epoch_once(folder: Path) -> None:
    """Of some curves for TensorBoard, each in a single file."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    for name, tag, epochs in (
        ("sgd", "train/loss", [1, 2, 3, 4]),
        ("ema-average", "test/accuracy", [1, 2, 3, 4]),
        ("swa-cyclic", "lr", [3, 4, 5, 6]),
        ("swa", "seconds/bn", [1, 2, 3, 4, 5, 6]),  # of which two are 0
        ("swa-average", "test/accuracy", [3, 4, 5, 6]),
    ):
        (file,) = (folder / "tensorboard" / name).iterdir()
        found = [
            event.step
            for event in loader.EventFileLoader(str(file)).Load()
            for value in event.summary.value
            if value.tag == tag
        ]
        assert found == epochs, name


def test_tensorboard_holds_every_epoch_once(finished: Path) -> None:
    assert_every_epoch_once(finished)


def test_records(finished: Path) -> None:
    config = TrainConfig.from_options(ALL)
    found = records(finished)
    assert [(r["trajectory"], r["epoch"]) for r in found] == [
        (name, epoch) for name, epochs in PARTS.items() for epoch in epochs
    ]
    captures = {
        "ema": {e: e * STEPS for e in range(1, 5)},
        "swa": {3: 1, 4: 2, 5: 3, 6: 4},
        "swa-cyclic": {4: 1, 5: 1, 6: 2},
        "fge": {3: 1, 4: 1},
        "swa-fixed": {3: 1, 4: 2, 5: 3, 6: 4},
    }
    for record in found:
        epoch, name = record["epoch"], record["trajectory"]
        if name == "sgd":
            expected = paper_lr(epoch - 1, lr=config.lr, total=EPOCHS, final_lr=0.01 * config.lr)
        elif name == "swa":
            expected = paper_swa_lr(epoch - 1, lr=config.lr, swa_lr=config.swa_lr, start=FIRST)
        elif name == "swa-cyclic":
            # The second of two steps, in the first or the second epoch of two.
            expected = {1: 0.5 * (0.05 + 0.0005), 0: 0.0005}[epoch % 2]
        elif name == "fge":
            # t = 1/4 in the first epoch of two, 3/4 in the second.
            expected = 0.5 * (0.05 + 0.0005)
        else:
            expected = config.fixed_lr
        assert record["lr"] == pytest.approx(expected, rel=1e-12), record
        for method, average in record["averages"].items():
            assert average["captures"] == captures[method].get(epoch, 0)
            if method == "swa-cyclic" and epoch == 5:
                assert average["test_accuracy"] is None  # as it was an epoch before
            else:
                assert (average["test_accuracy"] is not None) == (average["captures"] > 0)
        assert 0 <= record["test_accuracy"] <= 100
        assert record["train_loss"] > 0
    # Same weights, same batches, same rate: the first epochs of both runs are one.
    first = [r["train_loss"] for r in found if r["epoch"] == 1 and r["trajectory"] != "swa-fixed"]
    assert len(first) == 2 and first[0] == first[1]


def test_summary_and_tables(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    by_key = {(r["trajectory"], r["epoch"]): r for r in results["records"]}
    rows = results["summary"]
    assert [(r["method"], r["budget"], r["epochs"], r["captures"]) for r in rows] == [
        ("sgd", 1.0, 4, None),
        ("ema", 1.0, 4, 8),
        ("swa", 1.0, 4, 2),
        ("swa", 1.5, 6, 4),
        ("swa-cyclic", 1.0, 4, 1),
        ("swa-cyclic", 1.5, 6, 2),
        ("fge", 1.0, 4, 1),
        ("swa-fixed", 1.0, 4, 2),
        ("swa-fixed", 1.5, 6, 4),
    ]
    for row in rows:
        method = row["method"]
        record = by_key["sgd" if method == "ema" else method, row["epochs"]]
        source = record if method == "sgd" else record["averages"][method]
        assert row["test_accuracy"] == source["test_accuracy"]
        assert row["test_loss"] == source["test_loss"]
        assert row["iterate_accuracy"] == record["test_accuracy"]
    table = format_table(rows).splitlines()
    assert [line.split("  ")[0] for line in table[2:6]] == ["SGD", "EMA", "SWA", "SWA, 1.5 budgets"]
    assert f"{rows[3]['test_accuracy']:.2f} %" in table[5]
    assert summarise(results) == rows
    # A trajectory that goes on from the conventional run has cost that part of it too.
    shared = sum(
        by_key["sgd", e]["seconds"][p]
        for e in (1, 2)
        for p in ("data", "forward_backward", "optimizer")
    )
    cyclic = [by_key["swa-cyclic", e]["seconds"] for e in (3, 4)]
    own = sum(
        seconds[phase]
        for seconds in cyclic
        for phase in ("data", "forward_backward", "optimizer", "average")
    )
    assert rows[4]["seconds"] == pytest.approx(shared + own + cyclic[-1]["bn"])
    assert by_key["sgd", 1]["seconds"]["average"] > 0  # of the method ema, which does not count
    # SWA's own run: its captures, and of the BatchNorm passes the last one.
    spent = [by_key["swa", e]["seconds"] for e in range(1, 7)]
    training = sum(s[p] for s in spent for p in ("data", "forward_backward", "optimizer"))
    averaging = sum(s["average"] for s in spent) + spent[-1]["bn"]
    assert rows[3]["seconds"] == pytest.approx(training + averaging)
    phases = format_phases(results)
    assert "forward/backward" in phases and phases.count("100.0 %") == len(PARTS)


def test_overhead_counts_captures_and_the_passes_of_results() -> None:
    def record(epoch: int, average: float, bn: float) -> dict[str, Any]:
        seconds = {"data": 1, "forward_backward": 7, "optimizer": 1, "average": average, "bn": bn}
        return {"epoch": epoch, "seconds": {**seconds, "eval": 50}}

    found = [record(1, 0.0, 5.0), record(2, 0.5, 1.5)]
    assert overhead(found, frozenset({2})) == pytest.approx(2 / 20)
    assert overhead([], frozenset()) == 0


def test_average_is_the_mean_of_the_captured_weights(finished: Path) -> None:
    for method, epochs in (("swa", (3, 4, 5, 6)), ("swa-fixed", (3, 4, 5, 6))):
        captured = [
            {n: p.detach().double().clone() for n, p in run.model.named_parameters()}
            for _, run in follow(ALL, method)
            if run.epoch in epochs
        ]
        average = load(finished / f"model_{method}.pt")
        first = load(finished / f"model_{method}-1.pt")
        for name in captured[0]:
            for saved, part in ((average, captured), (first, captured[:2])):
                mean = torch.stack([weights[name] for weights in part]).mean(0)
                torch.testing.assert_close(saved[name].double(), mean, rtol=1e-6, atol=1e-7)


def test_exponential_average(finished: Path) -> None:
    """By hand, from the weights after every step of the conventional run."""
    config = TrainConfig.from_options(ALL)
    trainer = Trainer(config, small_digits(), World())
    run = trainer.start(plan(config)[0])
    decay, expected = 1 - 1 / STEPS, None

    def between() -> None:
        nonlocal expected
        weights = {n: p.detach().double().clone() for n, p in run.model.named_parameters()}
        if expected is None:
            expected = weights
        else:
            expected = {n: decay * expected[n] + (1 - decay) * w for n, w in weights.items()}

    for _ in range(EPOCHS):
        trainer.train_epoch(run, between)
    assert expected is not None
    average = load(finished / "model_ema.pt")
    for name, value in expected.items():
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-6)


def test_cyclic_average_continues_the_conventional_run(finished: Path) -> None:
    """Two captures, after epochs 4 and 6, from the conventional run's state after epoch 2 with its
    momenta."""
    config = TrainConfig.from_options(ALL)
    trainer = Trainer(config, small_digits(), World())
    conventional, _, cyclic, *_ = plan(config)
    run = trainer.start(conventional)
    for _ in range(2):
        trainer.train_epoch(run)
    state = trainer.state(run)
    assert_same(
        dict(state["model"]), dict(load(finished / "checkpoints/sgd-branch-00002.pt")["model"])
    )
    other = trainer.start(cyclic)
    trainer.continue_from(other, state, Path("here"))
    buffers = [s["momentum_buffer"] for s in other.optimizer.state.values()]
    assert len(buffers) == len(list(other.model.parameters())) and any(b.any() for b in buffers)
    captured = []
    while other.epoch < 6:
        trainer.train_epoch(other)
        if other.epoch in (4, 6):
            captured.append({n: p.detach().clone() for n, p in other.model.named_parameters()})
    average = load(finished / "model_swa-cyclic.pt")
    for name in captured[0]:
        mean = torch.stack([weights[name].double() for weights in captured]).mean(0)
        torch.testing.assert_close(average[name].double(), mean, rtol=1e-6, atol=1e-7)


def test_ensemble_averages_probabilities(tmp_path: Path) -> None:
    """Two members, by hand, from their saved weights."""
    assert cli.main(arguments(tmp_path, methods="sgd,fge", epochs=6, fge_start=0.3)) == 0
    summary = {
        r["method"]: r for r in json.loads((tmp_path / "results.json").read_text())["summary"]
    }
    config = TrainConfig.from_options({**OPTIONS, "epochs": 6})
    trainer = Trainer(config, small_digits(), World())
    members = sorted(tmp_path.glob("model_fge-*.pt"))
    assert len(members) == summary["fge"]["captures"] == 3
    outputs = []
    labels = small_digits().test_labels
    for path in members:
        model = build_model("preresnet8", in_channels=1, num_classes=3, width=2)
        model.load_state_dict(load(path))
        model.eval()
        with torch.no_grad():
            outputs += [model(images).softmax(1) for images, _ in trainer._test_batches()]
    mean = torch.stack(outputs).mean(0)
    correct = (mean.argmax(1) == labels).double().mean().item()
    assert summary["fge"]["test_accuracy"] == pytest.approx(100 * correct)
    loss = torch.nn.functional.nll_loss(mean.log(), labels).item()
    assert summary["fge"]["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_initial_weights_count_where_asked_for(tmp_path: Path) -> None:
    """A trained network that goes on: its weights are one of the average, as in Algorithm 1."""
    options = {"methods": "sgd,swa-cyclic", "swa_start": 1.0, "cycle_epochs": 1, "budgets": "1.5"}
    assert cli.main(arguments(tmp_path / "a", **options)) == 0
    found = {r["epoch"]: r for r in records(tmp_path / "a") if r["trajectory"] == "swa-cyclic"}
    assert {e: r["averages"]["swa-cyclic"]["captures"] for e, r in found.items()} == {5: 2, 6: 3}
    assert cli.main([*arguments(tmp_path / "b", **options), "--no-include-initial"]) == 0
    assert records(tmp_path / "b")[-1]["averages"]["swa-cyclic"]["captures"] == 2
    # The average of a and that of b differ by the share of the conventional run's last weights.
    start = load(tmp_path / "a/model_sgd.pt")
    with_it, without = (load(tmp_path / f"{x}/model_swa-cyclic.pt") for x in "ab")
    for name, value in with_it.items():
        if name.endswith(("weight", "bias")):
            expected = (2 * without[name].double() + start[name].double()) / 3
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_average_has_batch_norm_statistics_of_its_own(finished: Path) -> None:
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, small_digits(), World())
    model = trainer.build()
    model.load_state_dict(load(finished / "model_swa-1.pt"))
    found = {n: b.clone() for n, b in model.named_buffers()}
    # Over the first layer's input, by hand: the mean over all images.
    seed = derive_seed(config.seed, "bn", EPOCHS - 1)
    model.train()
    means, counts = [], []
    with torch.no_grad():
        for images, _ in trainer.batches.epoch(seed):
            means.append(model.conv1(images).mean((0, 2, 3)))  # type: ignore[operator]
            counts.append(len(images))
    shares = torch.tensor(counts) / sum(counts)
    assert counts[0] != counts[1]
    torch.testing.assert_close(
        found["layer1.0.bn1.running_mean"],
        (torch.stack(means) * shares[:, None]).sum(0),
        rtol=1e-4,
        atol=1e-5,
    )
    assert found["bn.num_batches_tracked"] == STEPS


def test_training_goes_on_from_the_iterate_not_from_the_average() -> None:
    *_, (_, averaging) = follow(OPTIONS, "swa")
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, small_digits(), World())
    plain = trainer.start(plan(config)[1])
    plain.averages.clear()
    for _ in range(EPOCHS):
        trainer.train_epoch(plain)
    assert_same(dict(plain.model.state_dict()), dict(averaging.model.state_dict()))


# Steps before the end of: SGD's epoch 1 (nothing saved yet), 3; the SWA run's epochs 1, 3 and 4;
# the cyclical run's first epoch; the fixed one's last.
KILLS = [
    1,
    2 * STEPS + 1,
    4 * STEPS + 1,
    6 * STEPS + 2,
    7 * STEPS + 1,
    10 * STEPS + 1,
    21 * STEPS + 1,
]


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("steps", KILLS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    steps: int,
    signals: int,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "a run"
    with monkeypatch.context() as patch:
        kill_after(steps, patch, signals)
        assert cli.main(["train", "--out", str(folder), *words(ALL)]) == 130
    captured = capsys.readouterr().err
    assert f"swa-fast train --resume '{folder}'" in captured
    assert ("its state is in" in captured) == (signals == 1)
    done = json.loads((folder / "results.json").read_text())
    assert done["status"] == "running"
    assert len(done["records"]) == (steps - 1) // STEPS
    if signals == 1:
        # In the middle of an epoch, or at its end before the evaluation.
        latest = max((folder / "checkpoints").glob("*-0*-*.pt"), key=lambda p: p.stat().st_mtime_ns)
        assert load(latest)["step"] == (steps - 1) % STEPS + 1
    torch.manual_seed(123)  # nothing may depend on the global generator's state
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_runs(folder, finished)


def test_a_stop_in_an_evaluation_keeps_the_epoch(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the BatchNorm pass: the capture is saved, and not made twice."""
    original, calls = Trainer._evaluate_average, 0

    def evaluate(self: Trainer, average: Any, epoch: int, clock: Any) -> Any:
        nonlocal calls
        if not isinstance(average, Ensemble):
            calls += 1
            if calls == 6:  # the SWA run's second average
                signal.raise_signal(signal.SIGINT)
        return original(self, average, epoch, clock)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate_average", evaluate)
        assert cli.main(["train", "--out", str(tmp_path), *words(ALL)]) == 130
    state = load(newest(tmp_path, "swa"))
    assert (state["epoch"], state["step"], state["captured"]) == (3, STEPS, True)
    assert state["averages"]["swa"]["captures"] == 2
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    assert_same_runs(tmp_path, finished)
    assert_every_epoch_once(tmp_path)


def test_checkpoints_within_an_epoch(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an interval of 0 minutes every step is saved, which changes nothing; SIGKILL then loses
    none."""
    saved = []
    save = RunFolder.save_checkpoint

    def save_checkpoint(self: RunFolder, name: str, epoch: int, step: int, content: Any) -> None:
        saved.append((name, epoch, step))
        save(self, name, epoch, step, content)

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_checkpoint)
    argv = ["train", "--out", str(tmp_path), *words(ALL), "--checkpoint-minutes", "0"]
    assert cli.main(argv) == 0
    assert saved[:5] == [("sgd", 0, 1), ("sgd", 0, 2), ("sgd", 1, 0), ("sgd", 1, 1), ("sgd", 1, 2)]
    assert_same_runs(tmp_path, finished)


def test_checkpoints_within_an_epoch_know_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run's record holds what the epoch took before the kill, too."""
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        argv = [*arguments(tmp_path, methods="sgd", epochs=1), "--checkpoint-minutes", "0"]
        assert cli.main(argv) == 130
    path = newest(tmp_path, "sgd")
    content = load(path)
    assert content["step"] == 1 and content["seconds"]["forward_backward"] > 0
    content["seconds"]["forward_backward"] = 1000.0
    torch.save(content, path)
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 1000 < results["records"][0]["seconds"]["forward_backward"] < 2000


def test_dropout_and_shake_continue_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that draw random numbers of their own."""
    options = {"model": "shakeshake26-2x64d", "methods": "sgd", "epochs": 2}
    assert cli.main(arguments(tmp_path / "a", **options)) == 0
    with monkeypatch.context() as patch:
        kill_after(STEPS + 1, patch, 1)
        assert cli.main(arguments(tmp_path / "b", **options)) == 130
    torch.manual_seed(5)
    assert cli.main(["train", "--resume", str(tmp_path / "b")]) == 0
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_another_machine_is_mentioned(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    change_results(lambda r: r.update(status="running"))(folder)
    change_results(lambda r: r["environment"].update(averaging_backend="magic"))(folder)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert "note: averaging_backend was magic when the run began" in capsys.readouterr().out


def test_a_checkpoint_ahead_of_the_results_file_is_used(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between writing the checkpoint and writing results.json."""
    folder = tmp_path / "run"
    write, calls = RunFolder.write_results, 0

    def write_results(self: RunFolder, results: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_results", write_results)
        assert cli.main(["train", "--out", str(folder), *words(ALL)]) == 130
    assert load(newest(folder, "sgd"))["epoch"] == 2 and len(records(folder)) == 1
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_runs(folder, finished)


def test_resuming_a_finished_run_prints_its_table(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(data, "load_digits")  # nothing is loaded, let alone trained
    assert cli.main(["train", "--resume", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "already complete" in out and "SWA, 1.5 budgets" in out


def test_resume_takes_repeated_options_and_refuses_others(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--resume", str(finished), "--seed", "7", "--budgets", "1,1.5"]) == 0
    capsys.readouterr()
    for options, message in (
        (["--epochs", "9"], "--epochs: expected 4 as in"),
        (["--no-channels-last"], "--channels-last: expected True as in"),
        (["--methods", "sgd"], "--methods: expected ("),
        (["--out", "x"], "--out: expected only without --resume"),
        (["--overwrite"], "--overwrite: expected only without --resume"),
    ):
        assert cli.main(["train", "--resume", str(finished), *options]) == 2
        assert f"swa-fast train: error: {message}" in capsys.readouterr().err


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of sgd and swa, stopped in the SWA run's last epoch."""
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        kill_after(7 * STEPS + 1, patch)
        assert cli.main(arguments(folder)) == 130
    return folder


def change(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    """Edits all checkpoints of the SWA run."""

    def damage(folder: Path) -> None:
        for path in (folder / "checkpoints").glob("swa-*.pt"):
            content = load(path)
            edit(content)
            torch.save(content, path)

    return damage


def change_results(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "results.json").read_text())
        edit(content)
        (folder / "results.json").write_text(json.dumps(content))

    return damage


def each(trajectory: str, edit: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        for path in (folder / "checkpoints").glob(f"{trajectory}-*.pt"):
            edit(path)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit of a weight."""
    content, weight = bytearray(path.read_bytes()), load(path)["model"]["fc.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/dev/null/executed",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (each("swa", cut), r"swa-.*\.pt: expected a checkpoint .*trajectory swa, found a damag"),
        (each("swa", flip), r"swa-.* damaged or foreign file \(wrong checksum of "),
        (each("sgd", lambda p: p.write_bytes(b"")), r"sgd-.* damaged or foreign"),
        (each("swa", lambda p: torch.save(Malicious(), p)), r"swa-.* damaged or foreign"),
        (each("swa", lambda p: torch.save({"a": 1}, p)), r"swa-.* found another kind of file"),
        (each("swa", lambda p: shutil.copy(newest(p.parents[1], "sgd"), p)),
         r"swa-.* found trajectory sgd"),
        (change(lambda c: c.update(version=9)), r"swa-.* found version 9"),
        (change(lambda c: c["config"].update(lr=0.3)),
         r"swa-.*: expected lr = .* as in results\.json, found lr = 0\.3"),
        (change(lambda c: c["model"].pop("fc.bias")), r"swa-.*fc\.bias"),
        (change(lambda c: c["averages"]["swa"]["averaged"].pop("module.fc.bias")),
         r"swa-.*fc\.bias"),
        (change(lambda c: c.update(epoch=1)), r"swa-.* epoch 1 and 3 records"),
        (change(lambda c: c.pop("optimizer")), r"swa-.*KeyError: 'optimizer'"),
        (change(lambda c: c["ranks"].append(c["ranks"][0])),
         r"swa-.*: expected 1 processes, found the state of 2"),
        (lambda f: (f / "results.json").unlink(), r"found no results\.json in"),
        (lambda f: (f / "results.json").write_text("{"), r"results\.json: .*unreadable JSON"),
        (lambda f: (f / "results.json").write_text("{}"), r"results\.json: .*another kind of file"),
        (change_results(lambda r: r.update(schema_version=1)), r"results\.json: .*found version 1"),
        (change_results(lambda r: r.pop("data")), r"results\.json: .*found no data"),
        (change_results(lambda r: r["config"].pop("lr")), r"results\.json: .*missing: lr"),
        (change_results(lambda r: r["config"].update(lr="x")), r"results\.json: "),
        (change_results(lambda r: r["data"].update(sha256="0")),
         r"results\.json: expected the data that the run began with, found other sha256"),
    ],
)  # fmt: skip
def test_damaged_runs(
    damage: Callable[[Path], object],
    message: str,
    interrupted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(interrupted)

    def content() -> dict[Path, bytes]:
        kept = [p for p in interrupted.rglob("*") if p.is_file() and p.name != "log.txt"]
        return {p: p.read_bytes() for p in kept if "tensorboard" not in p.parts}

    before = content()
    assert cli.main(["train", "--resume", str(interrupted)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swa-fast train: error: ")
    assert re.search(message, error), error
    assert content() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(newest(f, "swa")),
         r"damaged or foreign .*; going on from swa-00002-0000000\.pt instead"),
        (lambda f: flip(newest(f, "swa")), r"wrong checksum .*; going on from swa-00002-0000000"),
        (lambda f: [p.unlink() for p in (f / "checkpoints").glob("swa-*")],
         r"results\.json lists swa up to epoch 3, and no checkpoint beyond epoch 0 is left"),
    ],
)  # fmt: skip
def test_lost_checkpoints_cost_the_last_interval_only(
    damage: Callable[[Path], object],
    message: str,
    interrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(interrupted)
    assert cli.main(["train", "--resume", str(interrupted)]) == 0
    assert re.search(message, capsys.readouterr().out)
    assert cli.main(arguments(tmp_path / "whole")) == 0
    assert_same_runs(interrupted, tmp_path / "whole")


def test_a_damaged_checkpoint_does_not_outlive_better_ones(tmp_path: Path) -> None:
    """Going on from an earlier one, those that follow are kept, not the damaged one."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 9):
        folder.save_checkpoint("sgd", 0, step, {"step": step})
    cut(newest(tmp_path, "sgd"))
    for step in (3, 4):
        folder.save_checkpoint("sgd", 0, step, {"step": step})
    cut(newest(tmp_path, "sgd"))
    notes: list[str] = []
    found = folder.load_checkpoint("sgd", torch.device("cpu"), notes.append)
    assert found is not None and found[1]["step"] == 3 and len(notes) == 1


def test_a_damaged_branch_has_a_copy(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    notes: list[str] = []
    cpu = torch.device("cpu")
    with pytest.raises(TrainError, match=r"sgd-branch-00002\.pt: expected the state after epoch 2"):
        folder.load_branch("sgd", 2, cpu, notes.append)
    folder.save_branch("sgd", 2, {"lr": 0.5})
    files = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    assert folder.load_branch("sgd", 2, cpu, notes.append)[0] == files[0] and not notes
    cut(files[0])
    path, state = folder.load_branch("sgd", 2, cpu, notes.append)
    assert path == files[1] and state["lr"] == 0.5
    assert re.search(r"branch-00002\.pt: .*damaged.*; going on from .*-copy\.pt instead", notes[0])
    cut(files[1])
    with pytest.raises(TrainError, match=r"sgd-branch-00002\.pt: .*damaged"):
        folder.load_branch("sgd", 2, cpu, notes.append)


def test_one_run_at_a_time(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leftovers = [interrupted / ".x.tmp", interrupted / "checkpoints/.swa.tmp"]
    for path in leftovers:
        path.write_bytes(b"half a fi")
    with RunFolder(interrupted).locked():
        assert not any(path.exists() for path in leftovers)
        leftovers[0].write_bytes(b"under way")
        for argv in (["train", "--resume", str(interrupted)],
                     [*arguments(interrupted), "--overwrite"]):  # fmt: skip
            assert cli.main(argv) == 2
            error = capsys.readouterr().err
            assert "expected a folder in which nothing is trained at present" in error
        assert leftovers[0].exists() and len(records(interrupted)) == 7
    assert cli.main(["train", "--resume", str(interrupted)]) == 0


@pytest.mark.parametrize("written", range(6))
def test_every_failed_write_of_a_checkpoint_is_reported(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the file the disk is full: torch.save has an error for every place."""

    class Full(io.FileIO):
        left = written

        def write(self, content: Any) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    folder = RunFolder(tmp_path)
    folder.save_checkpoint("sgd", 0, 1, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda number, mode: io.BufferedWriter(Full(number, mode)))
        with pytest.raises(TrainError, match=r"0000002\.pt: cannot be written .*disk is full"):
            folder.save_checkpoint("sgd", 0, 2, {str(i): torch.zeros(9999) for i in range(3)})
    assert [p.name for p in folder.checkpoints.iterdir()] == ["sgd-00000-0000001.pt"]


def test_a_full_disk_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(arguments(folder)) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "No space left" in error
    assert f"make room and continue with --resume {folder}" in error
    assert not list(folder.rglob("*.tmp"))
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert cli.main(arguments(tmp_path / "whole")) == 0
    assert_same_runs(folder, tmp_path / "whole")


def test_existing_runs_are_kept_unless_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert cli.main(arguments(finished)) == 2
    assert "--out: expected a folder without a run, found results.json" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert cli.main(arguments(folder, epochs=1, swa_start=0.0)) == 0
    assert cli.main([*arguments(folder, epochs=2), "--overwrite"]) == 0
    assert len(records(folder)) == 4
    assert (folder / "notes.txt").read_text() == "mine"

    # An earlier run is given up only once the new one can start.
    assert cli.main([*arguments(folder), "--overwrite", "--backend", "fpga"]) == 2
    assert len(records(folder)) == 4
    capsys.readouterr()

    assert cli.main(arguments(folder / "notes.txt")) == 2
    assert "--out: expected a folder that can be written, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "mnist"], "--dataset: expected one of digits, images, .* found 'mnist'"),
        (["--model", "vgg"], "--model: expected one of vgg16, .*densenet161, found 'vgg'"),
        (["--epochs", "0"], "--epochs: expected 1 or more, found 0"),
        (["--batch-size", "-1"], "--batch-size: expected 1 or more, found -1"),
        (["--width", "0"], "--width: expected 1 or more, found 0"),
        (["--threads", "0"], "--threads: expected 1 or more, found 0"),
        (["--workers", "-1"], "--workers: expected 0 or more, found -1"),
        (["--eval-every", "0"], "--eval-every: expected 1 or more, found 0"),
        (["--lr", "0"], "--lr: expected a finite number above 0, found 0"),
        (["--lr", "nan"], "--lr: expected a finite number above 0, found nan"),
        (["--swa-lr", "-1"], "--swa-lr: expected a finite number above 0, found -1"),
        (["--momentum", "1"], r"--momentum: expected a number in \[0, 1\), found 1"),
        (["--nesterov", "--momentum", "0"], "--momentum: expected a number above 0 with --nest"),
        (["--weight-decay", "inf"], "--weight-decay: expected a finite number of 0 or more"),
        (["--seed", "-1"], r"--seed: expected an integer in \[0, 2\^63\), found -1"),
        (["--fraction", "0"], r"--fraction: expected a number in \(0, 1\], found 0"),
        (["--swa-start", "-1"], "--swa-start: expected a fraction of 0 or more, found -1"),
        (["--swa-start", "1"], "--swa-start: expected a fraction that leaves an epoch to average"),
        (["--methods", "sgd,adam"], "--methods: expected one of sgd, .*, found 'adam'"),
        (["--methods", "sgd,sgd"], "--methods: expected different names"),
        (["--methods", "swa-cyclic"], "--cycle-epochs: expected with the method swa-cyclic, found"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "9"],
         "--cycle-epochs: expected at most the 8 epochs that are left after --swa-start, found 9"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "1", "--swa-start", "1.2", "--budgets",
          "2"], "--swa-start: expected 1 at most for swa-cyclic"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "1", "--cycle-lr-min", "1"],
         r"--cycle-lr-min: expected 0.05 \(--cycle-lr-max\) at most, found 1"),
        (["--methods", "swa-cyclic", "--cycle-epochs", "16", "--cycle-shape", "cosine"],
         "--cycle-epochs: expected at most half of the 30 epochs with --cycle-shape cosine"),
        (["--methods", "fge", "--fge-cycle", "3"], "--fge-cycle: expected an even number of epo"),
        (["--methods", "fge", "--fge-cycle", "14"],
         "--fge-cycle: expected a half cycle within the 6 epochs that are left after --fge-start"),
        (["--methods", "fge", "--fge-start", "1"], "--fge-start: expected a fraction that leaves"),
        (["--methods", "swa-fixed", "--fixed-start", "1.5"], "--fixed-start: expected a fraction"),
        (["--budgets", "0"], r"--budgets: expected numbers in \(0, 100\], found 0"),
        (["--budgets", "1.5,1"], "--budgets: expected rising numbers"),
        (["--budgets", "0.5"],
         r"--swa-start: .* first average after epoch 23 of 15 \(swa\)"),
        (["--lr-schedule", "cosine", "--swa-from", "scratch"],
         "--swa-from: expected sgd with --lr-schedule cosine, found scratch"),
        (["--amp", "int8"], "--amp: expected one of none, bf16, fp16, found 'int8'"),
        (["--amp", "fp16", "--device", "cpu"], "--amp: fp16 needs a CUDA device, found device cpu"),
        (["--sync-bn", "--device", "cpu"], "--sync-bn: torch's SyncBatchNorm needs a CUDA device"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, found 'tpu'"),
        (["--device", "cuda:99"], "--device: .*found 'cuda:99'"),
        (["--backend", "fpga"], "--backend: .*fpga"),
        (["--dataset", "images"], "--data-dir: expected a folder with train"),
        (["--dataset", "imagenet"], "--data-dir: expected a folder with .*val/<class>"),
        (["--dataset", "images", "--data-dir", "missing"], "missing/train: expected a folder"),
        (["--dataset", "images", "--data-dir", ".", "--image-size", "4"], "--image-size: exp"),
        (["--data-dir", "."], "--data-dir: expected only with datasets that are files"),
        (["--pretrained", "torchvision"], "--pretrained: torchvision has weights of resnet50"),
        (["--pretrained", "missing.pt"], "missing.pt"),
        (["--methods", "sgd", "--fge-start", "nan"], "--fge-start: expected a fraction"),
        (["--checkpoint-minutes", "-1"], "--checkpoint-minutes: expected a number of 0 or more"),
        (["--checkpoint-minutes", "nan"], "--checkpoint-minutes: expected a number of 0 or more"),
        (["--model", "vgg16", "--width", "2"], "--image-size: .* that a vgg16 can take, found 8x8"),
        (["--resume", "missing"], "expected the folder of a run, found no results.json"),
    ],
)  # fmt: skip
def test_bad_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swa-fast train: error: ") and error.count("\n") == 1
    with pytest.raises(TrainError, match=message):
        raise TrainError(error.removeprefix("swa-fast train: error: "))
    assert not list(tmp_path.glob("runs/*/*"))


def test_unparsable_options(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["train", "--epochs", "many"], ["train", "--no-such-option"], ["fly"]):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(argv)
        assert exit_info.value.code == 2
        assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--budgets", "1,x"])
    assert "--budgets: expected numbers separated by commas, found '1,x'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ImportError("no"), RuntimeError("operator nms does not exist")])
def test_a_package_that_cannot_be_imported(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, or torchvision beside a torch that it was not built for."""

    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(errors.importlib, "import_module", fail)
    assert cli.main(["train", "--dataset", "cifar10", "--data-dir", "."]) == 2
    found = capsys.readouterr().err
    assert f'cannot be imported ({error}); run: pip install "swa_fast[train]"' in found


def test_divergence_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(tmp_path / "run", lr=1e30)) == 2
    assert "sgd run, epoch 1: expected a finite train_loss, found" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_evaluation_every_third_epoch_and_at_the_end(tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path, eval_every=3)) == 0
    found = records(tmp_path)
    assert [r["test_loss"] is not None for r in found] == [False, False, True, True] * 2
    averages = [r["averages"]["swa"] for r in found[4:]]
    assert [a["test_loss"] is not None for a in averages] == [False, False, True, True]
    # How often one looks does not change what one sees.
    assert averages[-1]["captures"] == 2
    # The end of a run that others only go on from is looked at, too.
    assert cli.main(arguments(tmp_path / "fge", eval_every=3, methods="fge", fge_start=0.5)) == 0
    found = records(tmp_path / "fge")
    assert [r["test_loss"] is not None for r in found] == [False, True, True, True]


def test_two_epochs_by_hand() -> None:
    """Order, crops and the network's own draws of each epoch, the optimiser's settings, and the
    means over images of a network that draws random numbers, with a smaller last batch."""
    options = {
        **OPTIONS, "model": "shakeshake26-2x64d", "methods": ("sgd",), "epochs": 2,
        "nesterov": True, "weight_decay": 0.1, "momentum": 0.5, "lr_schedule": "constant",
    }  # fmt: skip
    trainer = Trainer(TrainConfig.from_options(options), small_digits(), World())
    model = trainer.build()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1, nesterov=True
    )
    for epoch, (_, run) in enumerate(follow(options, "sgd")):
        torch.manual_seed(derive_seed(OPTIONS["seed"], "train", epoch))
        model.train()
        loss, correct = 0.0, 0
        for images, labels in trainer.batches.epoch(derive_seed(OPTIONS["seed"], "augment", epoch)):
            logits = model(images)
            mean = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            loss += mean.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        assert run.records[epoch]["train_loss"] == pytest.approx(loss / 60, rel=1e-5)
        assert run.records[epoch]["train_accuracy"] == pytest.approx(100 * correct / 60)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert epoch == 1


def test_looking_does_not_change_the_result(finished: Path, tmp_path: Path) -> None:
    options = ["train", "--out", str(tmp_path), *words({**ALL, "eval_every": 6})]
    assert cli.main(options) == 0
    for path in finished.glob("model_*.pt"):
        assert_same(load(tmp_path / path.name), load(path))
    assert records(tmp_path)[-1] == records(finished)[-1]


@pytest.mark.parametrize(
    "extra",
    [
        ["--amp", "bf16"],
        ["--no-channels-last"],
        ["--backend", "reference"],
        ["--lr-schedule", "cosine", "--nesterov"],
        ["--lr-schedule", "steps", "--bn-estimator", "pooled"],
        ["--lr-schedule", "constant", "--swa-every", "2", "--budgets", "2"],
        ["--swa-from", "sgd", "--bn-estimator", "torch"],
        ["--model", "vgg16", "--width", "4", "--image-size", "32"],
    ],
)
def test_other_settings_train(extra: list[str], tmp_path: Path) -> None:
    assert cli.main([*arguments(tmp_path, epochs=2), *extra]) == 0
    state = load(tmp_path / "model_swa.pt")
    assert all(t.dtype in (torch.float32, torch.int64) for t in state.values())


def test_compiled_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front only: generating code takes minutes on a busy machine."""
    compiled = []

    def compile_front(function: Any) -> Any:
        compiled.append(function)
        return original(function, backend="aot_eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_front)
    options = {"epochs": 1, "methods": "sgd"}
    assert cli.main([*arguments(tmp_path / "a", **options), "--compile"]) == 0
    assert len(compiled) == 1 and isinstance(compiled[0], nn.Module)
    assert cli.main(arguments(tmp_path / "b", **options)) == 0
    a, b = records(tmp_path / "a")[0], records(tmp_path / "b")[0]
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuning from a file: the network is measured before, and its weights count."""
    assert cli.main(arguments(tmp_path / "first", methods="sgd")) == 0
    weights = tmp_path / "first/model_sgd.pt"
    options = {"methods": "swa-cyclic", "swa_start": 0, "cycle_epochs": 2, "pretrained": weights}
    assert cli.main(arguments(tmp_path / "second", **options)) == 0
    results = json.loads((tmp_path / "second/results.json").read_text())
    before, after = results["summary"]
    first = json.loads((tmp_path / "first/results.json").read_text())["summary"][0]
    assert before["name"] == "pretrained"
    assert before["test_accuracy"] == first["test_accuracy"]
    assert after["captures"] == 3  # the pretrained weights and two cycles
    assert "pretrained network: test" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    again = ["train", "--resume", "second", "--pretrained", "first/model_sgd.pt"]
    assert cli.main(again) == 0
    assert cli.main(arguments(tmp_path / "third", **{**options, "model": "preresnet14"})) == 2
    assert "model_sgd.pt" in capsys.readouterr().err


def test_image_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for part, count in (("train", 9), ("test", 3)):
        for name, low in (("bright", 150), ("dark", 0)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 100, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.jpg")
    out = tmp_path / "out"
    argv = [*arguments(out, batch_size=6), "--dataset", "images", "--data-dir", str(tmp_path)]
    assert cli.main(argv) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["image_shape"] == [3, 16, 16]
    assert results["summary"][1]["test_accuracy"] == 100
    # The data may move, but must not change.
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("train", "test"):
        (tmp_path / part).rename(moved / part)
    change_results(lambda r: r.update(status="running"))(out)
    assert cli.main(["train", "--resume", str(out), "--data-dir", str(moved)]) == 0
    (moved / "test/dark/0.jpg").unlink()
    change_results(lambda r: r.update(status="running"))(out)
    assert cli.main(["train", "--resume", str(out), "--data-dir", str(moved)]) == 2


def test_seeds_of_purposes_and_epochs_differ() -> None:
    seeds = {
        derive_seed(seed, purpose, epoch)
        for seed in (0, 1, 10)
        for purpose in ("init", "train", "augment", "bn")
        for epoch in range(20)
    }
    assert len(seeds) == 3 * 4 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_interrupt_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_digits() -> Dataset:
        raise KeyboardInterrupt

    assert cli.main(arguments(tmp_path / "old", methods="sgd", epochs=1)) == 0
    monkeypatch.setattr(data, "load_digits", load_digits)
    assert cli.main(arguments(tmp_path / "run")) == 130
    assert "Interrupted before the training began" in capsys.readouterr().err
    # The run to be replaced is not the one that could be continued.
    assert cli.main([*arguments(tmp_path / "old"), "--overwrite"]) == 130
    assert "Interrupted before the training began" in capsys.readouterr().err
    assert len(records(tmp_path / "old")) == 1


def test_a_file_takes_its_name_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, call=original: (done.append(name), call(*a))
        )
    write_atomically(tmp_path / "x", lambda file: file.write(b"x"))
    assert done == ["fsync", "replace", "fsync"]  # the file, and the folder
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda f: f.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new"


def test_curves_of_a_single_epoch(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    results["records"] = [r for r in results["records"] if r["epoch"] == EPOCHS]
    draw_curves(results, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as figure:
        figure.load()


def test_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = progress.Progress(quiet=False)
    assert sum(1 for _ in bar.over(iter([None] * 3), 3)) == 3
    bar.start("SGD", epochs=1, steps=2, done=0)
    bar.step()
    bar.step()
    record = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 5.0, "seconds": {}}
    averages = {"swa": {"test_accuracy": 13.5}, "ema": {"test_accuracy": None}}
    bar.epoch({**record, "test_accuracy": 12.5, "averages": averages})
    bar.stop()
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "epoch=1/1" in captured.err and "12.50%" in captured.err
    assert "swa=13.50%" in captured.err
    assert captured.out == ""
    lines: list[str] = []
    bar.write_log(lines.append)  # lines from before are written, too
    assert len(lines) == 1 and "SGD epoch 1/1" in lines[0]


def test_module_command(tmp_path: Path) -> None:
    """The real digits, by ``python -m``, in a folder of its own."""
    command = [sys.executable, "-W", "error", "-m", "swa_fast.train"]
    options = ["--epochs", "2", "--model", "preresnet8", "--width", "2", "--threads", "1"]
    options += ["--batch-size", "256"]
    root = Path(cli.__file__).parents[2]
    answer = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    assert "SGD epoch 2/2" in answer.stdout and "last iterate" in answer.stdout
    results = json.loads((tmp_path / "runs/digits-preresnet8-seed1/results.json").read_text())
    assert results["data"]["train_images"] == 1437


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, amp: str) -> None:
    """All methods, stopped in the middle of an epoch and continued."""
    options = {**ALL, "width": 4, "epochs": 2, "cycle_epochs": 1, "backend": backend, "amp": amp}
    argv = ["train", *words(options), "--device", "cuda", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_after(STEPS + 1, patch, 1)
        assert cli.main(argv) == 130
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["device"] == "cuda:0"
    assert results["environment"]["averaging_backend"] == backend
    captures = {row["name"]: row["captures"] for row in results["summary"]}
    assert (captures["EMA"], captures["SWA, 1.5 budgets"], captures["FGE"]) == (4, 2, 1)
    for path in tmp_path.glob("model_*.pt"):
        assert all(torch.isfinite(tensor).all() for tensor in load(path).values()), path


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu(simulator: Any) -> None:
    """An epoch of four times as many steps has no more waits; averaging after every step
    included."""
    waits = []
    for batch_size in (32, 8):
        options = {**OPTIONS, "methods": ("ema",), "batch_size": batch_size, "device": "cuda"}
        config = TrainConfig.from_options({**options, "eval_every": EPOCHS})
        trainer = Trainer(config, small_digits(), World())
        run = trainer.start(plan(config)[0])
        trainer.train_epoch(run)
        simulator.reset()
        trainer.train_epoch(run)
        waits.append(simulator.counters()["total"]["host_syncs"])
        assert len(trainer.batches) == 64 // batch_size
    assert waits[0] == waits[1]
