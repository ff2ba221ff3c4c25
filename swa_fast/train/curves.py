"""The figure of a run, or of several with different seeds."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .defaults import TITLES
from .errors import import_extra
from .files import write_atomically
from .methods import plan
from .results import Results

_COLORS = {
    "sgd": "#1f77b4",
    "ema": "#17becf",
    "swa": "#d62728",
    "swa-cyclic": "#9467bd",
    "fge": "#2ca02c",
    "fge-average": "#bcbd22",
    "swa-fixed": "#ff7f0e",
    "swa-power": "#e377c2",
    "lawa": "#8c564b",
    "swag": "#7f7f7f",
}


def draw_curves(
    runs: Results | Sequence[Results],
    path: Path,
    write: Callable[[Path, memoryview], object] = write_atomically,
) -> None:
    """Draws test accuracy and learning rate over the epochs of all trajectories.

    Args:
        runs: content of results.json of a run, or of several with different seeds, of which the
            mean and the range are drawn.
        path: the PNG file, replaced atomically.
        write: writes it, as :func:`write_atomically`.

    Raises:
        TrainError: matplotlib is not installed.
    """
    several: Sequence[Results] = [runs] if isinstance(runs, Mapping) else runs
    # The figure class itself, not pyplot: no global state, no display, no choice of backend.
    import_extra("matplotlib.backends.backend_agg")
    figure = import_extra("matplotlib.figure").Figure(figsize=(7.0, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1.0]})
    plotted: list[float] = []

    def curve(records: Sequence[Mapping[str, Any]], label: str, **style: Any) -> None:
        """A line through the mean accuracies, and a band over their range, where every run has
        one."""
        values: dict[int, list[float]] = {}
        for record in records:
            if record["test_accuracy"] is not None:
                values.setdefault(record["epoch"], []).append(record["test_accuracy"])
        epochs = [e for e in sorted(values) if len(values[e]) == len(several)]
        if not epochs:
            return
        means = [statistics.fmean(values[e]) for e in epochs]
        # A line of one point would be invisible.
        style.setdefault("marker", "o" if len(epochs) == 1 else None)
        top.plot(epochs, means, label=label, markersize=4, **style)
        if len(several) > 1:
            top.fill_between(
                epochs,
                [min(values[e]) for e in epochs],
                [max(values[e]) for e in epochs],
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
        plotted.extend(means)

    for trajectory in plan(TrainConfig.from_json(several[0]["config"])):
        name = trajectory.name
        color = _COLORS[name]
        records = [r for results in several for r in results["records"] if r["trajectory"] == name]
        if name == "sgd":
            curve(records, TITLES["sgd"], color=color, linewidth=1.6)
        else:
            style = {"color": color, "linewidth": 1.0, "linestyle": "--", "alpha": 0.8}
            curve(records, f"{TITLES[name]}, iterate", **style)
        for method in trajectory.captures:
            averages = [
                {"epoch": r["epoch"], **r["averages"][method]}
                for r in records
                if method in r["averages"]
            ]
            label, color = TITLES[method], _COLORS[method]
            if shares := {a.get("bn_share") or 1.0 for a in averages} - {1.0}:
                label += f", BatchNorm pass of {min(shares):.3g} of the data (dots: of all)"
                exact = [a for a in averages if a["bn_share"] == 1.0]
                curve(exact, "", color=color, linestyle="", marker="o")
            curve(averages, label, color=color, linewidth=2.2)
        steps = 50  # per epoch, enough for the eye
        grid = [divmod(i, steps) for i in range(trajectory.begin * steps, trajectory.end * steps)]
        bottom.plot(
            [epoch + step / steps for epoch, step in grid],
            [trajectory.rate(epoch, step, steps) for epoch, step in grid],
            color=color,
            linestyle="-" if name == "sgd" else "--",
            linewidth=1.2,
            label=TITLES[name],
        )
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # The first epochs would flatten what the figure is about: the differences at the end.
    if plotted:
        plotted.sort()
        low = plotted[len(plotted) // 5]
        margin = max(0.08 * (plotted[-1] - low), 0.2)
        top.set_ylim(low - margin, plotted[-1] + margin)
        top.legend(loc="lower right", framealpha=0.9, fontsize=8)
    config = several[0]["config"]
    seeds = ", ".join(str(results["config"]["seed"]) for results in several)
    top.set_title(
        f"{config['model']} on {config['dataset']}, "
        + (f"seed {seeds}" if len(several) == 1 else f"mean and range of seeds {seeds}"),
        fontsize=11,
    )
    part = "validation" if config.get("validation") else "test"
    top.set_ylabel(f"{part} accuracy (%)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    bottom.set_ylim(bottom=0)
    bottom.legend(loc="lower left", framealpha=0.9, fontsize=8)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write(path, content.getbuffer())
