"""What runs leave for their reader: tables, figures, and the layout of results.json.

``results.json`` is one object:

* ``schema`` ("swa_fast.train.results"), ``schema_version`` (2; a later version may add keys
  without changing it), ``status`` ("running" or "complete"), ``preset`` (its name, or null) and
  ``scale`` (1 for none);
* ``config``: the settings, by the names of the command-line options with underscores;
* ``environment``: versions of swa_fast, torch, cuda (null on the CPU) and python, ``device`` name,
  ``threads``, ``processes``, ``git_commit`` (null for an installed package), ``averaging_backend``;
* ``data``: numbers of images, ``image_shape`` [C, H, W], ``classes``, ``normalise``, ``mean`` and
  ``std`` per channel in pixel values 0..255, ``fraction``, ``skipped_files``, ``sha256``;
* ``initial``: ``test_loss`` and ``test_accuracy`` of a pretrained network before training, or null;
* ``records``: one object per epoch of every trajectory, in the order of training: ``trajectory``,
  ``epoch`` (from 1; a trajectory that goes on from the run sgd begins later), ``lr`` of its last
  step, ``train_loss``, ``train_accuracy`` (means over the epoch's augmented batches, before each
  step), ``test_loss``, ``test_accuracy`` of the iterate; ``averages``: by method, ``captures`` (so
  far), ``test_loss``, ``test_accuracy``; and ``seconds`` by phase: ``data``, ``forward_backward``,
  ``optimizer``, ``average``, ``bn``, ``eval``. What was not measured in an epoch is null;
* ``summary``: the rows of the table, empty before the end: ``name``, ``method``, ``budget``,
  ``epochs``, ``captures`` (null for sgd), ``test_accuracy``, ``test_loss``, ``iterate_accuracy``
  (of the last weights of the same trajectory), ``seconds``.

Losses are mean cross-entropies in nats, accuracies percentages, times seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import METHODS, TrainConfig
from .errors import TrainError, import_extra
from .loop import PHASES
from .methods import plan
from .presets import Preset, scaled
from .state import RunFolder, write_atomically

__all__ = [
    "compare_runs",
    "draw_curves",
    "find_runs",
    "format_experiment",
    "format_phases",
    "format_table",
    "overhead",
    "summarise",
]

Results = Mapping[str, Any]

_TRAINING = ("data", "forward_backward", "optimizer")


def _key(method: str, budget: float) -> str:
    return METHODS[method] if budget == 1.0 else f"{METHODS[method]}, {budget:g} budgets"


def summarise(results: Results) -> list[dict[str, Any]]:
    """The rows of the table: every method at every budget, from the records.

    ``seconds`` is the time of training, the part of the conventional run that the trajectory goes
    on from included, with the averaging and the BatchNorm pass of this result; neither evaluations
    nor the passes that only the curves need are counted.
    """
    rows: list[dict[str, Any]] = []
    if results["initial"] is not None:
        rows.append(
            {
                "name": "pretrained",
                "method": None,
                "budget": 0.0,
                "epochs": 0,
                "captures": None,
                "test_accuracy": results["initial"]["test_accuracy"],
                "test_loss": results["initial"]["test_loss"],
                "iterate_accuracy": results["initial"]["test_accuracy"],
                "seconds": 0.0,
            }
        )
    by_name: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in results["records"]:
        by_name.setdefault(record["trajectory"], {})[record["epoch"]] = record
    for trajectory in plan(TrainConfig.from_json(results["config"])):
        for method, marks in trajectory.marks.items():
            for budget, epoch in marks.items():
                record = by_name[trajectory.name][epoch]
                found = record if method == "sgd" else record["averages"][method]
                before = [r for e, r in by_name.get("sgd", {}).items() if e <= trajectory.begin]
                own = [r for e, r in by_name[trajectory.name].items() if e <= epoch]
                seconds = sum(r["seconds"][phase] for r in before + own for phase in _TRAINING)
                if method != "sgd":
                    # What the conventional run averaged is another method's.
                    seconds += sum(r["seconds"]["average"] for r in own)
                    seconds += record["seconds"]["bn"]
                rows.append(
                    {
                        "name": _key(method, budget),
                        "method": method,
                        "budget": budget,
                        "epochs": epoch,
                        "captures": None if method == "sgd" else found["captures"],
                        "test_accuracy": found["test_accuracy"],
                        "test_loss": found["test_loss"],
                        "iterate_accuracy": record["test_accuracy"],
                        "seconds": seconds,
                    }
                )
    return rows


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text, the first column to the left; the first row is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(len(line) for line in text))
    return "\n".join(text)


def format_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as aligned text."""
    lines = [("", "test accuracy", "last iterate", "test loss", "epochs", "captures", "time")]
    for row in summary:
        lines.append(
            (
                row["name"],
                f"{row['test_accuracy']:.2f} %",
                f"{row['iterate_accuracy']:.2f} %",
                f"{row['test_loss']:.4f}",
                str(row["epochs"]),
                "-" if row["captures"] is None else str(row["captures"]),
                f"{row['seconds']:.1f} s",
            )
        )
    return (
        _align(lines)
        + "\nTime: training, with the averaging and the BatchNorm pass of the result; "
        "no evaluation."
    )


def overhead(records: Iterable[Mapping[str, Any]], reported: frozenset[int]) -> float:
    """Share of a trajectory's training time that goes into averaging: captures, and the BatchNorm
    passes of the epochs whose results are reported. Passes for the curves do not count.

    Args:
        records: of the trajectory.
        reported: epochs after which results are reported.
    """
    training = averaging = 0.0
    for record in records:
        seconds = record["seconds"]
        training += sum(seconds[phase] for phase in _TRAINING)
        averaging += seconds["average"] + (seconds["bn"] if record["epoch"] in reported else 0.0)
    return averaging / (training + averaging) if training + averaging > 0 else 0.0


def format_phases(results: Results) -> str:
    """Where the time went: seconds and shares by phase and trajectory, as aligned text."""
    trajectories = plan(TrainConfig.from_json(results["config"]))
    lines = [["phase", *(f"{t.name}" for t in trajectories)]]
    by_name = {
        t.name: [r for r in results["records"] if r["trajectory"] == t.name] for t in trajectories
    }
    totals = {
        name: {phase: sum(r["seconds"][phase] for r in records) for phase in PHASES}
        for name, records in by_name.items()
    }
    for phase in PHASES:
        line = [phase.replace("_", "/")]
        for t in trajectories:
            whole = sum(totals[t.name].values()) or 1.0
            seconds = totals[t.name][phase]
            line.append(f"{seconds:.2f} s {100 * seconds / whole:5.1f} %")
        lines.append(line)
    lines.append(
        ["all", *(f"{sum(totals[t.name].values()):.2f} s {100.0:5.1f} %" for t in trajectories)]
    )
    shares = [
        f"{t.name} {100 * overhead(by_name[t.name], t.reported):.2f} %"
        for t in trajectories
        if t.captures
    ]
    text = _align(lines)
    if shares:
        text += (
            "\nAveraging and the BatchNorm passes of the results, of the training time: "
            + ", ".join(shares)
            + ".\n(bn also holds the passes that only the curves need.)"
        )
    return text


def find_runs(folders: Sequence[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """All runs in folders and below them, with the content of their results.json.

    Raises:
        TrainError: a folder without any, or a results.json that cannot be read.
    """
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        paths = sorted(path.parent for path in Path(folder).rglob("results.json"))
        if not paths:
            raise TrainError(f"{folder}: expected a folder of runs, found no results.json in it")
        for path in paths:
            found[path.resolve()] = path, RunFolder(path).read_results()
    return list(found.values())


# Settings that tell runs of one experiment apart: its repetitions, and where they were made.
_REPETITION = ("seed", "data_dir", "threads", "device", "eval_every", "workers", "backend")


def _experiment(results: Results) -> tuple[Any, ...]:
    config = {k: v for k, v in results["config"].items() if k not in _REPETITION}
    return (results["preset"], results["data"]["sha256"], repr(sorted(config.items())))


def _overridden(preset: Preset, scale: float, config: Mapping[str, Any]) -> list[str]:
    """Settings of a preset that a run has otherwise."""
    return [
        key
        for key, value in scaled(preset.options, scale).items()
        if key in config
        and key not in (*_REPETITION, "methods")
        and config[key] != (list(value) if isinstance(value, tuple) else value)
    ]


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def compare_runs(
    runs: Sequence[tuple[Path, Results]],
    presets: Mapping[str, Preset],
) -> list[dict[str, Any]]:
    """Experiments, i.e. runs that differ in the seed only, each with its table.

    Args:
        runs: as :func:`find_runs` gives them; those that are not complete are left out.
        presets: by name, with their published results.

    Returns:
        For each experiment ``title``, ``header``, ``rows`` (cells as text) and ``runs``. The paired
        gain is the mean, with the sample standard deviation, of the differences to SGD (or to the
        pretrained network) with the same seed. The title names the settings that are not those of
        the preset.
    """
    groups: dict[tuple[Any, ...], list[Results]] = {}
    for _, results in runs:
        if results["status"] == "complete":
            groups.setdefault(_experiment(results), []).append(results)
    experiments = []
    for members in groups.values():
        config, name, scale = (members[0][key] for key in ("config", "preset", "scale"))
        preset = presets.get(name or "")
        known = {} if preset is None else preset.published
        tables = [
            {(row["method"], row["budget"]): row for row in results["summary"]}
            for results in members
        ]
        base = ("sgd", 1.0) if ("sgd", 1.0) in tables[0] else (None, 0.0)
        rows = []
        for key, row in tables[0].items():
            accuracies = [table[key]["test_accuracy"] for table in tables]
            iterates = [table[key]["iterate_accuracy"] for table in tables]
            gain = "-"
            if key != base and base in tables[0]:
                differences = [
                    table[key]["test_accuracy"] - table[base]["test_accuracy"] for table in tables
                ]
                gain = ("+" if statistics.fmean(differences) >= 0 else "") + _spread(differences)
            mean, deviation = known.get(key, (None, None))
            rows.append(
                [
                    row["name"],
                    _spread(accuracies),
                    gain,
                    "-" if key == base else _spread(iterates),
                    str(len(members)),
                    str(row["epochs"]),
                    "-"
                    if mean is None
                    else f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}"),
                ]
            )
        title = f"{config['model']} (width {config['width']}) on {config['dataset']}"
        # Runs at a reduced scale or with other settings are not the experiment that was published.
        if name:
            title = f"{name}: {title}"
        if scale != 1.0:
            title += f", at scale {scale:g}"
        if preset is not None and (other := _overridden(preset, scale, config)):
            title += f", with other {', '.join(other)} than the preset's"
        experiments.append(
            {
                "title": title,
                "header": [
                    "",
                    "test accuracy %",
                    "paired gain",
                    "last iterate %",
                    "n",
                    "epochs",
                    "published %",
                ],
                "rows": rows,
                "runs": members,
            }
        )
    return experiments


def format_experiment(experiment: Mapping[str, Any], *, markdown: bool) -> str:
    """An experiment's table, as Markdown or aligned text."""
    header, rows = experiment["header"], experiment["rows"]
    if not markdown:
        return f"{experiment['title']}\n{_align([header, *rows])}"
    lines = [
        f"**{experiment['title']}**",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


_COLORS = {
    "sgd": "#1f77b4",
    "ema": "#17becf",
    "swa": "#d62728",
    "swa-cyclic": "#9467bd",
    "fge": "#2ca02c",
    "swa-fixed": "#ff7f0e",
}


def draw_curves(
    runs: Results | Sequence[Results],
    path: Path,
    write: Callable[[Path, Callable[[Any], object]], object] = write_atomically,
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

    def curve(values: Mapping[int, list[float]], label: str, **style: Any) -> None:
        """A line through the means, and a band over the range, where every run has a value."""
        epochs = [e for e in sorted(values) if len(values[e]) == len(several)]
        if not epochs:
            return
        means = [statistics.fmean(values[e]) for e in epochs]
        # A line of one point would be invisible.
        marker = "o" if len(epochs) == 1 else None
        top.plot(epochs, means, label=label, marker=marker, markersize=4, **style)
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
        iterate: dict[int, list[float]] = {}
        averaged: dict[str, dict[int, list[float]]] = {m: {} for m in trajectory.captures}
        for results in several:
            for record in results["records"]:
                if record["trajectory"] != name:
                    continue
                epoch = record["epoch"]
                if record["test_accuracy"] is not None:
                    iterate.setdefault(epoch, []).append(record["test_accuracy"])
                for method, average in record["averages"].items():
                    if average["test_accuracy"] is not None:
                        points = averaged[method].setdefault(epoch, [])
                        points.append(average["test_accuracy"])
        if name == "sgd":
            curve(iterate, METHODS["sgd"], color=color, linewidth=1.6)
        else:
            style = {"color": color, "linewidth": 1.0, "linestyle": "--", "alpha": 0.8}
            curve(iterate, f"{METHODS[name]}, iterate", **style)
        for method, curves in averaged.items():
            curve(curves, METHODS[method], color=_COLORS[method], linewidth=2.2)
        steps = 50  # per epoch, enough for the eye
        grid = [divmod(i, steps) for i in range(trajectory.begin * steps, trajectory.end * steps)]
        bottom.plot(
            [epoch + step / steps for epoch, step in grid],
            [trajectory.rate(epoch, step, steps) for epoch, step in grid],
            color=color,
            linestyle="-" if name == "sgd" else "--",
            linewidth=1.2,
            label=METHODS[name],
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
    top.set_ylabel("test accuracy (%)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    bottom.set_ylim(bottom=0)
    bottom.legend(loc="lower left", framealpha=0.9, fontsize=8)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    write(path, lambda file: figure.savefig(file, format="png", dpi=150))
