"""The trainer from Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from .commands import continued
from .config import TrainConfig
from .distributed import World
from .errors import TrainError
from .models import build_model, load_pretrained
from .progress import Progress
from .run_folder import RunFolder
from .session import run

__all__ = ["Outcome", "train"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        folder: with its files, see :class:`~swa_fast.train.run_folder.RunFolder`.
        results: the content of results.json, see :mod:`swa_fast.train.results`.
    """

    folder: Path
    results: dict[str, Any]

    @property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each method and budget, with ``name``, ``method``, ``budget``,
        ``test_accuracy`` in percent, ``test_loss`` in nats, ``iterate_accuracy``, ``captures``,
        ``epochs``, ``seconds``."""
        rows: list[dict[str, Any]] = self.results["summary"]
        return rows

    def accuracy(self, method: str, budget: float | None = None) -> float:
        """Test accuracy in percent of a method, with its largest budget or a given one.

        Raises:
            KeyError: there is no such result.
        """
        rows = [r for r in self.summary if r["method"] == method and budget in (None, r["budget"])]
        if not rows:
            known = ", ".join(f"{r['method']} ({r['budget']:g})" for r in self.summary)
            raise KeyError(f"expected one of {known}, found {method!r} ({budget})")
        found: float = rows[-1]["test_accuracy"]
        return found

    def network(self, name: str) -> nn.Module:
        """The network of ``model_NAME.pt`` on the CPU, in evaluation mode.

        Raises:
            TrainError: there is no such file.
        """
        path = self.folder / f"model_{name}.pt"
        if not path.is_file():
            files = sorted(self.folder.glob("model_*.pt"))
            known = ", ".join(file.stem.removeprefix("model_") for file in files)
            raise TrainError(f"{self.folder}: expected one of {known}, found {name!r}")
        config, data = self.results["config"], self.results["data"]
        model = build_model(
            config["model"],
            in_channels=data["image_shape"][0],
            num_classes=len(data["classes"]),
            width=config["width"],
        )
        load_pretrained(model, config["model"], path)
        return model.eval()


def train(
    out: str | Path, *, overwrite: bool = False, quiet: bool = True, **settings: Any
) -> Outcome:
    """Trains a network by several methods and compares them, as ``swa-fast train`` does. Called
    again with the same folder it goes on where it was stopped, or gives what is there::

        from swa_fast.train import train

        outcome = train("runs/digits", dataset="digits", methods=("sgd", "swa"), epochs=30)
        print(outcome.accuracy("sgd"), outcome.accuracy("swa"))
        network = outcome.network("swa")

    Args:
        out: folder of the run.
        overwrite: replace the run that it holds.
        quiet: print nothing; False prints what the command prints.
        settings: by the names of the command's options, with underscores.

    Raises:
        TrainError: a setting that is unknown or out of its range, a folder that holds a run of
            other settings, data or files that cannot be used, or a training that diverged.
        Stopped: a signal asked for a stop; the state is saved.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(settings) - known):
        raise TrainError(f"expected settings of {', '.join(sorted(known))}; found {unknown[0]!r}")
    config, folder = TrainConfig.from_options(settings), RunFolder(out)
    previous = None
    if not overwrite:
        remedy = "give overwrite=True to replace it, or another folder"
        config, previous = continued(config, folder, settings, remedy)
    if previous is not None and previous["status"] == "complete":
        return Outcome(folder.path, previous)
    world = World(cuda=config.device.startswith("cuda"))
    try:
        if previous is None:
            if world.main:
                folder.create(overwrite=overwrite)
            world.wait()
        progress = Progress(quiet=True, silent=quiet or not world.main)
        run(config, folder, progress, previous, world=world)
        return Outcome(folder.path, folder.read_results())
    finally:
        world.close()
