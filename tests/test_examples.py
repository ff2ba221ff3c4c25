"""The examples run as they are, on small data and a CPU, and leave what they promise."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

try:
    from torchvision import datasets
# RuntimeError: a torchvision that does not belong to this torch.
except (ImportError, RuntimeError) as error:
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)
pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parents[1] / "examples/cifar_swa.py"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not installed")

SMALL = ["--depth", "8", "--width", "8", "--batch-size", "16", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("cifar_swa", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files with 20 images in each, whose brightness is their class; torchvision takes
    their checksums for the real ones."""
    kind = datasets.CIFAR10
    root = tmp_path / "cifar10"
    (root / kind.base_folder).mkdir(parents=True)
    generator = np.random.default_rng(0)

    def put(file: str, values: dict[str, Any]) -> str:
        content = pickle.dumps(values, protocol=2)
        (root / kind.base_folder / file).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(kind, attribute):
            labels = np.arange(20) % 10
            pixels = generator.integers(0, 25, (20, 3072)) + 25 * labels[:, None]
            content = {"data": pixels.astype(np.uint8), "labels": labels.tolist()}
            sums.append([file, put(file, content)])
        monkeypatch.setattr(kind, attribute, sums)
    md5 = put(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return root


def test_cifar_swa(
    example: Any, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the data to the checkpoint; the average is that of the epochs after the start, with
    BatchNorm statistics of its own."""
    out = tmp_path / "new/checkpoint.pt"
    captured: list[dict[str, torch.Tensor]] = []
    update = example.swa_fast.AveragedModel.update_parameters

    def update_parameters(averaged: Any, model: torch.nn.Module) -> None:
        captured.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
        update(averaged, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.swa_fast.AveragedModel, "update_parameters", update_parameters)
        found = example.main([*SMALL, "--epochs", "8", "--data-dir", str(cifar), "--out", str(out)])
    assert len(captured) == 2  # epochs 7 and 8: the start is 0.75 of 8
    assert found["swa"] > 30  # 10 % is chance
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"last weights {found['sgd']:.2f} %, SWA {found['swa']:.2f} % of 20"

    saved = torch.load(out, weights_only=True)
    assert saved["accuracy"] == found
    for name, value in captured[0].items():
        expected = (value + captured[1][name]) / 2
        torch.testing.assert_close(saved["model"][name].double(), expected, rtol=1e-6, atol=1e-7)
    assert saved["model"]["1.num_batches_tracked"] == 7  # one pass over 100 images
    # What was saved has the accuracy that was printed.
    model = example.resnet(8, 8)
    model.load_state_dict(saved["model"])
    options = example.argparse.Namespace(
        data_dir=cifar, batch_size=16, workers=0, device=torch.device("cpu")
    )
    assert example.accuracy(model, example.load(options)[1], options.device) == found["swa"]


def test_cifar_swa_saves_at_once(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails leaves the checkpoint of before."""
    path = tmp_path / "checkpoint.pt"
    example.save(path, {"a": 1})

    def fail(content: Any, file: Path) -> None:
        file.write_bytes(b"half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        example.save(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_cifar_swa_on_the_command_line() -> None:
    answer = subprocess.run(
        [sys.executable, str(EXAMPLE), "--help"],
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    assert "Stochastic Weight Averaging on CIFAR-10" in answer.stdout


def test_examples_use_public_names_only() -> None:
    import swa_fast

    for path in EXAMPLE.parent.glob("*.py"):
        text = path.read_text()
        used = set(re.findall(r"swa_fast\.(\w+)", text))
        assert used and used <= set(swa_fast.__all__), path
        assert not re.search(r"from swa_fast|import swa_fast\.", text), path
