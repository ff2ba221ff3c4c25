"""What ``swa-fast`` does beside training: it lists, merges, evaluates and reports."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .curves import draw_curves
from .distributed import resolve_device
from .errors import TrainError
from .files import write_atomically
from .machine import measure_speed
from .merge import merge_captures
from .models import load_pretrained
from .presets import PRESETS, flop, scaled
from .progress import duration
from .report import compare_runs, find_runs, format_experiment, format_published, format_rows
from .run_folder import RunFolder
from .trainer import load_trainer


def preset_options(name: str, scale: float, overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings of a preset at a scale, and others in their place."""
    if name not in PRESETS:
        raise TrainError(f"PRESET: expected one of {', '.join(PRESETS)}, found {name!r}")
    options = dict(PRESETS[name].options)
    # The scale has to know what it shrinks; what is given as a number is not shrunk.
    options.update({k: overrides[k] for k in ("dataset", "model") if k in overrides})
    return {**scaled(options, scale), **overrides}


def presets(device: str, amp: str, scale: float) -> int:
    """Lists the presets."""
    work = {}
    for name, preset in PRESETS.items():
        chosen = preset_options(name, scale, {"device": device, "amp": amp})
        if preset.options["dataset"] == "imagenet":
            chosen["data_dir"] = "."  # nothing is read
        work[name] = flop(TrainConfig.from_options(chosen))
    speed = measure_speed(device=device, amp=amp)
    rows = []
    for name, preset in PRESETS.items():
        cells = {"SGD": "-", "SWA": "-", "FGE": "-"}
        # In the order of budgets: of the averages that with the longest.
        for (method, budget), result in preset.published.items():
            if method != "fge" or budget == 1.0:
                column = "SGD" if method in (None, "sgd") else method.partition("-")[0].upper()
                cells[column] = format_published(result)
        rows.append(
            (name, *cells.values(), f"{work[name] / 1e15:.3g}", duration(work[name] / speed))
        )
    header = ("preset", "SGD %", "SWA %", "FGE %", "PFLOP", "estimated time")
    print(format_rows(header, rows, "plain"))
    print(
        f"\nPublished accuracies, SWA's with the longest budget. Time: training only, at "
        f"{speed / 1e9:,.0f} GFLOP/s as a WRN-16-4 reaches on {resolve_device(device)} with --amp "
        f"{amp}."
    )
    return 0


def merge(folders: Sequence[str], weights: str, last: int | None, device: str | None) -> int:
    """Averages captures anew."""
    rows = []
    for folder in folders:
        merged = merge_captures(RunFolder(folder), weights, last, device)
        accuracy = f"{merged.accuracy:.2f}"
        rows.append((folder, str(len(merged.epochs)), accuracy, f"{merged.loss:.4f}"))
        print(f"{merged.path}: epochs {', '.join(map(str, merged.epochs))}")
    print("\n" + format_rows(("run", "captures", "accuracy %", "loss"), rows, "plain"))
    return 0


def evaluate(
    files: Sequence[str], run: str | None, update_bn: bool, options: dict[str, Any]
) -> int:
    """Loss and accuracy of weights in files on the test set.

    Args:
        files: each with a ``state_dict``.
        run: folder of the run whose network and data these are; None takes that of the first file,
            if it is one, or else the options alone.
        update_bn: estimate the BatchNorm statistics anew, of the training images.
        options: settings that are given, in place of the run's.
    """
    folder = Path(files[0]).parent if run is None else Path(run)
    if run is not None or (folder / "results.json").is_file():
        stored = stored_config(RunFolder(folder).read_results(), RunFolder(folder)).to_json()
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        # What is given may be of another kind than what belongs to the run's.
        own = {} if {"dataset", "model"} & set(options) else stored
        config = TrainConfig.from_options({**own, **options})
    else:
        config = TrainConfig.from_options(options)
    trainer = load_trainer(dataclasses.replace(config, pretrained=None))
    rows = []
    for file in files:
        model = trainer.build()
        load_pretrained(model, config.model, file)
        if update_bn:
            trainer.evaluation.renew_statistics(model, config.last_epoch)
        loss, accuracy = trainer.evaluation.score(model)
        rows.append((file, f"{accuracy:.2f}", f"{loss:.4f}"))
    part = "validation" if config.validation else "test"
    print(format_rows(("file", f"{part} accuracy %", "loss"), rows, "plain"))
    return 0


def stored_config(previous: dict[str, Any], folder: RunFolder) -> TrainConfig:
    """The settings of a run.

    Raises:
        TrainError: they are not those of this version; the file is named.
    """
    try:
        return TrainConfig.from_json(previous["config"])
    except TrainError as error:
        raise TrainError(f"{folder.file('results.json')}: {error}") from error


def continued(
    config: TrainConfig, folder: RunFolder, given: Mapping[str, Any], remedy: str
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The run in a folder that has these settings, and they with what the machine gave it at its
    beginning in the place of what was not given; None where there is no run.

    Raises:
        TrainError: it has other settings; the message ends with the remedy.
    """
    if not folder.file("results.json").exists():
        return config, None
    previous = folder.read_results()
    stored = stored_config(previous, folder)
    kept = {k: getattr(stored, k) for k in ("threads", "workers") if k not in given}
    config = dataclasses.replace(config, **kept)
    if differing := config.differences(stored):
        raise TrainError(
            f"{folder.path}: expected a run with these settings, found one with other "
            f"{', '.join(differing)}; {remedy}"
        )
    return config, previous


def report(folders: Sequence[str], out: str | None) -> int:
    """Compares runs with each other and with the paper."""
    found = find_runs(folders)
    experiments = compare_runs(found, PRESETS)
    for path, results in found:
        if results["status"] != "complete":
            print(f"left out: {path} is not complete", file=sys.stderr)
    if not experiments:
        raise TrainError(f"expected a complete run in {', '.join(folders)}, found none")
    for experiment in experiments:
        print("\n" + format_experiment(experiment))
    print(
        "\n± is the sample standard deviation over n seeds; gains are paired by seed, against SGD "
        "or the pretrained network. The difference to the published mean is in points and, where "
        "both have a deviation, in standard errors, sqrt(s^2/n + s_published^2/3)."
    )
    folder = Path(out or folders[0])
    text = "\n\n".join(format_experiment(e, markdown=True) for e in experiments) + "\n"
    numbers = [""] if len(experiments) == 1 else [f"-{i + 1}" for i in range(len(experiments))]
    _refuse_to_replace(folder, [f"curves{number}.png" for number in numbers])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.md", text.encode(errors="backslashreplace"))
        for number, experiment in zip(numbers, experiments, strict=True):
            draw_curves(experiment["runs"], folder / f"curves{number}.png")
    except OSError as error:
        raise TrainError(
            f"--out: expected a folder that can be written, found {folder} ({error})"
        ) from error
    print(f"\nreport.md and the curves are in {folder}")
    return 0


def _refuse_to_replace(folder: Path, figures: Sequence[str]) -> None:
    """Raises TrainError where a report, or a figure without a report or a run, is somebody
    else's."""
    path = folder / "report.md"
    ours = (folder / "results.json").is_file()
    try:
        ours |= re.search(r"\| +paired gain \|", path.read_text(errors="replace")) is not None
    except OSError:
        if path.exists():
            raise TrainError(
                f"--out: expected a report in {path}, found no readable file"
            ) from None
    else:
        if not ours:
            raise TrainError(
                f"--out: expected a folder without a report.md of others, found {path}"
            )
    there = [name for name in figures if (folder / name).exists()]
    if there and not ours:
        raise TrainError(
            f"--out: expected a folder without files of these names, found {', '.join(there)} in "
            f"{folder}, and no report that they could belong to"
        )
