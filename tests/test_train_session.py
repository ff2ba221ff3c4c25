"""Whole runs: their files, what stops them, and their continuation bit by bit."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_runs import (
    ALL,
    STEPS,
    arguments,
    assert_every_epoch_once,
    assert_same,
    assert_same_runs,
    change_results,
    cut,
    flip,
    kill_after,
    load,
    newest,
    records,
    words,
)

from swa_fast.train import cli, data, session
from swa_fast.train.averages import Average, Ensemble, WeightAverage
from swa_fast.train.data.memory import MemoryDataset
from swa_fast.train.errors import Stopped
from swa_fast.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("small")


def test_all_files(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints",
        "curves.png",
        "log.txt",
        "model_ema.pt",
        "model_fge-01.pt",
        "model_fge-average.pt",
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
    assert (results["schema"], results["schema_version"]) == ("swa_fast.train.results", 3)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_a_run_like_an_interrupt(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And with the terminal gone, the folder's log says how to go on."""

    class Gone(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    inherited = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored, and so it stays
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kill_after(3, patch, 1, number)
        if number == signal.SIGHUP:
            patch.setattr(sys, "stdout", Gone(io.BytesIO()))
            patch.setattr(sys, "stderr", Gone(io.BytesIO()))
        try:
            assert cli.main(["train", "--out", str(tmp_path), *words(ALL)]) == 130
            assert signal.getsignal(number) == before
        finally:
            signal.signal(number, inherited)
    log = (tmp_path / "log.txt").read_text()
    assert f"Continue with:\n  swa-fast train --resume {tmp_path}" in log
    if number == signal.SIGTERM:
        assert "its state is in" in capsys.readouterr().err
    state = load(newest(tmp_path, "sgd"))
    assert state["step"] + STEPS * state["epoch"] == 3


def test_a_hangup_stays_ignored_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session.interrupts() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize(
    ("kind", "calls", "method", "epoch"),
    # The EMA has four scores before the second one of the SWA run.
    [(WeightAverage, 6, "swa", 3), (Ensemble, 1, "fge", 2)],
)
def test_a_stop_in_an_evaluation_keeps_the_epoch(
    kind: type[Average],
    calls: int,
    method: str,
    epoch: int,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in the pass over the data: the capture is saved, and not made twice."""
    original, left = kind.score, calls

    def score(self: Average, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
            if kind is Ensemble:  # it looks at no batch, where the trainer would stop
                raise Stopped
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "score", score)
        assert cli.main(["train", "--out", str(tmp_path), *words(ALL)]) == 130
    state = load(newest(tmp_path, method))
    assert (state["epoch"], state["step"], state["captured"]) == (epoch, STEPS, True)
    source = state["ranks"][0] if kind is Ensemble else state
    assert source["averages"][method]["captures"] == (1 if kind is Ensemble else 2)
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


def test_divergence_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(tmp_path / "run", lr=1e30)) == 2
    assert "sgd run, epoch 1: expected a finite train_loss, found" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


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


def test_evaluation_every_third_epoch_and_at_the_end(tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path, eval_every=3)) == 0
    found = records(tmp_path)
    # And after the first, as in the authors' code.
    assert [r["test_loss"] is not None for r in found] == [True, False, True, True] * 2
    averages = [r["averages"]["swa"] for r in found[4:]]
    assert [a["test_loss"] is not None for a in averages] == [False, False, True, True]
    # How often one looks does not change what one sees.
    assert averages[-1]["captures"] == 2
    # The end of a run that others only go on from is looked at, too.
    assert cli.main(arguments(tmp_path / "fge", eval_every=3, methods="fge", fge_start=0.5)) == 0
    found = records(tmp_path / "fge")
    assert [r["test_loss"] is not None for r in found] == [True, True, True, True]


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


def test_an_interrupt_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_digits() -> MemoryDataset:
        raise KeyboardInterrupt

    assert cli.main(arguments(tmp_path / "old", methods="sgd", epochs=1)) == 0
    monkeypatch.setattr(data, "load_digits", load_digits)
    assert cli.main(arguments(tmp_path / "run")) == 130
    assert "Interrupted before the training began" in capsys.readouterr().err
    # The run to be replaced is not the one that could be continued.
    assert cli.main([*arguments(tmp_path / "old"), "--overwrite"]) == 130
    assert "Interrupted before the training began" in capsys.readouterr().err
    assert len(records(tmp_path / "old")) == 1


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
