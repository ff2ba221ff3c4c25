"""Methods along the trajectory of SWA, and averages of its captures after the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import STEPS, arguments, assert_same_runs, kill_after, load

from swa_fast.train import averages, cli
from swa_fast.train.defaults import METHODS

pytestmark = pytest.mark.usefixtures("small")

ALONG = ("swa", "swa-power", "lawa", "swag")
CHANGES: dict[str, Any] = {
    "methods": ("sgd", *ALONG), "budgets": (1.0, 1.5), "lawa_last": 2, "power_gamma": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("along")


def trained(out: Path, *more: str) -> Path:
    assert cli.main([*arguments(out, **CHANGES), "--keep-captures", "--quiet", *more]) == 0
    return out


def test_methods_along_one_trajectory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(averages.Gaussian, "samples", 3)
    out = trained(folder / "run")
    results = json.loads((out / "results.json").read_text())
    assert {r["trajectory"] for r in results["records"]} == {"sgd", "swa"}
    rows = {(row["method"], row["budget"]): row for row in results["summary"]}
    assert set(rows) == {("sgd", 1.0)} | {(m, b) for m in ALONG for b in (1.0, 1.5)}
    assert all(0 < row["test_accuracy"] <= 100 for row in rows.values())
    shown = capsys.readouterr().out
    for method in ALONG:
        assert METHODS[method] in shown
        assert rows[method, 1.5]["captures"] == 4
    # SWAG is looked at where it is reported alone.
    seen = [r["averages"]["swag"]["test_loss"] for r in results["records"] if r["averages"]]
    assert [loss is not None for loss in seen] == [False, False, False, True, False, True]

    # By hand, from the captures after epochs 3 to 6.
    captured = [load(out / f"model_capture-swa-{epoch:04d}.pt") for epoch in (3, 4, 5, 6)]
    weights = {
        "swa": (0.25, 0.25, 0.25, 0.25),
        "swag": (0.25, 0.25, 0.25, 0.25),
        "lawa": (0.0, 0.0, 0.5, 0.5),
        "swa-power": (1 / 16, 3 / 16, 5 / 16, 7 / 16),
    }
    for method, parts in weights.items():
        found = load(out / f"model_{method}.pt")
        for name, tensor in found.items():
            if name.endswith(("weight", "bias")):
                mean = sum(
                    w * state[name].double() for w, state in zip(parts, captured, strict=True)
                )
                torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)


def test_resumes_to_the_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within an epoch after the first captures."""
    monkeypatch.setattr(averages.Gaussian, "samples", 3)
    out = folder / "stopped"
    with monkeypatch.context() as patch:
        kill_after(7 * STEPS + 1, patch, signals=1)
        words = [*arguments(out, **CHANGES), "--keep-captures", "--quiet"]
        assert cli.main(words) == 130
    assert cli.main(["train", "--resume", str(out), "--quiet"]) == 0
    assert_same_runs(folder / "run", out)


def test_merge_makes_what_the_run_would_have(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "run"
    results = json.loads((out / "results.json").read_text())
    rows = {(r["method"], r["budget"]): r for r in results["summary"]}
    for words, method in (
        ([], "swa"), (["--weights", "power:1"], "swa-power"), (["--last", "2"], "lawa"),
    ):  # fmt: skip
        assert cli.main(["merge", str(out), *words]) == 0
        merged, expected = load(out / "model_merged.pt"), load(out / f"model_{method}.pt")
        assert list(merged) == list(expected)
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        assert f"{rows[method, 1.5]['test_accuracy']:.2f}" in capsys.readouterr().out
    for words in (["--weights", "minus-sqrt"], ["--weights", "ema:0.5"]):
        assert cli.main(["merge", str(out), *words]) == 0
    for words, message in (
        (["--weights", "cosine"], "--weights: expected uniform, minus-sqrt"),
        (["--weights", "power:-2"], "--weights: gamma: expected a number above -1"),
        (["--weights", "ema:x"], "--weights"),
        (["--last", "0"], "--last: expected 1 or more"),
        (["--last", "9"], "--last: expected 4 at most, found 9"),
    ):
        assert cli.main(["merge", str(out), *words]) == 2
        assert message in capsys.readouterr().err
    (folder / "empty").mkdir(exist_ok=True)
    assert cli.main(["merge", str(folder / "empty")]) == 2
    bad = out / "model_capture-swa-0005.pt"
    kept = bad.read_bytes()
    before = (out / "model_merged.pt").read_bytes()
    bad.write_bytes(kept[:100])
    assert cli.main(["merge", str(out)]) == 2
    assert "capture-swa-0005.pt: expected weights of a preresnet8" in capsys.readouterr().err
    bad.write_bytes(kept)
    assert (out / "model_merged.pt").read_bytes() == before
    for file in out.glob("model_capture-*.pt"):
        file.unlink()
    assert cli.main(["merge", str(out)]) == 2
    assert "--keep-captures" in capsys.readouterr().err
