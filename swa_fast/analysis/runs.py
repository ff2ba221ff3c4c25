"""Networks, data and weights of finished runs."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from pathlib import Path

import torch
from torch import Tensor

from ..train.config import TrainConfig
from ..train.distributed import World, resolve_device
from ..train.errors import TrainError, first_line
from ..train.randomness import derive_seed
from ..train.run_folder import RunFolder
from ..train.trainer import load_trainer
from .measure import Problem

__all__ = ["Weights", "load_problem"]


def load_problem(
    run: str | Path,
    *,
    tolerance: float | None = None,
    share: float = 1.0,
    device: str | None = None,
    threads: int | None = None,
    world: World | None = None,
) -> Problem:
    """The network and the data of a run. Its training images are cropped and flipped as in one
    epoch of it, always the same one.

    Args:
        run: its folder.
        tolerance: of the BatchNorm passes, see :class:`Problem`.
        share: of the training batches that are used, the first ones of a shuffled epoch.
        device: where to work; None is the run's.
        threads: of the CPU; None is the run's.
        world: whose device this process has.

    Raises:
        TrainError: no run, an argument outside its range, or data that cannot be read.
    """
    folder = RunFolder(run)
    results = folder.read_results()
    config = TrainConfig.from_json(results["config"])
    if device is not None:
        config = dataclasses.replace(config, device=resolve_device(device))
    if not 0 < share <= 1:
        raise TrainError(f"--share: expected a number in (0, 1], found {share}")
    torch.set_num_threads(threads or config.threads)
    # Points are shared among processes; each of them measures with all images.
    alone = _Alone(world) if world is not None and world.size > 1 else World()
    trainer = load_trainer(dataclasses.replace(config, pretrained=None), alone)
    model = trainer.build()
    seed = derive_seed(config.seed, "bn", 0)
    steps = max(1, round(share * len(trainer.batches)))

    def train() -> object:
        for number, batch in enumerate(trainer.batches.epoch(seed)):
            if number == steps:
                return
            yield batch

    described = {"data": trainer.data, "steps": steps, "seed": seed}
    names = ("model", "width", "batch_size", "image_size", "channels_last")
    described["config"] = {name: getattr(config, name) for name in names}
    return Problem(
        model,
        train,  # type: ignore[arg-type]
        trainer.evaluation.test_batches,
        json.dumps(described, sort_keys=True),
        tolerance=tolerance,
        estimator=config.bn_estimator,
    )


class _Alone(World):
    """A process that keeps its images to itself."""

    def __init__(self, world: World) -> None:
        self.size, self.rank, self._local = 1, 0, world.rank


class Weights:
    """The weight vectors of runs of one network, by name.

    Those of one run are called as its files: ``swa`` is the weights of ``model_swa.pt``, and
    ``capture-swa-0061`` those of ``model_capture-swa-0061.pt``. With several runs the folder's name
    comes first: ``seed1/swa``. Any other file with a ``state_dict`` is called by its path.

    Args:
        runs: folders.
        problem: to whose network the weights must fit.
    """

    def __init__(self, runs: list[str], problem: Problem) -> None:
        self._problem = problem
        self.files: dict[str, Path] = {}
        for run in runs:
            path = Path(run)
            for file in sorted(path.glob("model_*.pt")):
                name = file.stem.removeprefix("model_")
                self.files[name if len(runs) == 1 else f"{path.name}/{name}"] = file
        if not self.files:
            raise TrainError(
                f"{', '.join(runs)}: expected the folder of a run with model_*.pt files, found none"
            )

    def match(self, patterns: list[str]) -> list[str]:
        """The names that patterns such as ``fge-*`` stand for, in their order, each once.

        Raises:
            TrainError: one stands for nothing.
        """
        found: dict[str, None] = {}
        for pattern in patterns:
            names = fnmatch.filter(self.files, pattern)
            if not names and Path(pattern).is_file():
                self.files[pattern] = Path(pattern)
                names = [pattern]
            if not names:
                raise TrainError(f"expected one of {', '.join(self.files)}, found {pattern!r}")
            found.update(dict.fromkeys(names))
        return list(found)

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """The weight vectors of names.

        Raises:
            TrainError: a file cannot be read, or holds weights of another network.
        """
        found = {}
        for name in names:
            path = self.files[name]
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                self._problem.model.load_state_dict(state)
            # Whatever a damaged or foreign file makes torch raise.
            except Exception as error:
                raise TrainError(
                    f"{path}: expected weights of the run's network, found {first_line(error)}"
                ) from error
            found[name] = self._problem.vector()
        return found
