"""The figure of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
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


def test_short_passes_are_marked(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json.loads((finished / "results.json").read_text())
    for record in results["records"]:
        if record["trajectory"] == "swa" and record["epoch"] == EPOCHS - 1:
            record["averages"]["swa"]["bn_share"] = 0.1
    plot, drawn = Axes.plot, {}

    def spy(self: Axes, x: list[int], *rest: object, **style: object) -> object:
        drawn[style["label"]] = x
        return plot(self, x, *rest, **style)

    monkeypatch.setattr(Axes, "plot", spy)
    draw_curves(results, tmp_path / "curves.png")
    assert drawn["SWA, BatchNorm pass of 0.1 of the data (dots: of all)"] == [3, 4, 5, 6]
    assert drawn[""] == [4, 5, 6]
