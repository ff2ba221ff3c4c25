"""The command ``swa-fast analyze``: its options and messages."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..train.distributed import World
from ..train.errors import TrainError, import_extra
from ..train.run_folder import RunFolder
from . import studies
from .figures import save
from .measure import Cache
from .report import write_report
from .runs import Weights, load_problem
from .studies import Study

__all__ = ["add_parser", "run"]

_KINDS = {
    "plane": "training loss and test error on the plane through three weight vectors",
    "rays": "both along random directions from weight vectors",
    "segment": "both along the line through two weight vectors",
    "ensemble": "ensembles against the average of their weights, and how fast they come together",
    "trajectory": "learning rate and test error along a run, with its captures",
    "distances": "norms, distances and angles of weight vectors",
    "report": "one HTML page of a run: tables, curves, figures, settings, environment",
}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def add_parser(commands: Any) -> None:
    """Adds ``analyze`` to the subcommands of ``swa-fast``."""
    analyze = commands.add_parser(
        "analyze",
        help="draw loss surfaces, rays, segments and ensembles of finished runs",
        description="Measures the networks of finished runs and points between them, and draws "
        "them: PNG and PDF, with the numbers as CSV, npz and JSON. BatchNorm statistics are "
        "estimated anew at every point. Points that were measured are kept in OUT/points, so that "
        "an interrupted command goes on when it is called again. Several processes share the "
        "points: torchrun --nproc-per-node N -m swa_fast.analysis ...",
    )
    kinds = analyze.add_subparsers(dest="kind", required=True)
    for kind, help in _KINDS.items():
        parser = kinds.add_parser(kind, help=help, description=help[0].upper() + help[1:] + ".")
        parser.add_argument(
            "runs", nargs="+" if kind in ("ensemble", "distances") else 1, metavar="RUN",
            help="folder of a finished run; of several, the first says which network and data",
        )  # fmt: skip
        parser.add_argument(
            "--out", required=kind != "report", metavar="DIR",
            help="folder of the page (default: the run's)" if kind == "report"
            else "folder of the figures",
        )  # fmt: skip
        if kind == "report":
            continue
        if kind == "trajectory":
            parser.add_argument(
                "--trajectory", default=None, metavar="NAME",
                help="sgd, swa, swa-cyclic, fge, swa-fixed (default: swa-cyclic, or the first with "
                "captures)",
            )  # fmt: skip
            continue
        _add_measuring(parser, kind)


def _add_measuring(parser: argparse.ArgumentParser, kind: str) -> None:
    points = {
        "plane": "three names (default: sgd, swa and the first capture, or three members of fge)",
        "rays": "names (default: sgd,swa)",
        "segment": "two names (default: sgd,swa)",
        "ensemble": "members (default: fge-*)",
        "distances": "names (default: all)",
    }
    parser.add_argument(
        "--points", type=_names, default=None, metavar="NAMES",
        help=f"{points[kind]}, separated by commas; NAME stands for model_NAME.pt, patterns such "
        "as capture-* for several",
    )  # fmt: skip
    number: dict[str, tuple[Any, Any, str]] = {}
    if kind == "plane":
        parser.add_argument(
            "--show", type=_names, default=None, metavar="NAMES",
            help="weight vectors that are projected on the plane (default: captures)",
        )  # fmt: skip
        number = {
            "--size": (int, 11, "points of a side of the first grid"),
            "--margin": (float, 0.2, "how far it reaches beyond the points, of their extent"),
            "--refinements": (int, 1, "how often cells where the error bends most are halved"),
        }
    elif kind == "rays":
        number = {
            "--rays": (int, 10, "directions"),
            "--steps": (int, 8, "points of a ray"),
            "--length": (float, None, "of a ray (default: twice the distance of the first two)"),
            "--seed": (int, 0, "of the directions"),
        }
    elif kind == "segment":
        number = {
            "--size": (int, 25, "points"),
            "--margin": (float, 0.5, "how far it reaches beyond both ends"),
        }
    elif kind == "ensemble":
        number = {"--halvings": (int, 4, "of the distances from the mean")}
    else:
        parser.add_argument("--centre", metavar="NAME", help="of the angles (default: swa)")
    if kind in ("plane", "rays", "segment"):
        number["--tolerance"] = (
            float, 0.0, "of the BatchNorm passes, which then stop early; 0 takes all images",
        )  # fmt: skip
    for name, (read, default, help) in number.items():
        shown = "" if default is None else f" (default: {default:g})"
        parser.add_argument(name, type=read, default=default, metavar="N", help=help + shown)
    if kind != "distances":
        parser.add_argument(
            "--share", type=float, default=1.0, metavar="F",
            help="of the training batches that are used (default: 1)",
        )  # fmt: skip
    parser.add_argument("--device", help="as for train (default: the run's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the run's)")


def run(options: dict[str, Any]) -> int:
    """Runs ``swa-fast analyze`` and gives its exit code.

    Raises:
        TrainError: something that the user can put right.
    """
    kind = options["kind"]
    if kind == "report":
        print(write_report(options["runs"][0], options["out"]))
        return 0
    first = options["runs"][0]
    results = RunFolder(first).read_results()
    config = results["config"]
    title = f"{config['model']} (width {config['width']}) on {config['dataset']}"
    title += f", seed {config['seed']}" if len(options["runs"]) == 1 else ""
    if kind == "trajectory":
        world = None
        study = studies.trajectory(results, options["trajectory"] or _with_captures(results))
    else:
        device = options["device"] or config["device"]
        world = World(cuda=device.startswith("cuda"))
        try:
            study = _measured(kind, options, world)
        finally:
            world.close()
    if world is None or world.main:
        for path in save(study, Path(options["out"]), title):
            print(path)
        _say(study)
    return 0


def _with_captures(results: Any) -> str:
    along = [r["trajectory"] for r in results["records"] if r["averages"]]
    return "swa-cyclic" if "swa-cyclic" in along or not along else along[0]


def _measured(kind: str, options: dict[str, Any], world: World) -> Study:
    out, tolerance = Path(options["out"]), options.get("tolerance")
    problem = load_problem(
        options["runs"][0],
        tolerance=tolerance or None,
        share=options.get("share", 1.0),
        device=options["device"],
        threads=options["threads"],
        world=world,
    )
    weights = Weights(options["runs"], problem)
    tqdm = import_extra("tqdm").tqdm

    def bar(items: Iterable[Any], count: int | None = None) -> Iterable[Any]:
        if not world.main:
            return items
        shown: Iterable[Any] = tqdm(items, total=count, desc=kind, unit="point")
        return shown

    cache = Cache(out / "points", world, bar)
    names = weights.match(options["points"] or _default(kind, weights))
    if kind == "plane":
        if options["size"] < 2 or options["refinements"] < 0:
            raise TrainError(
                f"--size, --refinements: expected 2 or more and 0 or more, found {options['size']} "
                f"and {options['refinements']}"
            )
        shown = options["show"]
        if shown is None:
            shown = ["capture-*"] if any(n.startswith("capture-") for n in weights.files) else []
        others = [name for name in weights.match(shown) if name not in names]
        return studies.plane(
            problem, cache, weights.load(names), weights.load(others), size=options["size"],
            margin=options["margin"], refinements=options["refinements"],
        )  # fmt: skip
    vectors = weights.load(names)
    if kind == "rays":
        length = options["length"]
        if length is None:
            if len(vectors) < 2:
                raise TrainError("--length: expected with a single point, found none")
            a, b = list(vectors.values())[:2]
            length = 2 * float((a.double() - b.double()).norm())
        return studies.rays(
            problem, cache, vectors, count=options["rays"], length=length, steps=options["steps"],
            seed=options["seed"],
        )  # fmt: skip
    if kind == "segment":
        if options["size"] < 2:
            raise TrainError(f"--size: expected 2 or more, found {options['size']}")
        return studies.segment(
            problem, cache, vectors, size=options["size"], margin=options["margin"]
        )
    if kind == "ensemble":
        return studies.ensemble(problem, vectors, halvings=options["halvings"], progress=bar)
    centre = options["centre"] or ("swa" if "swa" in vectors else None)
    return studies.distances_of(vectors, centre)


def _default(kind: str, weights: Weights) -> list[str]:
    files = list(weights.files)
    captures = [name for name in files if name.startswith("capture-")]
    members = [name for name in files if name.startswith("fge-") and name != "fge-average"]
    if kind == "plane":
        if "sgd" in files and "swa" in files and captures:
            return ["sgd", "swa", captures[0]]
        if len(members) >= 3:
            return members[:3]
        raise TrainError(
            "--points: expected three names; the default needs a run of sgd and swa with "
            f"--keep-captures, or of fge with three members, found {', '.join(files)}"
        )
    if kind == "ensemble":
        return ["*fge-[0-9]*"]
    return ["*"] if kind == "distances" else ["sgd", "swa"]


def _say(study: Study) -> None:
    """What the figure shows, in numbers."""
    facts: dict[str, Any] = study.facts
    if study.kind == "ensemble":
        for name in ("ensemble", "member"):
            low, high = facts[f"{name}_slope_95"]
            slope = f"{facts[f'{name}_slope']:.3f} (95 %: {low:.3f} to {high:.3f})"
            print(f"slope of the {name}'s difference from the average: {slope}")
        first = {key: column[0] for key, column in study.columns.items()}
        print(
            f"accuracy: ensemble {first['ensemble_accuracy']:.2f} %, average of the weights "
            f"{first['average_accuracy']:.2f} %, members {first['member_accuracy']:.2f} % (mean); "
            f"ensemble and average agree on {first['agreement']:.2f} %"
        )
    elif study.kind == "distances":
        with contextlib.suppress(TrainError):
            table: Sequence[Any] = list(zip(*study.columns.values(), strict=True))
            print(import_extra("tabulate").tabulate(table, list(study.columns), floatfmt=".4g"))
