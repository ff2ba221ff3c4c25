"""The trainer as a whole: both runs, files, continuation after a kill, errors, command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swa_fast.schedules import paper_lr, paper_swa_lr
from swa_fast.train import cli, loop, progress
from swa_fast.train.config import TrainConfig
from swa_fast.train.data import Dataset
from swa_fast.train.errors import TrainError
from swa_fast.train.loop import Trainer, derive_seed
from swa_fast.train.report import draw_curves, format_table, summarise
from swa_fast.train.state import RunFolder, write_atomically

EPOCHS = 4
STEPS = 2  # 60 images in batches of 32
FIRST = 3  # swa_start 0.5 of 4 epochs: captures after epochs 3 and 4

OPTIONS = {
    "model": "preresnet8",
    "width": 2,
    "epochs": EPOCHS,
    "batch_size": 32,
    "swa_start": 0.5,
    "seed": 7,
    "threads": 1,
}


def small_digits() -> Dataset:
    """60 training and 20 test images, enough to tell weights apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 80, (60, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images += (60 * labels)[:, None, None, None].to(torch.uint8)
    return Dataset(("a", "b", "c"), images, labels, images[:20], labels[:20], pad=1, flip=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_digits", small_digits)


def arguments(out: Path, **changes: Any) -> list[str]:
    pairs = {**OPTIONS, **changes}
    return [
        "train",
        "--out",
        str(out),
        *(word for k, v in pairs.items() for word in (f"--{k.replace('_', '-')}", str(v))),
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    """Records without their times, which no two runs share."""
    found = json.loads((folder / "results.json").read_text())["records"]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(loop, "load_digits", small_digits)
        assert cli.main(arguments(folder)) == 0
    return folder


def kill_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Makes the trainer's ``steps``-th step the last: Ctrl-C in the middle of whatever epoch."""
    done = 0

    def step(self: progress.Progress) -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise KeyboardInterrupt

    patch.setattr(progress.Progress, "step", step)


def test_all_files(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == sorted(RunFolder.NAMES)
    results = json.loads((finished / "results.json").read_text())
    assert (results["schema"], results["schema_version"]) == ("swa_fast.train.results", 1)
    assert results["status"] == "complete"
    assert results["config"]["seed"] == 7 and results["config"]["device"] in ("cpu", "cuda:0")
    assert results["environment"]["torch"] == torch.__version__
    assert results["data"]["classes"] == ["a", "b", "c"]
    with Image.open(finished / "curves.png") as figure:
        figure.load()
        assert figure.format == "PNG" and min(figure.size) > 500
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_records(finished: Path) -> None:
    config = TrainConfig.from_options(OPTIONS)
    found = records(finished)
    assert [(r["method"], r["epoch"]) for r in found] == [
        (m, e) for m in ("sgd", "swa") for e in range(1, EPOCHS + 1)
    ]
    for record in found:
        epoch = record["epoch"] - 1
        if record["method"] == "sgd":
            expected = paper_lr(epoch, lr=config.lr, total=EPOCHS, final_lr=0.01 * config.lr)
        else:
            expected = paper_swa_lr(epoch, lr=config.lr, swa_lr=config.swa_lr, start=FIRST)
        assert record["lr"] == expected
        captures = max(0, epoch + 2 - FIRST) if record["method"] == "swa" else 0
        assert record["captures"] == captures
        assert (record["swa_test_accuracy"] is not None) == (captures > 0)
        assert 0 <= record["test_accuracy"] <= 100
        assert record["train_loss"] > 0
    # Same weights, same batches, same rate: the first epochs of both runs are one.
    first = [{**r, "method": ""} for r in found if r["epoch"] == 1]
    assert first[0] == first[1]


def test_summary_and_table(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    sgd, iterate, swa = results["summary"]
    last = {r["method"]: r for r in results["records"] if r["epoch"] == EPOCHS}
    assert sgd["test_accuracy"] == last["sgd"]["test_accuracy"]
    assert iterate["test_accuracy"] == last["swa"]["test_accuracy"]
    assert swa["test_accuracy"] == last["swa"]["swa_test_accuracy"]
    assert swa["test_loss"] == last["swa"]["swa_test_loss"]
    assert (sgd["captures"], swa["captures"]) == (None, 2)
    lines = format_table(results["summary"]).splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["SGD", "SWA run, last iterate", "SWA"]
    assert f"{swa['test_accuracy']:.2f} %" in lines[4]
    assert len({len(line) for line in lines[:5]}) == 1
    assert summarise(results["records"]) == results["summary"]


def test_average_is_the_mean_of_the_captured_weights(finished: Path) -> None:
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, small_digits())
    run = trainer.start("swa")
    captured = []
    for epoch in range(1, EPOCHS + 1):
        trainer.train_epoch(run)
        if epoch >= FIRST:
            captured.append({n: p.detach().double() for n, p in run.model.named_parameters()})
    average = load(finished / "model_swa.pt")
    assert len(captured) == 2
    for name in captured[0]:
        mean = sum(weights[name] for weights in captured) / len(captured)
        assert isinstance(mean, torch.Tensor)
        torch.testing.assert_close(average[name].double(), mean, rtol=1e-6, atol=1e-7)


def test_average_has_batch_norm_statistics_of_its_own(finished: Path) -> None:
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, small_digits())
    model = trainer.start("sgd").model
    model.load_state_dict(load(finished / "model_swa.pt"))
    found = {n: b.clone() for n, b in model.named_buffers()}
    live = load(finished / "swa.pt")["model"]
    assert not torch.equal(found["bn.running_mean"], live["bn.running_mean"])
    # Over the first layer's input, by hand: the mean over batches of each batch's mean.
    seed = derive_seed(config.seed, "bn", EPOCHS - 1)
    model.train()
    means = []
    with torch.no_grad():
        for images, _ in trainer.batches.epoch(seed):
            means.append(model.conv1(images).mean((0, 2, 3)))  # type: ignore[operator]
    torch.testing.assert_close(
        found["layer1.0.bn1.running_mean"], torch.stack(means).mean(0), rtol=1e-4, atol=1e-5
    )
    assert found["bn.num_batches_tracked"] == STEPS


def test_training_goes_on_from_the_iterate_not_from_the_average() -> None:
    trainer = Trainer(TrainConfig.from_options(OPTIONS), small_digits())
    plain, swa = trainer.start("swa"), trainer.start("swa")
    plain.averaged = None
    for _ in range(EPOCHS):
        trainer.train_epoch(plain)
        trainer.train_epoch(swa)
    assert_same(dict(plain.model.state_dict()), dict(swa.model.state_dict()))


# In the middle of: SGD's epoch 1 (nothing saved yet), 3; the SWA run's epochs 1, 3 and 4.
@pytest.mark.parametrize("steps", [1, 2 * STEPS + 1, 4 * STEPS + 1, 6 * STEPS + 2, 7 * STEPS + 1])
def test_a_resumed_run_equals_an_uninterrupted_one(
    steps: int,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "a run"
    with monkeypatch.context() as patch:
        kill_after(steps, patch)
        assert cli.main(arguments(folder)) == 130
    assert f"swa-fast train --resume '{folder}'" in capsys.readouterr().err
    done = json.loads((folder / "results.json").read_text())
    assert done["status"] == "running"
    assert len(done["records"]) == (steps - 1) // STEPS
    torch.manual_seed(123)  # nothing may depend on the global generator's state
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert records(folder) == records(finished)
    for name in ("model_sgd.pt", "model_swa.pt", "sgd.pt", "swa.pt"):
        assert_same(load(folder / name), load(finished / name))


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
        assert cli.main(arguments(folder)) == 130
    assert load(folder / "sgd.pt")["epoch"] == 2 and len(records(folder)) == 1
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert records(folder) == records(finished)


def test_resuming_a_finished_run_prints_its_table(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loop, "load_digits")  # nothing is loaded, let alone trained
    assert cli.main(["train", "--resume", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "already complete" in out and "SWA run, last iterate" in out


def test_resume_takes_repeated_options_and_refuses_others(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--resume", str(finished), "--seed", "7"]) == 0
    capsys.readouterr()
    for options, message in (
        (["--epochs", "9"], "--epochs: expected 4 as in"),
        (["--no-channels-last"], "--channels-last: expected True as in"),
        (["--out", "x"], "--out: expected only without --resume"),
        (["--overwrite"], "--overwrite: expected only without --resume"),
    ):
        assert cli.main(["train", "--resume", str(finished), *options]) == 2
        assert f"swa-fast train: error: {message}" in capsys.readouterr().err


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped in the SWA run's last epoch."""
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        kill_after(7 * STEPS + 1, patch)
        assert cli.main(arguments(folder)) == 130
    return folder


def change(name: str, edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = load(folder / name)
        edit(content)
        torch.save(content, folder / name)

    return damage


def change_results(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "results.json").read_text())
        edit(content)
        (folder / "results.json").write_text(json.dumps(content))

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/dev/null/executed",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "swa.pt"), r"swa\.pt: expected a swa checkpoint .*found a truncated or"),
        (lambda f: (f / "sgd.pt").write_bytes(b""), r"sgd\.pt: expected .* truncated or foreign"),
        (lambda f: torch.save(Malicious(), f / "swa.pt"), r"swa\.pt: .* truncated or foreign"),
        (lambda f: torch.save({"a": 1}, f / "swa.pt"), r"swa\.pt: .* found another kind of file"),
        (lambda f: shutil.copy(f / "sgd.pt", f / "swa.pt"), r"swa\.pt: .* found method sgd"),
        (lambda f: (f / "sgd.pt").unlink(), r"sgd\.pt: expected a state after epoch 4.*no file"),
        (change("swa.pt", lambda c: c.update(version=9)), r"swa\.pt: .* found version 9"),
        (change("swa.pt", lambda c: c["config"].update(lr=0.3)),
         r"swa\.pt: expected lr = .* as in results\.json, found lr = 0\.3"),
        (change("swa.pt", lambda c: c["model"].pop("fc.bias")), r"swa\.pt: .*fc\.bias"),
        (change("swa.pt", lambda c: c["averaged"].pop("module.fc.bias")), r"swa\.pt: .*fc\.bias"),
        (change("swa.pt", lambda c: c.update(epoch=2)), r"swa\.pt: .* epoch 2 and 3 records"),
        (change("swa.pt", lambda c: c.pop("optimizer")), r"swa\.pt: .*KeyError: 'optimizer'"),
        (lambda f: (f / "results.json").unlink(), r"found no results\.json in"),
        (lambda f: (f / "results.json").write_text("{"), r"results\.json: .*unreadable JSON"),
        (lambda f: (f / "results.json").write_text("{}"), r"results\.json: .*another kind of file"),
        (change_results(lambda r: r.update(schema_version=2)), r"results\.json: .*found version 2"),
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
    before = {p.name: p.read_bytes() for p in interrupted.iterdir()}
    assert cli.main(["train", "--resume", str(interrupted)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swa-fast train: error: ")
    assert re.search(message, error), error
    assert {p.name: p.read_bytes() for p in interrupted.iterdir()} == before


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
    assert cli.main(arguments(folder, epochs=1)) == 0
    assert cli.main([*arguments(folder, epochs=2), "--overwrite"]) == 0
    assert len(records(folder)) == 4
    assert (folder / "notes.txt").read_text() == "mine"

    # An earlier run is given up only once the new one can start.
    assert cli.main([*arguments(folder), "--overwrite", "--backend", "fpga"]) == 2
    assert len(records(folder)) == 4
    capsys.readouterr()

    assert cli.main(arguments(folder / "notes.txt")) == 2
    assert "--out: expected a folder, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "mnist"], "--dataset: expected one of digits, images, found 'mnist'"),
        (["--model", "vgg"], "--model: expected one of vgg16, .*densenet161, found 'vgg'"),
        (["--epochs", "0"], "--epochs: expected 1 or more, found 0"),
        (["--batch-size", "-1"], "--batch-size: expected 1 or more, found -1"),
        (["--width", "0"], "--width: expected 1 or more, found 0"),
        (["--threads", "0"], "--threads: expected 1 or more, found 0"),
        (["--eval-every", "0"], "--eval-every: expected 1 or more, found 0"),
        (["--lr", "0"], "--lr: expected a finite number above 0, found 0"),
        (["--lr", "nan"], "--lr: expected a finite number above 0, found nan"),
        (["--swa-lr", "-1"], "--swa-lr: expected a finite number above 0, found -1"),
        (["--momentum", "1"], r"--momentum: expected a number in \[0, 1\), found 1"),
        (["--weight-decay", "inf"], "--weight-decay: expected a finite number of 0 or more"),
        (["--seed", "-1"], r"--seed: expected an integer in \[0, 2\^63\), found -1"),
        (["--swa-start", "0"], r"--swa-start: expected a fraction of the epochs in \(0, 1\]"),
        (["--swa-start", "1"], "--swa-start: expected a fraction that leaves an epoch to average"),
        (["--amp", "int8"], "--amp: expected one of none, bf16, fp16, found 'int8'"),
        (["--amp", "fp16", "--device", "cpu"], "--amp: fp16 needs a CUDA device, found device cpu"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, found 'tpu'"),
        (["--device", "cuda:99"], "--device: .*found 'cuda:99'"),
        (["--backend", "fpga"], "--backend: .*fpga"),
        (["--dataset", "images"], "--data-dir: expected a folder with train"),
        (["--dataset", "images", "--data-dir", "missing"], "missing/train: expected a folder"),
        (["--dataset", "images", "--data-dir", ".", "--image-size", "4"], "--image-size: exp"),
        (["--data-dir", "."], "--data-dir: expected only with --dataset images"),
        (["--image-size", "32"], "--image-size: expected only with --dataset images"),
        (["--resume", "missing"], "--resume: expected the folder of a run, found no results.json"),
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


def test_divergence_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(tmp_path / "run", lr=1e30)) == 2
    assert "sgd run, epoch 1: expected a finite train_loss, found" in capsys.readouterr().err
    assert not (tmp_path / "run/sgd.pt").exists()


def test_evaluation_every_third_epoch_and_at_the_end(tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path, eval_every=3)) == 0
    found = records(tmp_path)
    assert [r["test_loss"] is not None for r in found] == [False, False, True, True] * 2
    assert [r["swa_test_loss"] is not None for r in found] == [False] * 6 + [True] * 2
    # How often one looks does not change what one sees.
    assert found[-1]["captures"] == 2


def test_looking_does_not_change_the_result(finished: Path, tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path, eval_every=4)) == 0
    assert_same(load(tmp_path / "model_swa.pt"), load(finished / "model_swa.pt"))
    assert records(tmp_path)[-1] == records(finished)[-1]


@pytest.mark.parametrize(
    "extra", [["--amp", "bf16"], ["--no-channels-last"], ["--backend", "reference"]]
)
def test_other_settings_train(extra: list[str], tmp_path: Path) -> None:
    assert cli.main([*arguments(tmp_path, epochs=2), *extra]) == 0
    state = load(tmp_path / "model_swa.pt")
    assert all(t.dtype in (torch.float32, torch.int64) for t in state.values())


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
    assert results["summary"][2]["test_accuracy"] == 100
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

    monkeypatch.setattr(loop, "load_digits", load_digits)
    assert cli.main(arguments(tmp_path / "run")) == 130
    assert "Interrupted before the training began" in capsys.readouterr().err


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
    bar.epoch({"epoch": 1, "test_accuracy": 12.5, "swa_test_accuracy": None, "seconds": {}})
    bar.stop()
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "epoch=1/1" in captured.err and "12.50%" in captured.err
    assert captured.out == ""


def test_module_command(tmp_path: Path) -> None:
    """The real digits, by ``python -m``, in a folder of its own."""
    command = [sys.executable, "-W", "error", "-m", "swa_fast.train"]
    options = ["--epochs", "1", "--model", "preresnet8", "--width", "2", "--threads", "1"]
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
    assert "SGD epoch 1/1" in answer.stdout and "SWA run, last iterate" in answer.stdout
    results = json.loads((tmp_path / "runs/digits-preresnet8-seed1/results.json").read_text())
    assert results["data"]["train_images"] == 1437


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, amp: str) -> None:
    monkeypatch.undo()
    argv = arguments(tmp_path, width=4, epochs=2, batch_size=512)
    options = ["--device", "cuda", "--backend", backend, "--amp", amp]
    assert cli.main([*argv, *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["device"] == "cuda:0"
    assert results["summary"][2]["captures"] == 1
    assert results["environment"]["averaging_backend"] == backend
    average = load(tmp_path / "model_swa.pt")
    assert all(torch.isfinite(tensor).all() for tensor in average.values())
