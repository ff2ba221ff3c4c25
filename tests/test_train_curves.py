"""The figure of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from train_runs import EPOCHS

from swa_fast.train.curves import draw_curves

pytestmark = pytest.mark.usefixtures("small")


def test_curves_of_a_single_epoch(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    results["records"] = [r for r in results["records"] if r["epoch"] == EPOCHS]
    draw_curves(results, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as figure:
        figure.load()
