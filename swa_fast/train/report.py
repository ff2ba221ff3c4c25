"""Tables of a run, and of several beside the published results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clock import PHASES
from .config import TrainConfig
from .errors import TrainError, import_extra
from .methods import plan
from .presets import REPETITION, Preset, changes, format_changes
from .results import Results, overhead
from .run_folder import RunFolder


def format_rows(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "simple") -> str:
    """Cells as a table of tabulate's style, the first column to the left."""
    align = ["left", *["right"] * (len(header) - 1)]
    tabulate = import_extra("tabulate").tabulate
    text: str = tabulate(rows, header, style, colalign=align, disable_numparse=True)
    return text


def format_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as aligned text."""
    header = ("", "test accuracy", "last iterate", "test loss", "epochs", "captures", "time")
    rows = [
        (
            row["name"],
            f"{row['test_accuracy']:.2f} %",
            f"{row['iterate_accuracy']:.2f} %",
            f"{row['test_loss']:.4f}",
            str(row["epochs"]),
            "-" if row["captures"] is None else str(row["captures"]),
            f"{row['seconds']:.1f} s",
        )
        for row in summary
    ]
    return (
        format_rows(header, rows)
        + "\nTime: training, with the averaging and the BatchNorm pass of the result; "
        "no evaluation."
    )


def format_phases(results: Results) -> str:
    """Where the time went: seconds and shares by phase and trajectory, as aligned text."""
    columns, shares = {}, []
    for trajectory in plan(TrainConfig.from_json(results["config"])):
        name = trajectory.name
        records = [r for r in results["records"] if r["trajectory"] == name]
        seconds = [sum(r["seconds"][phase] for r in records) for phase in PHASES]
        whole = sum(seconds)
        columns[name] = [
            f"{part:.2f} s {100 * part / (whole or 1.0):5.1f} %" for part in seconds
        ] + [f"{whole:.2f} s {100.0:5.1f} %"]
        if trajectory.captures:
            shares.append(f"{name} {100 * overhead(records, trajectory.reported):.2f} %")
    names = [*(phase.replace("_", "/") for phase in PHASES), "all"]
    text = format_rows(["phase", *columns], list(zip(names, *columns.values(), strict=True)))
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


def _experiment(results: Results) -> tuple[Any, ...]:
    config = {k: v for k, v in results["config"].items() if k not in REPETITION}
    return (results["preset"], results["data"]["sha256"], repr(sorted(config.items())))


def _title(results: Results) -> str:
    """What was trained."""
    config, name, scale = results["config"], results["preset"], results["scale"]
    title = f"{name}: " if name else ""
    title += f"{config['model']} (width {config['width']}) on {config['dataset']}"
    title += ", validation split" if config.get("validation") else ""
    return title + (f", at scale {scale:g}" if scale != 1.0 else "")


def _warnings(members: Sequence[Results], preset: Preset | None) -> list[str]:
    """Why the numbers do not say as much as the published ones."""
    results, found = members[0], []
    if (n := len(members)) < 3:
        found.append(f"warning: n = {n}; with fewer than 3 seeds ± and standard errors mean little")
    if preset is not None:
        config = TrainConfig.from_json(results["config"])
        if other := results.get("changes") or changes(preset, config):
            found.append(
                f"warning: not the published experiment, but with other settings than "
                f"{results['preset']}: {format_changes(other)}"
            )
    return found


def _joined(folders: Sequence[Path], count: int) -> list[float]:
    """Test accuracies of FGE's members of ``count`` runs together, for as many separate groups as
    there are in the order of seeds; none where runs have no checkpoint of FGE any more."""
    found = []
    for first in range(0, len(folders) - count + 1, count):
        total: dict[int, Tensor] = {}
        labels: dict[int, Tensor] = {}
        for folder in folders[first : first + count]:
            loaded = RunFolder(folder).load_checkpoint(
                "fge", torch.device("cpu"), lambda text: None
            )
            if loaded is None:
                return []
            for rank, own in enumerate(loaded[1]["ranks"]):
                state = own["averages"]["fge"]
                if state.get("labels") is None:
                    return []
                total[rank] = total.get(rank, 0) + state["sum"]
                labels[rank] = state["labels"]
        hits = torch.cat([total[rank].argmax(1) == labels[rank] for rank in total])
        found.append(100 * hits.double().mean().item())
    return found


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def format_published(result: tuple[float, float | None]) -> str:
    """A published mean, with its deviation where it is known."""
    mean, deviation = result
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _difference(values: Sequence[float], published: tuple[float, float | None]) -> str:
    """Of the means, in points and in standard errors; the paper has three runs."""
    points = statistics.fmean(values) - published[0]
    text = f"{points:+.2f}"
    if len(values) > 1 and published[1] is not None:
        error = (statistics.variance(values) / len(values) + published[1] ** 2 / 3) ** 0.5
        text += f" ({points / error:+.1f} SE)" if error > 0 else ""
    return text


_HEADER = [
    *("", "test accuracy %", "paired gain", "last iterate %", "n", "epochs"),
    *("published %", "difference"),
]


def _row(
    name: str,
    values: Sequence[float],
    gain: str,
    iterates: str,
    epochs: int,
    published: tuple[float, float | None] | None,
) -> list[str]:
    last = ["-", "-"]
    if published is not None:
        last = [format_published(published), _difference(values, published)]
    return [name, _spread(values), gain, iterates, str(len(values)), str(epochs), *last]


def compare_runs(
    runs: Sequence[tuple[Path, Results]],
    presets: Mapping[str, Preset],
) -> list[dict[str, Any]]:
    """Experiments, i.e. runs that differ in the seed only, each with its table.

    Args:
        runs: as :func:`find_runs` gives them; those that are not complete are left out.
        presets: by name, with their published results.

    Returns:
        For each experiment ``title``, ``header``, ``rows`` (cells as text), ``notes`` (warnings)
        and ``runs``. The paired gain is the mean, with the sample standard deviation, of the
        differences to SGD (or to the pretrained network) with the same seed. FGE has rows for two
        and three budgets where there are as many runs: their members together.
    """
    groups: dict[tuple[Any, ...], list[tuple[Path, Results]]] = {}
    for path, results in runs:
        if results["status"] == "complete":
            groups.setdefault(_experiment(results), []).append((path, results))
    experiments = []
    for group in groups.values():
        group.sort(key=lambda member: member[1]["config"]["seed"])
        members = [results for _, results in group]
        preset = presets.get(members[0]["preset"] or "")
        known = {} if preset is None else preset.published
        tables = [
            {(row["method"], row["budget"]): row for row in results["summary"]}
            for results in members
        ]
        base = ("sgd", 1.0) if ("sgd", 1.0) in tables[0] else (None, 0.0)
        rows = []
        for key, row in tables[0].items():
            gain = iterates = "-"
            if key != base:
                iterates = _spread([t[key]["iterate_accuracy"] for t in tables])
                if base in tables[0]:
                    gains = [t[key]["test_accuracy"] - t[base]["test_accuracy"] for t in tables]
                    gain = ("+" if statistics.fmean(gains) >= 0 else "") + _spread(gains)
            accuracies = [t[key]["test_accuracy"] for t in tables]
            rows.append(
                _row(row["name"], accuracies, gain, iterates, row["epochs"], known.get(key))
            )
            if key == ("fge", 1.0):
                for count in (2, 3):
                    if joined := _joined([path for path, _ in group], count):
                        name = f"FGE, {count} budgets: {count} runs together"
                        epochs, published = count * row["epochs"], known.get(("fge", count))
                        rows.append(_row(name, joined, "-", "-", epochs, published))
        experiments.append(
            {
                "title": _title(members[0]),
                "header": _HEADER,
                "rows": rows,
                "notes": _warnings(members, preset),
                "runs": members,
            }
        )
    return experiments


def format_experiment(experiment: Mapping[str, Any], *, markdown: bool = False) -> str:
    """An experiment's table, as Markdown or aligned text, with its warnings."""
    table = format_rows(experiment["header"], experiment["rows"], "pipe" if markdown else "simple")
    title = experiment["title"]
    text = f"**{title}**\n\n{table}" if markdown else f"{title}\n{table}"
    return text + "".join(("\n\n" if markdown else "\n") + note for note in experiment["notes"])
