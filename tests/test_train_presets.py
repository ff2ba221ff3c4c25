"""Experiments by name, and what is made of their results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from swa_fast.train import cli, presets
from swa_fast.train.config import TrainConfig
from swa_fast.train.report import compare_runs, find_runs
from swa_fast.train.run_folder import RunFolder

# Of a smaller network, where it does not matter which.
SMALLEST = ["--model", "preresnet8"]
SMALL = ["--dataset", "synthetic", "--fraction", "0.02", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods with two seeds, at the smallest scale."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    argv = ["run", "cifar10-preresnet20", "--scale", "0.01", "--seeds", "2", *SMALLEST, *SMALL]
    with torch.random.fork_rng():
        assert cli.main([*argv, "--out", str(folder)]) == 0
    return folder


def test_files(repeated: Path) -> None:
    assert sorted(p.name for p in repeated.iterdir()) == [
        "curves.png",
        "report.md",
        "seed1",
        "seed2",
    ]
    with Image.open(repeated / "curves.png") as figure:
        figure.load()
    results = json.loads((repeated / "seed2/results.json").read_text())
    assert (results["preset"], results["scale"]) == ("cifar10-preresnet20", 0.01)
    config = results["config"]
    assert (config["seed"], config["epochs"], config["width"]) == (2, 8, 4)
    assert (config["fraction"], config["dataset"]) == (0.02, "synthetic")


def test_report(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means, deviations and paired gains, by hand."""
    assert cli.main(["report", str(repeated)]) == 0
    out = capsys.readouterr().out
    assert "at scale 0.01, with other model, dataset, fraction than the preset's" in out
    one, two = (
        {
            r["name"]: r
            for r in json.loads((repeated / f"seed{n}/results.json").read_text())["summary"]
        }
        for n in (1, 2)
    )
    names = ["SGD", "EMA", "SWA", "SWA, 1.25 budgets", "SWA, 1.5 budgets", "FGE"]
    assert set(names) < set(one) == set(two)
    for name in names:
        a, b = one[name]["test_accuracy"], two[name]["test_accuracy"]
        deviation = abs(a - b) / 2**0.5
        pattern = rf"^{re.escape(name)} +{(a + b) / 2:.2f} ± {deviation:.2f} "
        assert re.search(pattern, out, re.MULTILINE), (pattern, out)
        if name != "SGD":
            gains = [s[name]["test_accuracy"] - s["SGD"]["test_accuracy"] for s in (one, two)]
            gain = f"{sum(gains) / 2:+.2f} ± {abs(gains[0] - gains[1]) / 2**0.5:.2f}"
            assert gain in out
    markdown = (repeated / "report.md").read_text()
    assert markdown.count("\n| ") == len(one) + 1
    assert re.search(r"^\|:-+\|-+:\|", markdown, re.MULTILINE)


def test_run_again_goes_on(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "cifar10-preresnet20", "--scale", "0.01", *SMALLEST, *SMALL, "--out"]
    argv.append(str(repeated))
    assert cli.main([*argv, "--seeds", "2"]) == 0
    assert capsys.readouterr().out.count("is already complete") == 2
    path = repeated / "seed2/results.json"
    before = path.read_text()
    results = json.loads(before)
    results["status"] = "running"
    path.write_text(json.dumps(results))
    threads = torch.get_num_threads()
    other = [word for word in argv if word not in ("--threads", "1")]
    try:
        torch.set_num_threads(2)  # a default that is not the run's
        assert cli.main([*other, "--seed", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    again = json.loads(path.read_text())
    assert again["records"] == json.loads(before)["records"]
    assert again["status"] == "complete" and again["config"]["threads"] == 1
    assert cli.main([*argv, "--epochs", "9"]) == 2
    assert "found one with other epochs; replace it" in capsys.readouterr().err


# Every form of network and method; the others differ in numbers only.
@pytest.mark.parametrize(
    "preset",
    [
        "cifar100-vgg16",
        "cifar10-shakeshake26-2x64d",
        "imagenet-resnet50",
        "cifar100-wrn28-10-fixed",
    ],
)
def test_small_presets(preset: str, tmp_path: Path) -> None:
    argv = ["run", preset, "--scale", "0.0001", *SMALL, "--epochs", "2", "--out", str(tmp_path)]
    argv += ["--budgets", "1.5" if "imagenet" not in preset else "0.5,1", "--fge-cycle", "2"]
    if "cifar100" not in preset:
        argv += ["--cycle-epochs", "1"]
    assert cli.main([*argv, "--fge-start", "0.5"]) == 0
    results = json.loads((tmp_path / "seed1/results.json").read_text())
    assert results["status"] == "complete" and results["preset"] == preset
    assert all(0 <= row["test_accuracy"] <= 100 for row in results["summary"])


def test_published_results_stand_beside_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three made-up runs of a preset at full scale."""
    folder = _made_up(tmp_path)
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    sgd = r"^SGD +94\.00 ± 1\.00 +- +- +3 +150 +95\.28 ± 0\.10$"
    swa = r"^SWA, 1\.5 budgets +96\.00 ± 1\.00 +\+2\.00 ± 0\.00 +90\.00 ± 0\.00 +3 +225 +95\.83 ± 0"
    assert re.search(sgd, out, re.MULTILINE), out
    assert re.search(swa, out, re.MULTILINE), out
    assert re.search(r"\| +95\.83 ± 0\.03 \|", (tmp_path / "x/report.md").read_text())
    with Image.open(tmp_path / "x/curves.png") as figure:
        figure.load()


def _made_up(folder: Path) -> Path:
    preset = presets.PRESETS["cifar10-preresnet164"]
    config = TrainConfig.from_options(preset.options).to_json()
    for seed, accuracy in ((1, 93.0), (2, 94.0), (3, 95.0)):
        rows = [
            {"name": name, "method": method, "budget": budget, "epochs": epochs, "captures": 1,
             "test_accuracy": accuracy + gain, "test_loss": 0.1, "iterate_accuracy": 90.0,
             "seconds": 1.0}
            for name, method, budget, epochs, gain in (
                ("SGD", "sgd", 1.0, 150, 0.0),
                ("SWA, 1.5 budgets", "swa", 1.5, 225, 2.0),
            )
        ]  # fmt: skip
        run = RunFolder(folder / f"runs/{seed}")
        run.create(overwrite=False)
        run.write_results(
            {
                "status": "complete", "preset": "cifar10-preresnet164", "scale": 1.0,
                "config": {**config, "seed": seed}, "environment": {}, "data": {"sha256": "x"},
                "initial": None, "records": [], "summary": rows,
            }
        )  # fmt: skip
    return folder / "runs"


def test_runs_that_differ_in_more_than_the_seed_stay_apart(tmp_path: Path) -> None:
    folder = _made_up(tmp_path)
    path = folder / "3/results.json"
    results = json.loads(path.read_text())
    results["config"]["width"] = 8
    path.write_text(json.dumps(results))
    found = compare_runs(find_runs([folder]), {})
    assert sorted(len(experiment["runs"]) for experiment in found) == [1, 2]
    results["status"] = "running"
    path.write_text(json.dumps(results))
    assert len(compare_runs(find_runs([folder]), {})) == 1


def test_runs_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _made_up(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    found = find_runs([folder, tmp_path / "link", folder / "1"])
    assert len(found) == 3


def test_reports_that_cannot_be_written(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(repeated), "--out", "/dev/null/x"]) == 2
    assert "--out: expected a folder that can be written, found /dev/null/x" in (
        capsys.readouterr().err
    )


def test_an_interrupted_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_speed(device: str, amp: str) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure_speed", measure_speed)
    assert cli.main(["presets"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "measure_speed", lambda device, amp: 1e12)
    assert cli.main(["presets", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(presets.PRESETS) + 1]] == list(
        presets.PRESETS
    )
    row = next(line for line in lines if line.startswith("cifar10-vgg16 ")).split()
    # SGD 200 epochs, FGE 40, SWA 300, of 50,000 images and 314 million multiply-adds each.
    work = 6 * 313_725_952 * 50_000 * 540 / 1e15
    assert row[1:3] == ["93.25", "93.70"] and float(row[3]) == pytest.approx(work, rel=0.01)
    assert row[4:] == [f"{work * 1e3 / 3600:.1f}", "h"]
    assert "1,000 GFLOP/s" in lines[-1]


def test_speed_is_measured() -> None:
    assert 1e8 < presets.measure_speed("cpu") < 1e15


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "cifar10"], "PRESET: expected one of cifar100-vgg16, .*, found 'cifar10'"),
        (
            ["run", "cifar10-vgg16", "--scale", "2"],
            r"--scale: expected a number in \(0, 1\], found",
        ),
        (["run", "cifar10-vgg16", "--seeds", "0"], "--seeds: expected 1 or more, found 0"),
        (["run", "imagenet-resnet50"], "--data-dir: expected a folder with train"),
        (["presets", "--amp", "fp8"], "--amp: expected one of none, bf16, fp16, found 'fp8'"),
        (["report", "."], r"\.: expected a folder of runs, found no results.json in it"),
    ],
)
def test_bad_input(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    error: Any = capsys.readouterr().err
    assert re.search(f"^swa-fast {argv[0]}: error: {message}", error), error
    assert not list(tmp_path.iterdir())
