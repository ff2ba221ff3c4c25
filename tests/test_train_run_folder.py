"""The files of a run: whole or not there, and one process at a time."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import arguments, cut, newest, records

from swa_fast.train import cli, files
from swa_fast.train.errors import TrainError
from swa_fast.train.files import write_atomically
from swa_fast.train.run_folder import RunFolder

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
    leftovers = [
        interrupted / ".results.json.123.tmp",
        interrupted / "checkpoints/.swa-cyclic-00003-0000001.pt.7.tmp",
    ]
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
        patch.setattr(files, "open", full, raising=False)
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


# ------------------------------------------------------------------------ what is somebody else's

FOREIGN = (
    "notes.txt", ".notes.tmp", ".results.json.tmp", "model_best.pt", "model_sgd_old.pt",
    "checkpoints/gpt.pt", "checkpoints/.gpt.tmp", "checkpoints/sgd-00001-mine.pt",
    "checkpoints/older/sgd-00001-0000001.pt", "tensorboard/events.out.tfevents.1",
    "tensorboard/mine/events.out.tfevents.1", "tensorboard/sgd/notes.txt",
)  # fmt: skip


def test_files_of_others_stay(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in FOREIGN:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    state = folder / "checkpoints/sgd-00003-0000004.pt"
    assert any(folder.glob("checkpoints/sgd-*.pt")) and any(folder.glob("model_fge-*.pt"))
    run = RunFolder(folder)
    with run.locked():
        pass
    run.save_checkpoint("sgd", 3, 4, {})
    assert state.exists()
    assert all((folder / name).read_text() == "mine" for name in FOREIGN)
    run.create(overwrite=True)
    run.clear()
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == set(FOREIGN)


@pytest.mark.parametrize("results", [None, "", "{}", '{"schema": "other"}', "pipe"])
def test_a_folder_without_a_run_is_not_overwritten(
    results: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("checkpoints/gpt.pt", "model_sgd.pt", "log.txt", "tensorboard/x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    if results == "pipe":
        os.mkfifo(tmp_path / "results.json")
    elif results is not None:
        (tmp_path / "results.json").write_text(results)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert cli.main([*arguments(tmp_path), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "no readable results.json of a run that they could belong to" in error
    assert error.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_an_emptied_folder_of_a_run_keeps_nothing(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("model_merged.pt", "model_capture-swa-0003.pt", "model_swa-0.5.pt"):
        (folder / name).touch()
    RunFolder(folder).clear()
    assert list(folder.iterdir()) == []


# -------------------------------------------------------------------------------- damaged results


def _damages() -> dict[str, Any]:
    def change(**values: Any) -> Any:
        return lambda results: json.dumps({**results, **values})

    def within(key: str, **values: Any) -> Any:
        return lambda results: json.dumps({**results, key: {**results[key], **values}})

    def record(**values: Any) -> Any:
        return lambda results: json.dumps(
            {**results, "records": [{**results["records"][0], **values}]}
        )

    return {
        "cut": lambda results: json.dumps(results)[:-40],
        "bytes": lambda results: "\x00\udcff",
        "deep": lambda results: "[" * 100_000,
        "a list": lambda results: "[]",
        "number as config": change(config=3),
        "records of text": change(records="none"),
        "record of text": change(records=["x"]),
        "nan": record(lr=float("nan")),
        "no seconds": record(seconds={}),
        "averages as a list": record(averages=[]),
        "text as epoch": record(epoch="1"),
        "no summary": change(status="complete", summary=[]),
        "summary without names": change(summary=[{}]),
        "unknown status": change(status=[1]),
        "no data": change(data=None),
        "methods as text": within("config", methods="sgd"),
        "text as width": within("config", width="16"),
        "text as lr": within("config", lr="fast"),
        "null as model": within("config", model=None),
        "unknown setting": within("config", speed=3),
    }


@pytest.mark.parametrize("damage", _damages())
@pytest.mark.parametrize("command", ["resume", "report"])
def test_damaged_results(
    damage: str,
    command: str,
    interrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    path = folder / "results.json"
    text = _damages()[damage](json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogateescape"))
    capsys.readouterr()
    argv = ["train", "--resume", str(folder)] if command == "resume" else ["report", str(folder)]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"swa-fast {argv[0]}: error: ")
    assert len(error) == 1 or error[0].startswith("left out")


def test_pipes_are_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "results.json")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "expected a regular file" in capsys.readouterr().err
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    os.mkfifo(folder.checkpoints / "sgd-00000-0000001.pt")
    with pytest.raises(TrainError, match="expected a regular file"):
        folder.load_checkpoint("sgd", torch.device("cpu"), print)


def test_names_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8, in the name of the folder."""
    name = os.fsdecode(bytes(tmp_path / "run-") + b"\xff\xfe")
    assert cli.main(arguments(Path(name), epochs=1, swa_start=0.0, methods="sgd")) == 0
    assert cli.main(["train", "--resume", name]) == 0
    assert "already complete" in capfd.readouterr().out
    assert cli.main(["report", name]) == 0
    assert cli.main(["train", "--resume", name + "2"]) == 2
    error = capfd.readouterr().err
    assert "found no results.json" in error and "Traceback" not in error
