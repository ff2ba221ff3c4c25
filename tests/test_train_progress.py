"""What a run shows while it goes on."""

from __future__ import annotations

import pytest

from swa_fast.train import progress

pytestmark = pytest.mark.usefixtures("small")


def test_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = progress.Progress(quiet=False)
    assert sum(1 for _ in bar.over(iter([None] * 3), 3)) == 3
    bar.start("SGD", epochs=1, steps=2, done=0)
    bar.step()
    bar.step()
    record = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 5.0, "seconds": {}}
    averages = {"swa": {"test_accuracy": 13.5}, "ema": {"test_accuracy": None}}
    bar.epoch({**record, "test_accuracy": 12.5, "averages": averages}, 7300.0)
    bar.stop()
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "epoch=1/1" in captured.err and "12.50%" in captured.err
    assert "swa=13.50%" in captured.err and "left=2.0 h" in captured.err
    assert captured.out == ""
    lines: list[str] = []
    bar.write_log(lines.append)  # lines from before are written, too
    assert len(lines) == 1 and "SGD epoch 1/1" in lines[0] and lines[0].endswith("2.0 h left\n")
