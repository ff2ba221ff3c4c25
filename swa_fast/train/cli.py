"""The command ``swa-fast``: its options, messages and exit codes.

Exit codes: 0 success, 2 an error the user can put right, 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import DEFAULTS, TrainConfig, option_name, resolve_device
from .errors import TrainError
from .loop import run
from .models import MODELS
from .progress import Progress
from .report import format_table
from .state import RunFolder

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``swa-fast``. Options that are not given leave no trace in the result."""
    parser = argparse.ArgumentParser(
        prog="swa-fast", description="Stochastic Weight Averaging from the command line."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(
        commands.add_parser(
            "train",
            help="train a network by SGD and with SWA, and compare them",
            description="Trains a network by plain SGD and, from the same initial weights, "
            "with SWA, by the recipe of Izmailov et al., UAI 2018 (arXiv 1803.05407), and "
            "compares them.",
            argument_default=argparse.SUPPRESS,
        )
    )
    return parser


def _default(field: str) -> str:
    """A setting's default for each dataset, for the help."""
    return ", ".join(f"{values[field]} for {dataset}" for dataset, values in DEFAULTS.items())


def _add_train(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"{' or '.join(DEFAULTS)} (default: digits, which scikit-learn brings along)",
    )
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        help="for --dataset images: a folder with train/<class>/ and test/<class>/",
    )
    data.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="resize all images to NxN (default: as they are)",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--model",
        metavar="NAME",
        help=f"one of {', '.join(MODELS)} (default: {_default('model')})",
    )
    recipe.add_argument(
        "--width",
        type=int,
        metavar="N",
        help=f"planes of the first stage (default: {_default('width')})",
    )
    recipe.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"budget of each of the two runs (default: {_default('epochs')})",
    )
    recipe.add_argument(
        "--batch-size", type=int, metavar="N", help=f"(default: {_default('batch_size')})"
    )
    recipe.add_argument(
        "--lr", type=float, metavar="RATE", help=f"initial rate (default: {_default('lr')})"
    )
    recipe.add_argument("--momentum", type=float, metavar="M", help="(default: 0.9)")
    recipe.add_argument(
        "--weight-decay",
        type=float,
        metavar="W",
        help=f"L2 on all parameters (default: {_default('weight_decay')})",
    )
    recipe.add_argument(
        "--swa-lr",
        type=float,
        metavar="RATE",
        help=f"constant rate while averaging (default: {_default('swa_lr')})",
    )
    recipe.add_argument(
        "--swa-start",
        type=float,
        metavar="FRACTION",
        help="fraction of the epochs after which averaging begins (default: 0.75)",
    )
    recipe.add_argument(
        "--seed", type=int, metavar="N", help="of weights, order and augmentation (default: 1)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    machine.add_argument(
        "--amp",
        metavar="TYPE",
        help="mixed precision: none, bf16 (slow on CPUs without bf16 units), or fp16 on CUDA "
        "(default: none)",
    )
    machine.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory format of images and weights (default: on)",
    )
    machine.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
    )
    machine.add_argument(
        "--backend", metavar="NAME", help="averaging backend (default: chosen by device)"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the run (default: runs/<dataset>-<model>-seed<seed>)",
    )
    output.add_argument(
        "--resume", metavar="DIR", help="continue the run in DIR with the settings stored there"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace the run that --out already holds"
    )
    output.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="epochs between evaluations; the last epoch is always evaluated (default: 1)",
    )
    output.add_argument("--quiet", action="store_true", help="a line per epoch instead of a bar")


def main(argv: Sequence[str] | None = None, *, command: Sequence[str] | None = None) -> int:
    """Runs ``swa-fast``.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
        command: how ``swa-fast train`` was called, for messages that tell how to go on.

    Returns:
        The exit code.
    """
    options = vars(build_parser().parse_args(argv))
    name = options.pop("command")
    try:
        return _train(options, list(command or ("swa-fast", name)))
    except TrainError as error:
        print(f"swa-fast {name}: error: {error}", file=sys.stderr)
        return 2


def _train(options: dict[str, Any], command: list[str]) -> int:
    quiet = options.pop("quiet", False)
    overwrite = options.pop("overwrite", False)
    out = options.pop("out", None)
    resume = options.pop("resume", None)
    previous = None
    if resume is None:
        config = TrainConfig.from_options(options)
        folder = RunFolder(
            out or Path("runs") / f"{config.dataset}-{config.model}-seed{config.seed}"
        )
        folder.create(overwrite=overwrite)
    else:
        for name, given in (("--out", out is not None), ("--overwrite", overwrite)):
            if given:
                raise TrainError(f"{name}: expected only without --resume, found both")
        folder = RunFolder(resume)
        previous = folder.read_results()
        config = _resumed_config(options, previous, folder)

    progress = Progress(quiet=quiet)
    if previous is not None and previous["status"] == "complete":
        progress.say(f"The run in {folder.path} is already complete.")
        results = previous
    else:
        try:
            results = run(config, folder, progress, previous)
        except KeyboardInterrupt:
            if not folder.file("results.json").exists():
                print("\nInterrupted before the training began.", file=sys.stderr)
                return 130
            again = shlex.join([*command, "--resume", str(folder.path)])
            print(
                f"\nInterrupted; what finished epochs gave is in {folder.path}. Continue with:\n"
                f"  {again}",
                file=sys.stderr,
            )
            return 130
    progress.say("\n" + format_table(results["summary"]))
    progress.say(f"\nAll files are in {folder.path}")
    return 0


def _resumed_config(
    options: dict[str, Any], previous: dict[str, Any], folder: RunFolder
) -> TrainConfig:
    """The stored configuration; options that repeat it are allowed, and the data may have moved."""
    path = folder.file("results.json")
    try:
        config = TrainConfig.from_json(previous["config"])
    except (TrainError, TypeError) as error:
        raise TrainError(f"{path}: {error}") from error
    stored = config.to_json()
    if "device" in options:
        options = {**options, "device": resolve_device(options["device"])}
    for field, value in options.items():
        if field != "data_dir" and value != stored[field]:
            raise TrainError(
                f"{option_name(field)}: expected {stored[field]} as in {path}, found {value}; "
                f"leave the option out, or start a new run with --out"
            )
    if "data_dir" in options:
        stored["data_dir"] = str(Path(options["data_dir"]).absolute())
    return TrainConfig.from_json(stored)
