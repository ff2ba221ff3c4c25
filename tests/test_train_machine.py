"""What suits the machine, and what it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import OPTIONS, words

from swa_fast.train import cli, machine
from swa_fast.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("small")


def _steps(monkeypatch: pytest.MonkeyPatch, work: float = 1e6) -> list[int]:
    """Made-up training steps that take a millisecond a thread; gives the batches asked for."""
    batches = []

    def training_step(
        name: str, width: int, side: int, batch: int, *rest: Any
    ) -> tuple[Callable[[], None], float]:
        batches.append(batch)
        torch.rand(1)  # as weights are drawn
        return lambda: time.sleep(1e-3 * torch.get_num_threads()), work

    monkeypatch.setattr(machine, "_training_step", training_step)
    return batches


def test_the_fastest_number_of_threads_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.from_options({**OPTIONS, "device": "cpu"})
    batches = _steps(monkeypatch)
    state = torch.get_rng_state()
    torch.set_num_threads(4)  # the fixture sets the number back
    assert machine.choose_threads(config, seconds=0.06) == 1
    assert torch.get_num_threads() == 4 and torch.equal(torch.get_rng_state(), state)
    assert batches == [1, OPTIONS["batch_size"]]
    # A network that takes seconds an image is not tried; one of several processes neither.
    _steps(monkeypatch, work=1e12)
    assert machine.choose_threads(config) == 4
    batches = _steps(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machine.choose_threads(config) == 4 and batches == []


def test_the_number_of_threads_is_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _steps(monkeypatch)
    torch.set_num_threads(2)
    options = words({k: v for k, v in OPTIONS.items() if k != "threads"} | {"epochs": 1})
    argv = ["train", "--out", str(tmp_path), *options, "--methods", "sgd"]
    assert cli.main(argv) == 0
    line = "1 of 2 CPU threads, as measured in half a second"
    assert line in capsys.readouterr().out and line in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["config"]["threads"] == 1
    assert cli.main([*argv, "--overwrite", "--threads", "2"]) == 0
    assert line not in capsys.readouterr().out


def test_a_real_network_is_tried() -> None:
    torch.set_num_threads(2)
    config = TrainConfig.from_options({**OPTIONS, "device": "cpu"})
    assert machine.choose_threads(config, seconds=0.05) in (1, 2)


def test_bf16_without_its_instructions_is_refused_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "_has_bf16", lambda: False)
    monkeypatch.setattr(
        machine, "measure_speed", lambda device, amp: {"none": 9e9, "bf16": 2e9}[amp]
    )
    options = words({**OPTIONS, "epochs": 1, "amp": "bf16", "device": "cpu"})
    argv = ["train", "--out", str(tmp_path / "run"), *options, "--methods", "sgd"]
    assert cli.main(argv) == 2
    assert "found bf16, with which training steps of a WRN-16-4 take 4.5 times as long here" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert cli.main([*argv, "--force-amp"]) == 0
    # With the instructions nothing is measured.
    monkeypatch.setattr(machine, "_has_bf16", lambda: True)
    monkeypatch.delattr(machine, "measure_speed")
    assert cli.main([*argv, "--overwrite"]) == 0


def test_speed_is_measured() -> None:
    assert 1e8 < machine.measure_speed("cpu") < 1e15
