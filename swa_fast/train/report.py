"""What a run leaves for its reader: the table, the figure, and the layout of results.json.

``results.json`` is one object:

* ``schema`` ("swa_fast.train.results"), ``schema_version`` (1; a later version may add keys
  without changing it), ``status`` ("running" or "complete");
* ``config``: the settings, by the names of the command-line options with underscores;
* ``environment``: versions of swa_fast, torch and python, ``device`` name, ``threads``,
  ``git_commit`` (null for an installed package), ``averaging_backend``;
* ``data``: numbers of images, ``image_shape`` [C, H, W], ``classes``, ``mean`` and ``std`` per
  channel in pixel values 0..255, ``skipped_files``, ``sha256`` of pixels, labels and class names;
* ``records``: one object per epoch, the SGD run's first: ``method`` ("sgd" or "swa"), ``epoch``
  (from 1), ``lr``, ``train_loss``, ``train_accuracy`` (means over the epoch's augmented batches,
  before each step), ``test_loss``, ``test_accuracy`` of the iterate, ``captures`` (weights averaged
  so far), ``swa_test_loss``, ``swa_test_accuracy`` of the average, and ``seconds`` for ``train``,
  ``average``, ``bn`` and ``eval``. What was not measured in an epoch is null;
* ``summary``: the rows of the table, empty before the end: ``name``, ``test_accuracy``,
  ``test_loss``, ``epochs``, ``captures``, ``seconds``.

Losses are mean cross-entropies in nats, accuracies percentages, times seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import import_extra
from .state import write_atomically

__all__ = ["draw_curves", "format_table", "summarise"]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table, from the records of both runs: the last epoch of each.

    ``seconds`` is training time; the average's row adds the averaging and the BatchNorm passes.
    Evaluation is not counted.
    """
    rows = []
    for name, method, prefix, phases in (
        ("SGD", "sgd", "", ("train",)),
        ("SWA run, last iterate", "swa", "", ("train",)),
        ("SWA", "swa", "swa_", ("train", "average", "bn")),
    ):
        epochs = [record for record in records if record["method"] == method]
        last = epochs[-1]
        rows.append(
            {
                "name": name,
                "test_accuracy": last[f"{prefix}test_accuracy"],
                "test_loss": last[f"{prefix}test_loss"],
                "epochs": last["epoch"],
                "captures": last["captures"] if prefix else None,
                "seconds": sum(record["seconds"][phase] for record in epochs for phase in phases),
            }
        )
    return rows


def format_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as aligned text."""
    header = ("", "test accuracy", "test loss", "epochs", "captures", "time")
    lines = [header]
    for row in summary:
        lines.append(
            (
                row["name"],
                f"{row['test_accuracy']:.2f} %",
                f"{row['test_loss']:.4f}",
                str(row["epochs"]),
                "-" if row["captures"] is None else str(row["captures"]),
                f"{row['seconds']:.1f} s",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    text.append("Time: training, for SWA with averaging and BatchNorm passes; no evaluation.")
    return "\n".join(text)


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draws test accuracy and learning rate over the epochs of both runs.

    Args:
        results: content of results.json.
        path: the PNG file, replaced atomically.

    Raises:
        TrainError: matplotlib is not installed.
    """
    # The figure class itself, not pyplot: no global state, no display, no choice of backend.
    import_extra("matplotlib.backends.backend_agg")
    figure = import_extra("matplotlib.figure").Figure(figsize=(7.0, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1.0]})
    sgd, swa, grey = "#1f77b4", "#d62728", "#8c8c8c"

    records = results["records"]
    plotted: list[float] = []
    for method, key, label, style in (
        ("sgd", "test_accuracy", "SGD", {"color": sgd, "linewidth": 1.6}),
        (
            "swa",
            "test_accuracy",
            "SWA run, iterate",
            {"color": swa, "linewidth": 1.0, "linestyle": "--", "alpha": 0.8},
        ),
        ("swa", "swa_test_accuracy", "SWA", {"color": swa, "linewidth": 2.2}),
    ):
        points = [
            (record["epoch"], record[key])
            for record in records
            if record["method"] == method and record[key] is not None
        ]
        # A line of one point would be invisible.
        marker = "o" if len(points) == 1 else None
        top.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, **style)
        plotted += [accuracy for _, accuracy in points]
    for method, color, dashes in (("sgd", sgd, "-"), ("swa", swa, "--")):
        points = [
            (record["epoch"], record["lr"]) for record in records if record["method"] == method
        ]
        marker = "o" if len(points) == 1 else None
        bottom.plot(
            *zip(*points, strict=True),
            color=color,
            linestyle=dashes,
            drawstyle="steps-mid",
            marker=marker,
            markersize=4,
            label=method.upper(),
        )

    start = next(record["epoch"] for record in records if record["captures"] > 0)
    for axes in (top, bottom):
        axes.axvline(start, color=grey, linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # The first epochs would flatten what the figure is about: the differences at the end.
    plotted.sort()
    low = plotted[len(plotted) // 5]
    margin = max(0.08 * (plotted[-1] - low), 0.2)
    top.set_ylim(low - margin, plotted[-1] + margin)
    bottom.annotate(
        "averaging starts",
        (start, 0.05),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        color=grey,
        fontsize=8,
    )
    config = results["config"]
    top.set_title(f"{config['model']} on {config['dataset']}, seed {config['seed']}", fontsize=11)
    top.set_ylabel("test accuracy (%)")
    top.legend(loc="lower right", framealpha=0.9)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    bottom.set_ylim(bottom=0)
    bottom.legend(loc="lower left", framealpha=0.9)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
