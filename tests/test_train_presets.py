"""Experiments by name, and what is made of their results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from swa_fast.train import cli, commands, presets
from swa_fast.train.config import TrainConfig
from swa_fast.train.data import Placement, load_dataset
from swa_fast.train.data.dataset import Normalise
from swa_fast.train.data.memory import MemoryDataset
from swa_fast.train.methods import plan
from swa_fast.train.models import build_model
from swa_fast.train.report import compare_runs, find_runs
from swa_fast.train.run_folder import RunFolder

# Of a smaller network, where it does not matter which.
SMALLEST = ["--model", "preresnet8"]
STEPS = 391  # of CIFAR at batch 128
SMALL = ["--dataset", "synthetic", "--fraction", "0.01", "--threads", "1", "--quiet"]


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
    assert (config["seed"], config["epochs"], config["width"]) == (2, 25, 4)
    assert (config["fraction"], config["dataset"]) == (0.01, "synthetic")
    # What is not the preset's is in the file, with what follows from it.
    changes = results["changes"]
    assert changes["epochs"] == [150, 25] and changes["model"] == ["preresnet20", "preresnet8"]
    assert changes["captures of swa"] == [38, 7] and changes["captures of fge"] == [19, 4]
    assert "rate at the first capture of swa" not in changes
    assert results["peak_memory"]["host"] > 1e8 and results["peak_memory"]["device"] is None


def test_report(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means, deviations and paired gains, by hand."""
    assert cli.main(["report", str(repeated)]) == 0
    out = capsys.readouterr().out
    assert "cifar10-preresnet20: preresnet8 (width 4) on synthetic, at scale 0.01\n" in out
    assert "\nwarning: n = 2; with fewer than 3 seeds" in out
    assert "with other settings than cifar10-preresnet20: dataset cifar10 -> synthetic, " in out
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
    # The header, and FGE of both seeds together.
    assert markdown.count("\n| ") == len(one) + 2
    assert re.search(r"^\|:-+\|-+:\|", markdown, re.MULTILINE)


def test_fge_of_two_budgets_is_the_members_of_two_runs(
    repeated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand, from the networks in the folders."""
    data = load_dataset("synthetic", image_size=16, fraction=0.01)
    assert isinstance(data, MemoryDataset)
    normalise = Normalise(data.statistics, 16, Placement(torch.device("cpu")))
    images = normalise(data.test_images.permute(0, 2, 3, 1))
    total = torch.zeros(len(images), 10)
    paths = sorted(repeated.glob("seed*/model_fge-[0-9]*.pt"))
    assert len(paths) == 8
    for path in paths:
        model = build_model("preresnet8", in_channels=3, num_classes=10, width=4).eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        with torch.no_grad():
            total += model(images).softmax(1)
    accuracy = 100 * (total.argmax(1) == data.test_labels).double().mean().item()
    assert cli.main(["report", str(repeated)]) == 0
    pattern = rf"^FGE, 2 budgets: 2 runs together +{accuracy:.2f} +- +- +1 +50 "
    assert re.search(pattern, capsys.readouterr().out, re.MULTILINE), pattern


def test_scaling_tells_when_the_rate_still_falls() -> None:
    """Epochs that a user gives are not corrected, but what follows from them is told."""
    preset = presets.PRESETS["cifar100-vgg16"]
    options = {**presets.scaled(preset.options, 0.01), "epochs": 8}
    found = presets.changes(preset, TrainConfig.from_options(options))
    first, rate = found["rate at the first capture of swa"]
    # The first capture is after epoch 7, before which 6/7 of the fall's time are over.
    assert first == 0.01 and rate == pytest.approx(0.05 * (1 - 0.8 * (6 / 7 - 0.5) / 0.4))
    assert found["epochs"] == [200, 8]


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
    sgd = r"^SGD +94\.00 ± 1\.00 +- +- +3 +150 +95\.28 ± 0\.10 +-1\.28 \(-2\.2 SE\)$"
    swa = r"^SWA, 1\.5 budgets +96\.00 ± 1\.00 +\+2\.00 ± 0\.00 +90\.00 ± 0\.00 +3 +225 +95\.83 ± "
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

    monkeypatch.setattr(commands, "measure_speed", measure_speed)
    assert cli.main(["presets"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "measure_speed", lambda device, amp: 1e12)
    assert cli.main(["presets", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(presets.PRESETS) + 1]] == list(
        presets.PRESETS
    )
    row = next(line for line in lines if line.startswith("cifar10-vgg16 ")).split()
    # SGD 200 epochs, FGE 44, SWA 300, of 50,000 images and 314 million multiply-adds each.
    work = 6 * 313_725_952 * 50_000 * 544 / 1e15
    assert row[1:8] == ["93.25", "±", "0.16", "93.64", "±", "0.18", "93.52"]
    assert float(row[8]) == pytest.approx(work, rel=0.01)
    assert row[9:] == [f"{work * 1e3 / 3600:.1f}", "h"]
    assert "1,000 GFLOP/s" in lines[-1]


def _rows() -> list[dict[str, str]]:
    """The rows of all tables in docs/presets.md, by the names of their columns."""
    rows, header = [], []
    for line in (Path(__file__).parents[1] / "docs/presets.md").read_text().splitlines():
        if not line.startswith("|"):
            header = []
        elif not header:
            header = [cell.strip() for cell in line.strip("|").split("|")]
        elif not line.startswith("|---"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _value(column: str, row: dict[str, str]) -> str | tuple[float, ...]:
    """What a preset has where the documentation has a cell: text, or numbers."""
    preset = presets.PRESETS[row["preset"]]
    config = TrainConfig.from_options({**preset.options, "data_dir": "."})
    plans = {trajectory.name: trajectory for trajectory in plan(config)}
    averaged = [name for name in plans if name.startswith("swa")]
    found = plans[row.get("trajectory") or (averaged or ["fge"])[0]]
    method = {"cyclic captures": "swa-cyclic", "members": "fge"}.get(column, found.name)
    if column in ("captures", "cyclic captures", "members"):
        captured = plans[method].captures[method]
        assert captured is not None
        begin, ends = plans[method].begin, plans[method].marks[method].values()
        return tuple(sum(captured(e) for e in range(begin + 1, end + 1)) for end in ends)
    if column == "first capture":
        return (min(e for e in range(1, 300) if plans["swa"].captures["swa"](e)),)
    if column == "lr of the step":
        return (found.rate(int(row["epoch"]), int(row["step"]), int(row["steps"])),)
    if column in ("fge start", "cyclic start", "begin"):
        return (plans["fge"].begin if column == "fge start" else found.begin,)
    if column == "rate":
        epochs = range(found.begin, found.end)
        (rate,) = {found.rate(epoch, step, STEPS) for epoch in epochs for step in (0, STEPS - 1)}
        return (rate,)
    if column == "include_initial":  # as the preset decides it
        captured = found.captures[method]
        first = min(e for e in range(found.begin, found.end) if captured(e))
        return "yes" if first == found.begin and method == "swa-cyclic" else "no"
    if " " in column:
        name, budget = column.split()
        mean, deviation = preset.published[None if name == "pretrained" else name, float(budget)]
        return (mean,) if deviation is None else (mean, deviation)
    value = getattr(config, column)
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    return value if isinstance(value, str) else value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row["preset"])
def test_tables(row: dict[str, str]) -> None:
    """Every cell of docs/presets.md, which has the values of the papers and of their code."""
    published = {key for key in row if key.split()[-1].replace(".", "").isdecimal()}
    if published:
        assert sum(row[key] != "" for key in published) == len(
            presets.PRESETS[row["preset"]].published
        )
    for column, cell in row.items():
        if column in ("preset", "trajectory", "epoch", "step", "steps", "source") or not cell:
            continue
        value = _value(column, row)
        if isinstance(value, str):
            assert value == cell, column
        else:
            texts = re.split(" ± |, ", cell)
            # As many digits as the cell has, five at least.
            digits = min(len(t.partition("e")[0].replace(".", "").lstrip("0")) for t in texts)
            rel = min(2e-5, 10.0 ** (1 - digits))
            assert list(value) == pytest.approx([float(t) for t in texts], rel=rel), column


def test_a_report_replaces_its_own_files_only(
    tmp_path: Path, repeated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert cli.main(["report", str(repeated), "--out", str(out)]) == 0
    (out / "report.md").write_text("# Notes of my own\n")
    assert cli.main(["report", str(repeated), "--out", str(out)]) == 2
    assert "expected a folder without a report.md of others" in capsys.readouterr().err
    assert (out / "report.md").read_text() == "# Notes of my own\n"
    (out / "report.md").unlink()
    before = (out / "curves.png").read_bytes()
    assert cli.main(["report", str(repeated), "--out", str(out)]) == 2
    assert "found curves.png in" in capsys.readouterr().err
    assert (out / "curves.png").read_bytes() == before and not (out / "report.md").exists()


def test_tables_are_complete() -> None:
    rows = _rows()
    small = {"cifar10-preresnet20", "fashion-mnist-wrn28-2", "cifar10-small", "digits"}
    small |= {"cifar100-preresnet164-ema"}
    assert {row["preset"] for row in rows} | small == set(presets.PRESETS)


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
