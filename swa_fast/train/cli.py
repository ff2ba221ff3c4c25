"""The command ``swa-fast``: its options, messages and exit codes.

Exit codes: 0 success, 2 an error the user can put right, 130 interrupted, 141 stopped because
nobody reads the output any more (as by ``| head -1``; training goes on without a reader).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..analysis import cli as analysis
from ..checkpoints import cli as checkpoints
from . import commands
from .commands import continued, preset_options, stored_config
from .config import TrainConfig, with_absolute_paths
from .distributed import World, resolve_device
from .errors import Stopped, TrainError
from .machine import check_amp, choose_threads
from .options import option_name
from .progress import Progress
from .report import format_phases, format_table
from .run_folder import RunFolder
from .session import run


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"expected numbers separated by commas, found {text!r}"
        raise argparse.ArgumentTypeError(message) from None


# How the text of an option is read, by the type of the field. Other fields are switches.
_PARSERS: dict[Any, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "tuple[str, ...]": _names,
    "tuple[float, ...]": _numbers,
}


# Other names of options, which say what they are used for.
_ALIASES = {"dataset": ("--data",), "pretrained": ("--init",)}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``swa-fast``. Options that are not given leave no trace in the result."""
    parser = argparse.ArgumentParser(
        prog="swa-fast", description="Stochastic Weight Averaging from the command line."
    )
    subcommands = parser.add_subparsers(dest="command", required=True)

    train = subcommands.add_parser(
        "train",
        help="train a network by several methods, SGD and SWA at first, and compare them",
        description="Trains a network by plain SGD and, from the same initial weights, with SWA "
        "(or by other --methods), by the recipe of Izmailov et al., UAI 2018 (arXiv 1803.05407), "
        "and compares them. Several devices: torchrun --nproc-per-node N -m swa_fast.train ...",
        argument_default=argparse.SUPPRESS,
    )
    output = _add_settings(train)
    out_help = "folder of the run (default: runs/<dataset>-<model>-seed<seed>)"
    output.add_argument("--out", metavar="DIR", default=None, help=out_help)
    resume_help = "continue the run in DIR with the settings stored there"
    output.add_argument("--resume", metavar="DIR", default=None, help=resume_help)
    _add_output(output)

    preset = subcommands.add_parser(
        "run",
        help="reproduce an experiment of the paper by its name",
        description="Runs a preset, see swa-fast presets, with one seed or several, each in a "
        "folder of its own, and compares the results with the published ones. Called again it "
        "goes on where it was stopped. All options of swa-fast train override the preset's "
        "settings.",
        argument_default=argparse.SUPPRESS,
    )
    preset.add_argument("preset", metavar="PRESET", help="its name")
    preset.add_argument(
        "--seeds", type=int, metavar="N", help="runs, with seeds from --seed on (default: 1)"
    )
    preset.add_argument(
        "--scale",
        type=float,
        metavar="S",
        help="in (0, 1]: shrinks epochs and data by S, the width by its square root, below 0.05 "
        "the images too, all no further than the form of the experiment allows; what differs from "
        "the preset stands in results.json and reports (default: 1)",
    )
    output = _add_settings(preset)
    out_help = "folder of all runs (default: runs/<preset>[-scale<S>])"
    output.add_argument("--out", metavar="DIR", default=None, help=out_help)
    _add_output(output)

    listing = subcommands.add_parser(
        "presets",
        help="list the experiments of the paper",
        description="Lists the presets with the published accuracies, the floating-point "
        "operations of their training, and how long they would take on this device, estimated "
        "from a few steps of a WRN-16-4.",
    )
    listing.add_argument("--device", default="auto", help="as for train (default: auto)")
    listing.add_argument("--amp", default="none", help="as for train (default: none)")
    listing.add_argument(
        "--scale", type=float, default=1.0, help="as for run (default: 1)", metavar="S"
    )

    evaluate = subcommands.add_parser(
        "eval",
        help="loss and accuracy of weights in files",
        description="Measures networks on the test set. The network and the data are those of the "
        "run in whose folder the first file lies, or of --run, or of the options; options have the "
        "last word.",
        argument_default=argparse.SUPPRESS,
    )
    evaluate.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="with a state_dict: .pt by torch.save, or .safetensors",
    )
    evaluate.add_argument("--run", metavar="DIR", default=None, help="folder of a run")
    evaluate.add_argument(
        "--update-bn", action="store_true", default=False,
        help="estimate the BatchNorm statistics anew, of the training images",
    )  # fmt: skip
    _add_settings(evaluate)

    merge = subcommands.add_parser(
        "merge",
        help="average the captures of finished runs anew, by other weights",
        description="Averages the captures that runs with --keep-captures have left, estimates the "
        "BatchNorm statistics and the accuracy of each run's result, and leaves it as "
        "model_merged.pt.",
    )
    merge.add_argument("folders", nargs="+", metavar="RUN", help="folder of a run")
    merge.add_argument(
        "--weights",
        default="uniform",
        help="uniform, minus-sqrt, power:G, ema:D (default: uniform)",
    )
    merge.add_argument("--last", type=int, metavar="N", help="the last N captures (default: all)")
    merge.add_argument("--device", help="as for train (default: the run's)")

    report = subcommands.add_parser(
        "report",
        help="compare finished runs with each other and with the paper",
        description="Reads all runs in folders and below them, takes those together that differ in "
        "the seed only, prints mean and standard deviation, paired gains, and the published "
        "results, and leaves report.md and the curves.",
    )
    report.add_argument("folders", nargs="+", metavar="DIR", help="folder of runs")
    report.add_argument(
        "--out",
        metavar="DIR",
        help="folder for report.md and curves.png, or curves-1.png, ... of several experiments "
        "(default: the first folder of runs)",
    )

    analysis.add_parser(subcommands)
    checkpoints.add_parser(subcommands)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> Any:
    """Adds the options of all settings; gives the group of those about output."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        meta = field.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        name = option_name(field.name)
        also = _ALIASES.get(field.name, ())
        if (parse := _PARSERS.get(field.type)) is None:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=meta["help"])
        else:
            metavar = meta["kind"].metavar
            group.add_argument(name, *also, type=parse, metavar=metavar, help=meta["help"])
    return groups["output"]


def _add_output(group: Any) -> None:
    group.add_argument(
        "--overwrite",
        action="store_true",
        default=False,
        help="replace the run that --out already holds",
    )
    group.add_argument(
        "--quiet", action="store_true", default=False, help="a line per epoch instead of a bar"
    )
    group.add_argument(
        "--force-amp",
        action="store_true",
        default=False,
        help="train with --amp bf16 also on a CPU that has no bf16 instructions",
    )
    group.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="checkpoints are written after every epoch, and within one when the last is older "
        "(default: 10)",
    )


def main(argv: Sequence[str] | None = None, *, command: Sequence[str] | None = None) -> int:
    """Runs ``swa-fast``.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
        command: how ``swa-fast train`` was called, for messages that tell how to go on.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that are no text. Streams of other kinds are others' matter.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(arguments, command)
    except BrokenPipeError:
        if _read_on():  # of another pipe, which is a fault
            raise
        return 141  # what a shell reports of a program that SIGPIPE ended
    finally:
        _read_on()


def _read_on() -> bool:
    """Writes out what was printed; False where its reader is gone. Then later prints go nowhere:
    Python flushes at its end and would complain."""
    try:
        if sys.stdout is not None:  # as it is where the process was started without one
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return False
    return True


def _dispatch(arguments: list[str], command: Sequence[str] | None) -> int:
    """Runs the command that the arguments name; one line on stderr for what users can put right."""
    options = vars(build_parser().parse_args(arguments))
    name = options.pop("command")
    try:
        if name == "average":
            return checkpoints.run(options)
        if name == "analyze":
            return analysis.run(options)
        if name == "train":
            return _train(options, list(command or ("swa-fast", name)))
        if name == "run":
            return _run(options, ["swa-fast", *arguments])
        if name == "merge":
            return commands.merge(**options)
        if name == "eval":
            files, run, update_bn = (options.pop(key) for key in ("files", "run", "update_bn"))
            return commands.evaluate(files, run, update_bn, options)
        return commands.presets(**options) if name == "presets" else commands.report(**options)
    except TrainError as error:
        print(f"swa-fast {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _train(options: dict[str, Any], command: list[str]) -> int:
    out, resume, manner = options.pop("out"), options.pop("resume"), _manner(options)
    previous = None
    if resume is None:
        config = TrainConfig.from_options(options)
        name = f"{config.dataset}-{config.model}-seed{config.seed}"
        folder = RunFolder(out or Path("runs", name))
    else:
        for name, given in (("--out", out is not None), ("--overwrite", manner["overwrite"])):
            if given:
                raise TrainError(f"{name}: expected only without --resume, found both")
        folder = RunFolder(resume)
        previous = folder.read_results()
        config = _resumed_config(options, previous, folder)
    again = [*command, "--resume", str(folder.path)]
    return _one_run(config, options, folder, previous, again, **manner)


def _manner(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the options out that change no result: how a run shows itself and saves."""
    names = ("quiet", "overwrite", "force_amp", "checkpoint_minutes")
    return {name: options.pop(name) for name in names}


def _one_run(
    config: TrainConfig,
    options: dict[str, Any],
    folder: RunFolder,
    previous: dict[str, Any] | None,
    again: list[str],
    *,
    quiet: bool,
    overwrite: bool,
    force_amp: bool,
    **how: Any,
) -> int:
    """A run with its messages; 0, or 130 if it was interrupted.

    ``options`` are those that were given, ``again`` is the command that continues the run;
    ``previous`` and the other arguments are those of
    :func:`~swa_fast.train.session.run`.
    """
    path = folder.file("results.json")

    def written() -> int | None:
        return path.stat().st_mtime_ns if path.exists() else None

    before = written()
    world = World(cuda=config.device.startswith("cuda"))
    progress = Progress(quiet=quiet, silent=not world.main)
    try:
        if previous is None:
            if not force_amp:
                check_amp(config)
            if "threads" not in options and torch.get_num_threads() > 1:
                config = dataclasses.replace(config, threads=choose_threads(config))
                progress.say(
                    f"{config.threads} of {torch.get_num_threads()} CPU threads, as measured in "
                    f"half a second; --threads N sets another number"
                )
            if world.main:
                folder.create(overwrite=overwrite)
            world.wait()
        if previous is not None and previous["status"] == "complete":
            progress.say(f"The run in {folder.path} is already complete.")
            results = previous
        else:
            results = run(config, folder, progress, previous, world=world, **how)
        progress.say("\n" + format_phases(results))
        progress.say("\n" + format_table(results["summary"]))
        progress.say(f"\nAll files are in {folder.path}")
        return 0
    except (Stopped, KeyboardInterrupt) as error:
        saved = "its state" if isinstance(error, Stopped) else "its last checkpoint"
        if previous is None and written() == before:
            message = "Interrupted before the training began."
        else:
            message = f"Interrupted; {saved} is in {folder.path}. Continue with:\n  "
            message += shlex.join(again)
        if world.main:
            folder.log(message + "\n")
            with suppress(OSError):  # the terminal may be gone
                print("\n" + message, file=sys.stderr)
        return 130
    finally:
        world.close()


def _resumed_config(
    options: dict[str, Any], previous: dict[str, Any], folder: RunFolder
) -> TrainConfig:
    """The stored configuration; options that repeat it are allowed, and the data may have moved."""
    path = folder.file("results.json")
    config = stored_config(previous, folder)
    stored = dataclasses.asdict(config)
    options = with_absolute_paths(options)
    if "device" in options:
        options = {**options, "device": resolve_device(options["device"])}
    for field, value in options.items():
        if field != "data_dir" and value != stored[field]:
            raise TrainError(
                f"{option_name(field)}: expected {stored[field]} as in {path}, found {value}; "
                f"leave the option out, or start a new run with --out"
            )
    if "data_dir" in options:
        config = dataclasses.replace(config, data_dir=options["data_dir"])
    return config


def _run(options: dict[str, Any], command: list[str]) -> int:
    name = options.pop("preset")
    seeds = options.pop("seeds", 1)
    scale = options.pop("scale", 1.0)
    out, manner = options.pop("out"), _manner(options)
    if seeds < 1:
        raise TrainError(f"--seeds: expected 1 or more, found {seeds}")
    first = options.pop("seed", 1)
    chosen = preset_options(name, scale, options)
    parent = Path(out or Path("runs") / (name if scale == 1 else f"{name}-scale{scale:g}"))
    configs = [
        TrainConfig.from_options({**chosen, "seed": seed}) for seed in range(first, first + seeds)
    ]
    again = [word for word in command if word != "--overwrite"]
    for config in configs:
        folder = RunFolder(parent / f"seed{config.seed}")
        previous = None
        if not manner["overwrite"]:
            remedy = "replace it with --overwrite, or choose another --out"
            config, previous = continued(config, folder, options, remedy)
        code = _one_run(
            config, options, folder, previous, again, preset=name, scale=scale, **manner
        )
        if code:
            return code
    if not World.is_main():
        return 0
    _read_on()  # the files of the report are written for later readers, too
    return commands.report([str(parent)], None)
