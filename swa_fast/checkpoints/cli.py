"""The command ``swa-fast average``: its options and messages."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .averaging import average
from .errors import CheckpointError
from .soup import greedy as greedy_soup
from .weights import KINDS

__all__ = ["add_parser", "run"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text.strip(), re.IGNORECASE)
    unit = found and found[2].upper()
    if found is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected bytes, such as 5GB or 512MiB, found {text!r}")
    return int(float(found[1]) * _UNITS[unit])


def add_parser(commands: Any) -> None:
    """Adds ``average`` to the subcommands of ``swa-fast``."""
    parser = commands.add_parser(
        "average",
        help="average checkpoints on disk: safetensors, torch.save, Hugging Face, DCP",
        description="Averages checkpoints, a chunk at a time: memory does not depend on their "
        "size. Inputs are files (.safetensors, .pt, .pth, .bin, .ckpt), Hugging Face folders, "
        "folders of torch.distributed.checkpoint, or patterns, oldest first. The output is there "
        "as a whole or not at all, and inputs are never changed.",
    )
    parser.add_argument("inputs", nargs="+", metavar="IN", help="file, folder or pattern")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help=".safetensors, .pt, .pth, .bin or .ckpt file, or else a folder",
    )  # fmt: skip
    parser.add_argument(
        "--weights", default="uniform", metavar="W", help=f"{KINDS.replace(', or', ' or')} such "
        "as 1,2,1 (default: uniform); minus-sqrt, cosine and power:P replay a decay of the rate",
    )  # fmt: skip
    parser.add_argument(
        "--order", choices=("auto", "natural", "given"), default="auto",
        help="natural: checkpoint-9 before checkpoint-10; auto: natural, or, with numbers as "
        "weights, given",
    )  # fmt: skip
    chosen = parser.add_argument_group("which inputs")
    chosen.add_argument("--last", type=int, metavar="K", help="the last K of them")
    chosen.add_argument(
        "--window", type=int, nargs=2, metavar=("A", "B"),
        help="those whose step, the last number of the name, is above A and at most B",
    )  # fmt: skip
    chosen.add_argument(
        "--every", type=int, default=1, metavar="N", help="every N-th, counted back from the last"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--accumulate", choices=("fp32", "fp64"), default="fp64")
    how.add_argument(
        "--dtype", choices=("keep", "bf16", "fp16", "fp32", "fp64"), default="keep",
        help="of the output; other than keep allows inputs of different floating types",
    )  # fmt: skip
    how.add_argument("--shard-size", type=_size, default="5GB", metavar="BYTES")
    how.add_argument("--key", metavar="PATH", help="where the weights are, such as state.model")
    how.add_argument("--ema", action="store_true", help="take the file's own average")
    how.add_argument("--strip", metavar="PREFIX", help="take it off the names, such as module.")
    how.add_argument("--max-memory", type=_size, default="32MiB", metavar="BYTES")
    how.add_argument(
        "--no-checksums", action="store_true",
        help="leave out the SHA-256 of the inputs, which takes longer than everything else",
    )  # fmt: skip
    how.add_argument(
        "--update-bn", nargs=2, metavar=("FACTORY", "DATA"),
        help="module:function that makes the model, and one that makes its batches: estimate the "
        "BatchNorm statistics of the average anew",
    )  # fmt: skip
    soup = parser.add_argument_group("greedy soup")
    soup.add_argument(
        "--greedy", metavar="CMD",
        help="keep those inputs that make the average better by the last number that CMD prints; "
        "{file} in it is the checkpoint to score",
    )  # fmt: skip
    better = soup.add_mutually_exclusive_group()
    better.add_argument("--higher", action="store_true", help="higher is better (default)")
    better.add_argument("--lower", action="store_true", help="lower is better")
    show = parser.add_argument_group("output")
    show.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    show.add_argument("--json", action="store_true", help="print the report as JSON")
    show.add_argument("--force", action="store_true", help="replace what is there")
    show.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: dict[str, Any]) -> int:
    """Runs ``swa-fast average`` with parsed options.

    Returns:
        The exit code: 0, or 2 with a message for what the user can put right.
    """
    try:
        report = _run(**options)
    except (CheckpointError, OSError) as error:
        print(f"swa-fast average: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_json(), indent=2) if options["json"] else report)
    return 0


def _run(
    *,
    inputs: list[str],
    output: str,
    weights: str,
    order: str,
    last: int | None,
    window: list[int] | None,
    every: int,
    no_checksums: bool,
    update_bn: list[str] | None,
    greedy: str | None,
    higher: bool,
    lower: bool,
    dry_run: bool,
    json: bool,
    force: bool,
    quiet: bool,
    **how: Any,
) -> Any:
    listed = re.fullmatch(r"[-+.,\deE\s]+", weights) is not None
    how.update(
        sort=order == "natural" or (order == "auto" and not listed),
        checksums=not no_checksums,
        overwrite=force,
        progress=not (quiet or json or dry_run) and _has_tqdm(),
    )
    if update_bn is not None and not dry_run:
        how["update_bn"] = _made(update_bn[0], "FACTORY"), _made(update_bn[1], "DATA")
    if greedy is None:
        if higher or lower:
            raise CheckpointError("--higher, --lower: expected with --greedy only")
        return average(
            inputs, output, weights=weights, last=last, every=every, dry_run=dry_run,
            window=None if window is None else (window[0], window[1]), **how,
        )  # fmt: skip
    for name, given in (
        ("--weights", weights != "uniform"), ("--last", last is not None),
        ("--window", window is not None), ("--every", every != 1), ("--dry-run", dry_run),
    ):  # fmt: skip
        if given:
            raise CheckpointError(f"{name}: not together with --greedy, which chooses by itself")
    return greedy_soup(inputs, output, _scorer(greedy), higher=not lower, **how)


def _has_tqdm() -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module("tqdm")
        return sys.stderr.isatty()
    return False


def _made(name: str, what: str) -> Any:
    """What ``module:function`` gives; modules of the current folder are found."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise CheckpointError(f"--update-bn {what}: expected module:function, found {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"--update-bn {what}: {name!r} cannot be had: {error}") from None
    return made()


def _scorer(command: str) -> Callable[[Path], float]:
    words = shlex.split(command)
    if not any("{file}" in word for word in words):
        raise CheckpointError(f"--greedy: expected {{file}} in the command, found {command!r}")

    def score(path: Path) -> float:
        call = [word.replace("{file}", str(path)) for word in words]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
        numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf", done.stdout)
        if done.returncode or not numbers:
            found = f"exit code {done.returncode}" if done.returncode else repr(done.stdout[-80:])
            raise CheckpointError(
                f"--greedy: expected a number from {shlex.join(call)}, found {found}"
            )
        return float(numbers[-1])

    return score
