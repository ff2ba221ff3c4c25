"""Networks, data and recipes of one's own, weights in files, and the trainer from Python."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_runs import OPTIONS, assert_same_runs, kill_after, small, words  # noqa: F401

from swa_fast.train import train
from swa_fast.train.cli import main
from swa_fast.train.data import Placement, load_dataset
from swa_fast.train.data.own import OwnDataset
from swa_fast.train.errors import Stopped, TrainError
from swa_fast.train.models import build_model

pytestmark = pytest.mark.usefixtures("small")


class Points(Dataset[Any]):
    """Points of three clouds, moved a little by all generators whenever they are read."""

    classes = ("near", "middle", "far")

    def __init__(self, count: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.arange(count) % 3
        self.points = torch.randn(count, 5, generator=generator) + 2 * self.labels[:, None]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        moved = torch.randn(5) + random.random() + np.random.rand()
        return self.points[index] + self.noise * moved, int(self.labels[index])


def points() -> tuple[Points, Points]:
    return Points(60, noise=0.1), Points(30)


def network(num_classes: int, in_channels: int) -> nn.Module:
    layers = [nn.Linear(in_channels, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes)]
    return nn.Sequential(*layers)


def one_set() -> Points:
    return Points(30)


def images() -> tuple[Any, Any]:
    return [("picture", 0)] * 4, [("picture", 0)] * 4


def fails() -> None:
    raise RuntimeError("no such file")


OWN = {
    "dataset": f"{__name__}:points",
    "model": f"{__name__}:network",
    "epochs": 4,
    "batch_size": 16,
    "swa_start": 0.5,
    "workers": 0,
    "threads": 1,
    "seed": 3,
}


def run(out: Path, **changes: Any) -> int:
    return main(["train", "--out", str(out), "--quiet", *words({**OWN, **changes})])


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_own_network_and_own_data(tmp_path: Path) -> None:
    assert run(tmp_path / "a") == 0
    assert run(tmp_path / "b", workers=1) == 0
    results = read(tmp_path / "a")
    assert results["data"]["classes"] == ["near", "middle", "far"]
    assert results["data"]["image_shape"] == [5]
    assert results["config"]["model"] == OWN["model"]
    assert all(row["test_accuracy"] > 60 for row in results["summary"])
    # Whatever the transforms draw, whoever reads the items.
    for name in ("model_sgd.pt", "model_swa.pt"):
        a, b = (torch.load(tmp_path / f / name, weights_only=True) for f in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_own_data_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "whole", accumulate=3) == 0
    with pytest.MonkeyPatch.context() as patch:
        kill_after(6, patch)
        assert run(tmp_path / "parts", accumulate=3) == 130
    assert main(["train", "--resume", str(tmp_path / "parts"), "--quiet"]) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_items_are_drawn_for_the_epoch_and_the_item_alone() -> None:
    dataset = load_dataset(str(OWN["dataset"]))
    assert isinstance(dataset, OwnDataset)
    batches = dataset.train_batches(16, Placement(torch.device("cpu"), True, 0, 1, 0))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = (list(batches.epoch(seed)) for seed in (1, 1, 2))
    later = list(batches.epoch(1, first=2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(later[0][0], first[2][0])
    assert not torch.equal(first[0][0], other[0][0])
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == sorted(
        dataset.train_labels.tolist()
    )
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert state[2] == np.random.get_state()[1].tolist()
    share = load_dataset(str(OWN["dataset"]), fraction=0.5, test_fraction=1.0, min_per_class=1)
    assert len(share.train_labels) == 30 == len(share.test_labels)
    held = load_dataset(str(OWN["dataset"]), validation=True)
    assert len(held.train_labels) + len(held.test_labels) == 60
    assert dataset.sha256 != share.sha256 != held.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": f"{__name__}:nothing"}, "--dataset: expected a factory that can be called"),
        ({"dataset": "no_such_module:f"}, "ModuleNotFoundError: No module named 'no_such_module'"),
        ({"dataset": f"{__name__}:fails"}, "(RuntimeError: no such file)"),
        ({"dataset": f"{__name__}:one_set"}, "to return a training and a test set, found Points"),
        ({"dataset": f"{__name__}:images"}, "items of a tensor and a label, found (str, int)"),
        ({"model": f"{__name__}:points"}, "to return a torch.nn.Module, found tuple"),
        ({"image_size": 8}, "--image-size: expected none with a dataset of one's own"),
        ({"noise": 3.0}, "--noise: expected none with a dataset of one's own"),
        ({"data_dir": "."}, "--data-dir: expected none with a dataset of one's own"),
        ({"optimizer": "adam"}, "--optimizer: expected one of sgd, adamw, found 'adam'"),
        ({"warmup_epochs": -1.0}, "--warmup-epochs: expected a finite number of 0 or more"),
        ({"label_smoothing": 1.0}, "--label-smoothing: expected a number in [0, 1), found 1.0"),
        ({"accumulate": 17}, "--accumulate: expected 16 (--batch-size) at most, found 17"),
    ],
)
def test_bad_input_is_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if "error" in line]) == 1


def test_a_factory_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\ndef make(**options):\n    return nn.Linear(2, len(options))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    model = build_model("my_networks:make", in_channels=2, num_classes=5)
    assert isinstance(model, nn.Linear) and model.out_features == 3
    sys.modules.pop("my_networks")


def test_an_accumulated_step_is_the_whole_batches(tmp_path: Path) -> None:
    """Without BatchNorm, which sees a part at a time."""
    options = {"model": f"{__name__}:plain", "epochs": 1, "methods": "sgd", "batch_size": 30}
    assert run(tmp_path / "one", **options) == 0
    assert run(tmp_path / "four", **options, accumulate=4) == 0
    a, b = (torch.load(tmp_path / f / "model_sgd.pt", weights_only=True) for f in ("one", "four"))
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=0, atol=1e-6), key
    losses = [read(tmp_path / f)["records"][0]["train_loss"] for f in ("one", "four")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def plain(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, num_classes))


def test_adamw_warm_up_and_label_smoothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    losses: list[dict[str, Any]] = []
    step, loss = torch.optim.AdamW.step, nn.functional.cross_entropy

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["weight_decay"] == 0.05
        return step(self, *args, **kwargs)

    def measuring(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(kwargs)
        return loss(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    monkeypatch.setattr("swa_fast.train.trainer.F.cross_entropy", measuring)
    changes = {"optimizer": "adamw", "warmup_epochs": 1.5, "label_smoothing": 0.1, "lr": 0.01}
    recipe = {"weight_decay": 0.05, "lr_schedule": "constant", "methods": "sgd", "epochs": 3}
    assert run(tmp_path / "run", **changes, **recipe) == 0
    # 60 items in batches of 16: four steps an epoch, six of warm-up.
    expected = [0.01 * min(1.0, (i + 1) / 6) for i in range(12)]
    assert rates == pytest.approx(expected)
    smoothed = [k["label_smoothing"] for k in losses if "label_smoothing" in k]
    assert smoothed == [0.1] * 12


def test_weights_of_ones_own_are_where_averaging_starts(tmp_path: Path) -> None:
    assert run(tmp_path / "first", methods="sgd") == 0
    file = tmp_path / "first" / "model_sgd.pt"
    start = ["--init", str(file), "--swa-start", "0", "--swa-lr", "1e-9", "--epochs", "1"]
    start += ["--swa-from", "sgd"]
    options = words({k: v for k, v in OWN.items() if k not in ("epochs", "swa_start")})
    own = ["--data" if word == "--dataset" else word for word in options]
    out = tmp_path / "second"
    command = ["train", "--out", str(out), "--quiet", "--methods", "swa", *own, *start]
    assert main(command) == 0
    a, b = (torch.load(f, weights_only=True) for f in (file, out / "model_swa.pt"))
    for key in a:
        if "running" not in key and "num_batches" not in key:
            assert torch.allclose(a[key], b[key], rtol=0, atol=1e-5), key
    assert read(out)["initial"]["test_accuracy"] is not None


def test_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(out) == 0
    summary = {row["method"]: row for row in read(out)["summary"]}
    capsys.readouterr()

    def table(*arguments: str) -> list[list[str]]:
        assert main(["eval", *arguments]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    files = [str(out / f"model_{name}.pt") for name in ("sgd", "swa")]
    for method, row in zip(("sgd", "swa"), table(*files), strict=True):
        assert row[1] == f"{summary[method]['test_accuracy']:.2f}"
        assert row[2] == f"{summary[method]['test_loss']:.4f}"
    # Elsewhere, by the options or by the run.
    moved = tmp_path / "swa.pt"
    state = torch.load(files[1], weights_only=True)
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, moved)
    expected = f"{summary['swa']['test_accuracy']:.2f}"
    assert table(str(moved), *words(OWN))[0][1] == expected
    assert table(str(moved), "--run", str(out))[0][1] == expected
    # Statistics of nothing are renewed by those of the training images.
    for key in state:
        if key.endswith("running_mean"):
            state[key].fill_(100.0)
    torch.save(state, moved)
    lost, found = (table(str(moved), "--run", str(out), *how) for how in ((), ("--update-bn",)))
    assert float(lost[0][1]) < 50 and float(found[0][1]) >= float(expected) - 10
    torch.save({"weight": torch.zeros(2)}, moved)
    assert main(["eval", str(moved), "--run", str(out)]) == 2
    assert "expected the weights of this" in capsys.readouterr().err


def test_the_trainer_in_five_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {k: v for k, v in OPTIONS.items() if k != "seed"}
    outcome = train(tmp_path / "run", dataset="digits", methods=("sgd", "swa"), **options)
    assert capsys.readouterr().out == ""
    rows = {row["method"]: row["test_accuracy"] for row in outcome.summary}
    assert {m: outcome.accuracy(m) for m in ("sgd", "swa")} == rows
    assert outcome.accuracy("swa", 1.0) == rows["swa"]
    logits = outcome.network("swa")(torch.zeros(2, 1, 8, 8))
    assert logits.shape == (2, 3) and not outcome.network("swa").training
    # What is there is given, and other settings are refused.
    again = train(tmp_path / "run", dataset="digits", methods=("sgd", "swa"), **options)
    assert again.results == outcome.results
    with pytest.raises(TrainError, match="found one with other lr; give overwrite=True"):
        train(tmp_path / "run", dataset="digits", methods=("sgd", "swa"), **options, lr=0.2)
    with pytest.raises(TrainError, match=r"expected settings of .*; found 'learning_rate'"):
        train(tmp_path / "other", learning_rate=0.2)
    with pytest.raises(KeyError, match=r"expected one of sgd \(1\), swa \(1\), found 'fge'"):
        outcome.accuracy("fge")
    with pytest.raises(TrainError, match="expected one of sgd, swa, found 'ema'"):
        outcome.network("ema")


@pytest.fixture(autouse=True)
def module_of_this_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also for worker processes, which import the factories by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield


def test_an_interrupted_run_goes_on_from_python(tmp_path: Path) -> None:
    options = {**OPTIONS, "methods": ("sgd", "swa")}
    whole = train(tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(3, patch, signals=1)
        with pytest.raises(Stopped):
            train(tmp_path / "parts", **options)
    outcome = train(tmp_path / "parts", **options)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    for method in ("sgd", "swa"):
        assert outcome.accuracy(method) == whole.accuracy(method)
