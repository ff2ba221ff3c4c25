"""Tables of a run, and of several beside the published results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .clock import PHASES
from .config import TrainConfig
from .errors import TrainError, import_extra
from .methods import plan
from .presets import Preset, scaled
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


# Settings that tell runs of one experiment apart: its repetitions, and where they were made.
_REPETITION = ("seed", "data_dir", "threads", "device", "eval_every", "workers", "backend")


def _experiment(results: Results) -> tuple[Any, ...]:
    config = {k: v for k, v in results["config"].items() if k not in _REPETITION}
    return (results["preset"], results["data"]["sha256"], repr(sorted(config.items())))


def _title(results: Results, preset: Preset | None) -> str:
    """What was trained. Runs at a reduced scale or with other settings than a preset's are not the
    experiment that was published, which their title tells."""
    config, name, scale = results["config"], results["preset"], results["scale"]
    title = f"{name}: " if name else ""
    title += f"{config['model']} (width {config['width']}) on {config['dataset']}"
    if scale != 1.0:
        title += f", at scale {scale:g}"
    expected = {} if preset is None else scaled(preset.options, scale)
    other = [
        key
        for key, value in expected.items()
        if key in config
        and key not in (*_REPETITION, "methods")
        and config[key] != (list(value) if isinstance(value, tuple) else value)
    ]
    return title + (f", with other {', '.join(other)} than the preset's" if other else "")


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


_HEADER = ["", "test accuracy %", "paired gain", "last iterate %", "n", "epochs", "published %"]


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
        preset = presets.get(members[0]["preset"] or "")
        known = {} if preset is None else preset.published
        tables = [
            {(row["method"], row["budget"]): row for row in results["summary"]}
            for results in members
        ]
        base = ("sgd", 1.0) if ("sgd", 1.0) in tables[0] else (None, 0.0)
        rows = []
        for key, row in tables[0].items():
            gain = "-"
            if key != base and base in tables[0]:
                gains = [t[key]["test_accuracy"] - t[base]["test_accuracy"] for t in tables]
                gain = ("+" if statistics.fmean(gains) >= 0 else "") + _spread(gains)
            iterates = "-" if key == base else _spread([t[key]["iterate_accuracy"] for t in tables])
            published = "-"
            if key in known:
                mean, deviation = known[key]
                published = f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
            rows.append(
                [
                    row["name"],
                    _spread([t[key]["test_accuracy"] for t in tables]),
                    gain,
                    iterates,
                    str(len(members)),
                    str(row["epochs"]),
                    published,
                ]
            )
        title = _title(members[0], preset)
        experiments.append({"title": title, "header": _HEADER, "rows": rows, "runs": members})
    return experiments


def format_experiment(experiment: Mapping[str, Any], *, markdown: bool = False) -> str:
    """An experiment's table, as Markdown or aligned text."""
    table = format_rows(experiment["header"], experiment["rows"], "pipe" if markdown else "simple")
    title = experiment["title"]
    return f"**{title}**\n\n{table}" if markdown else f"{title}\n{table}"
