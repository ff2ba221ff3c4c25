"""The files of a run: whole or not there, and one process at a time."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import arguments, cut, newest, records

from swa_fast.train import cli, run_folder
from swa_fast.train.errors import TrainError
from swa_fast.train.run_folder import RunFolder, write_atomically

pytestmark = pytest.mark.usefixtures("small")


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


def test_a_failed_write_of_a_checkpoint_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(bytes(content)[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path)
    folder.save_checkpoint("sgd", 0, 1, {"a": 1})
    with monkeypatch.context() as patch:
        full = lambda path, mode: io.BufferedWriter(Full(path, mode))  # noqa: E731
        patch.setattr(run_folder, "open", full, raising=False)
        with pytest.raises(TrainError, match=r"0000002\.pt: cannot be written .*disk is full"):
            folder.save_checkpoint("sgd", 0, 2, {str(i): torch.zeros(9999) for i in range(3)})
    assert [p.name for p in folder.checkpoints.iterdir()] == ["sgd-00000-0000001.pt"]


def test_a_file_takes_its_name_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, call=original: (done.append(name), call(*a))
        )
    write_atomically(tmp_path / "x", b"x")
    assert done == ["fsync", "replace", "fsync"]  # the file, and the folder
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", fail)
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
