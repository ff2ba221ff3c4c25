"""States that do not fit the run that they should continue."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import change_results, cut, flip, load, newest

from swa_fast.train import cli

pytestmark = pytest.mark.usefixtures("small")


def change(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    """Edits all checkpoints of the SWA run."""

    def damage(folder: Path) -> None:
        for path in (folder / "checkpoints").glob("swa-*.pt"):
            content = load(path)
            edit(content)
            torch.save(content, path)

    return damage


def each(trajectory: str, edit: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        for path in (folder / "checkpoints").glob(f"{trajectory}-*.pt"):
            edit(path)

    return damage


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


@pytest.mark.parametrize("dataset", ["digits", "imagenet"])
def test_unfinished_runs_of_version_2(
    dataset: str, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They go on, unless their crops would be others from here on."""
    change_results(lambda r: r.update(schema_version=2))(interrupted)
    change_results(lambda r: r["config"].update(dataset=dataset))(interrupted)
    assert cli.main(["train", "--resume", str(interrupted)]) == (0 if dataset == "digits" else 2)
    if dataset == "imagenet":
        assert "found version 2, whose random crops of imagenet were others" in (
            capsys.readouterr().err
        )
