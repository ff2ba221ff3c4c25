"""Figures of the studies, as PNG and PDF, with their numbers beside them as CSV, npz and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..train.errors import TrainError, import_extra
from ..train.files import write_atomically
from .studies import Study

__all__ = ["save"]

# Okabe and Ito's colours, which colour-blind people tell apart, and marks for those who see none.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def save(study: Study, folder: Path, title: str) -> list[Path]:
    """Writes ``KIND.png``, ``.pdf``, ``.csv``, ``.npz`` and ``.json`` of a study.

    Raises:
        TrainError: the folder cannot be written, or matplotlib is not installed.
    """
    kind = study.kind
    contents: dict[str, bytes] = {"csv": _csv(study).encode()}
    arrays = io.BytesIO()
    numbers = {
        name: np.array([math.nan if x is None else x for x in column])
        for name, column in study.columns.items()
    }
    numbers.update({name: tensor.numpy() for name, tensor in study.arrays.items()})
    np.savez(arrays, allow_pickle=False, **numbers)
    contents["npz"] = arrays.getvalue()
    facts = {"title": title, "kind": kind, **_plain(study.facts)}
    contents["json"] = json.dumps(facts, indent=1).encode() + b"\n"
    draw = _DRAW[kind]
    import_extra("matplotlib.backends.backend_agg")
    figure_class = import_extra("matplotlib.figure").Figure
    figure = draw(study, figure_class, numbers)
    figure.suptitle(title, fontsize=10)
    for suffix in ("png", "pdf"):
        content = io.BytesIO()
        metadata = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
        figure.savefig(content, format=suffix, dpi=160, metadata=metadata)
        contents[suffix] = content.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, data in contents.items():
            write_atomically(folder / f"{kind}.{suffix}", data)
    except OSError as error:
        raise TrainError(
            f"--out: expected a folder that can be written, found {folder} ({error})"
        ) from error
    return [folder / f"{kind}.{suffix}" for suffix in contents]


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not know."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(study: Study) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(study.columns)
    for row in zip(*study.columns.values(), strict=True):
        writer.writerow(
            ["" if x is None else f"{x:.9g}" if isinstance(x, float) else x for x in row]
        )
    return text.getvalue()


def _levels(values: np.ndarray[Any, Any], count: int = 12) -> np.ndarray[Any, Any]:
    """Levels whose distance from the least value grows geometrically, as in the paper's figures."""
    least, most = float(np.min(values)), float(np.quantile(values, 0.97))
    spread = max(most - least, 1e-9 * max(abs(most), 1.0))
    levels: np.ndarray[Any, Any] = least + spread * np.geomspace(0.02, 1.0, count)
    return levels


def _plane(study: Study, figure_class: Any, numbers: dict[str, Any]) -> Any:
    width, height = np.ptp(numbers["x"]), np.ptp(numbers["y"])
    # As high as the plane is, so that the bars of the colours are too.
    figure = figure_class(
        figsize=(10.0, float(np.clip(3.6 * height / width + 1.1, 2.6, 7.0))), layout="constrained"
    )
    for axes, name, label in zip(
        figure.subplots(1, 2),
        ("train_loss", "test_error"),
        ("training loss (nats)", "test error (%)"),
        strict=True,
    ):
        z = numbers[name]
        good = np.isfinite(z)
        x, y, z = numbers["x"][good], numbers["y"][good], z[good]
        levels = _levels(z)
        least = float(z.min()) - 1e-12 * max(1.0, abs(float(z.min())))
        drawn = axes.tricontourf(x, y, z, levels=[least, *levels], cmap="viridis_r", extend="max")
        axes.tricontour(x, y, z, levels=levels, colors="white", linewidths=0.4)
        bar = figure.colorbar(drawn, ax=axes, ticks=levels[::2], format="%.3g")
        bar.set_label(label)
        points = study.facts["points"]
        for i, (point, place) in enumerate(points.items()):
            corner = point in study.facts["corners"]
            axes.plot(
                place["x"], place["y"], marker=_MARKS[i % len(_MARKS)] if corner else ".",
                color="black", markerfacecolor="white" if corner else "black", linestyle="",
            )  # fmt: skip
            if corner:
                axes.annotate(
                    point, (place["x"], place["y"]), xytext=(5, 5), textcoords="offset points",
                    fontsize=9, color="black",
                    bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
                )  # fmt: skip
        axes.set_aspect("equal")
        axes.set_xlabel("distance of weights along the first direction")
        axes.set_ylabel("along the second")
    return figure


def _pair(figure_class: Any, xlabel: str) -> tuple[Any, Any, Any]:
    figure = figure_class(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, label in ((left, "training loss (nats)"), (right, "test error (%)")):
        axes.set_xlabel(xlabel)
        axes.set_ylabel(label)
        _tidy(axes)
    return figure, left, right


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _rays(study: Study, figure_class: Any, numbers: dict[str, Any]) -> Any:
    figure, *both = _pair(figure_class, "distance t along a random unit direction")
    origins = np.array(study.columns["origin"])
    for number, origin in enumerate(dict.fromkeys(study.columns["origin"])):
        colour = _COLOURS[number % len(_COLOURS)]
        mine = origins == origin
        ts = np.unique(numbers["t"][mine])
        for axes, name in zip(both, ("train_loss", "test_error"), strict=True):
            lines = []
            for ray in np.unique(numbers["ray"][mine]):
                of_ray = mine & (numbers["ray"] == ray)
                lines.append(numbers[name][of_ray])
                axes.plot(numbers["t"][of_ray], lines[-1], color=colour, alpha=0.25, linewidth=0.8)
            mark = _MARKS[number % len(_MARKS)]
            axes.plot(
                ts, np.mean(lines, axis=0), color=colour, linewidth=2, marker=mark, markersize=4,
                label=f"from {origin}, mean of {len(lines)} rays",
            )  # fmt: skip
    both[0].legend(fontsize=8)
    return figure


def _segment(study: Study, figure_class: Any, numbers: dict[str, Any]) -> Any:
    first, second = study.facts["ends"]
    figure, *both = _pair(figure_class, f"distance from {first} towards {second}")
    length = study.facts["distance"]
    for axes, names in zip(both, (("train_loss",), ("test_error", "train_error")), strict=True):
        for number, name in enumerate(names):
            axes.plot(
                numbers["distance"], numbers[name], color=_COLOURS[number], linewidth=2,
                linestyle="--" if number else "-", label=name.replace("_", " "),
            )  # fmt: skip
        for place, end in ((0.0, first), (length, second)):
            axes.axvline(place, color="black", linewidth=0.8, linestyle=":")
            axes.annotate(
                end, (place, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -10),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    both[1].set_ylabel("error (%)")
    both[1].legend(fontsize=8)
    return figure


def _ensemble(study: Study, figure_class: Any, numbers: dict[str, Any]) -> Any:
    figure = figure_class(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(("ensemble", "member")):
        slope, interval = study.facts[f"{name}_slope"], study.facts[f"{name}_slope_95"]
        what = "the ensemble" if name == "ensemble" else "members, mean"
        left.loglog(
            numbers["delta"], numbers[f"{name}_difference"], color=_COLOURS[number],
            marker=_MARKS[number],
            label=f"{what}: slope {slope:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]",
        )  # fmt: skip
    left.set_xlabel(r"$\Delta$, largest distance of a member from the mean")
    left.set_ylabel("difference of probabilities from the average's")
    left.legend(fontsize=8)
    for number, (name, label) in enumerate(
        (
            ("ensemble", "ensemble"),
            ("average", "average of the weights"),
            ("member", "member, mean"),
        )
    ):
        right.semilogx(
            numbers["delta"], numbers[f"{name}_accuracy"], color=_COLOURS[number],
            marker=_MARKS[number], label=label,
        )  # fmt: skip
    right.set_xlabel(r"$\Delta$")
    right.set_ylabel("test accuracy (%)")
    right.legend(fontsize=8)
    for axes in (left, right):
        _tidy(axes)
    return figure


def _distances(study: Study, figure_class: Any, numbers: dict[str, Any]) -> Any:
    figure = figure_class(figsize=(10.0, 4.4), layout="constrained")
    names = list(study.facts["norms"])
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("distances", "cosines"),
        ("distance of weights", f"cosine of the angle at {study.facts['centre']}"),
        strict=True,
    ):
        shown = axes.imshow(study.arrays[key].numpy(), cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(shown, ax=axes).set_label(label)
    return figure


def _trajectory(study: Study, figure_class: Any, numbers: dict[str, Any]) -> Any:
    figure = figure_class(figsize=(7.0, 5.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.0, 1.0]})
    lines = [("iterate", "iterate")] + [(m, f"average, {m}") for m in study.facts["methods"]]
    for number, (name, label) in enumerate(lines):
        error = numbers[f"{name}_error"].astype(float)
        there = np.isfinite(error)
        top.plot(
            numbers["epoch"][there], error[there], color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKS[number % len(_MARKS)], markersize=3, label=label,
        )  # fmt: skip
    bottom.plot(numbers["rate_epoch"], numbers["rate"], color="black", linewidth=1.0)
    captures = numbers[f"{study.facts['methods'][0]}_captures"].astype(float)
    grown = np.diff(np.concatenate(([0.0], np.nan_to_num(captures)))) > 0
    bottom.plot(
        numbers["epoch"][grown], numbers["lr"][grown], linestyle="", marker="o", markersize=4,
        color=_COLOURS[1], label="captured",
    )  # fmt: skip
    top.set_ylabel("test error (%)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    top.legend(fontsize=8)
    bottom.legend(fontsize=8, loc="upper right", framealpha=0.9)
    for axes in (top, bottom):
        _tidy(axes)
    return figure


_DRAW: dict[str, Callable[[Study, Any, dict[str, Any]], Any]] = {
    "plane": _plane,
    "rays": _rays,
    "segment": _segment,
    "ensemble": _ensemble,
    "distances": _distances,
    "trajectory": _trajectory,
}
