"""The command line: what it refuses, what it repeats, and where it leaves its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_runs import arguments, records

from swa_fast.train import cli, data, errors

pytestmark = pytest.mark.usefixtures("small")


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
