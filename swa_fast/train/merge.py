"""Averages of a run's captures after it: ``swa-fast merge``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch

from swa_fast import EMA, SWA, AveragedModel, Power

from .config import TrainConfig
from .distributed import resolve_device
from .errors import TrainError, first_line
from .run_folder import RunFolder
from .trainer import load_trainer


@dataclasses.dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        path: the file with the ``state_dict``.
        epochs: after which its captures were taken.
        loss, accuracy: on the test set.
    """

    path: Path
    epochs: tuple[int, ...]
    loss: float
    accuracy: float


def _rule(weights: str) -> SWA | EMA | Power:
    kind, _, number = weights.partition(":")
    try:
        if weights == "uniform":
            return SWA()
        if weights == "minus-sqrt":
            return Power(decay="minus-sqrt")
        if kind == "power":
            return Power(float(number))
        if kind == "ema":
            return EMA(float(number))
    except ValueError as error:
        raise TrainError(f"--weights: {error}") from error
    raise TrainError(
        f"--weights: expected uniform, minus-sqrt, power:G or ema:D, found {weights!r}"
    )


def merge_captures(
    folder: RunFolder, weights: str = "uniform", last: int | None = None, device: str | None = None
) -> Merged:
    """Averages the captures that a run with ``--keep-captures`` has left, in the order of training.

    Args:
        folder: of the run.
        weights: ``uniform``, ``minus-sqrt``, ``power:G`` or ``ema:D``: the rules
            :class:`~swa_fast.SWA`, :class:`~swa_fast.Power` and :class:`~swa_fast.EMA`.
        last: how many captures, the last ones; None takes all.
        device: where to work; None is the run's.

    Raises:
        TrainError: an argument outside its range, no capture, or files that do not fit.
    """
    rule = _rule(weights)
    if last is not None and last < 1:
        raise TrainError(f"--last: expected 1 or more, found {last}")
    stored = folder.read_results()["config"]
    config = TrainConfig.from_json(stored)
    if device is not None:
        config = dataclasses.replace(config, device=resolve_device(device))
    files = sorted(folder.path.glob("model_capture-swa-*.pt"))
    if not files:
        raise TrainError(
            f"{folder.path}: expected captures, found none; they are left by a run of a method "
            f"that averages at a constant rate (swa, say) with --keep-captures"
        )
    if last is not None:
        if last > len(files):
            raise TrainError(f"--last: expected {len(files)} at most, found {last}")
        files = files[-last:]
    trainer = load_trainer(dataclasses.replace(config, pretrained=None))
    model = trainer.build()
    averaged = AveragedModel(model, rule=rule, backend=config.backend)
    for file in files:
        try:
            model.load_state_dict(torch.load(file, weights_only=True, map_location=trainer.device))
        except Exception as error:
            # Whatever a damaged or foreign file makes torch raise.
            raise TrainError(
                f"{file}: expected weights of a {config.model}, found {first_line(error)}"
            ) from error
        averaged.update_parameters(model)
    trainer.evaluation.renew_statistics(averaged, config.last_epoch)
    loss, accuracy = trainer.evaluation.score(averaged)
    folder.save_model("merged", averaged.module.state_dict())
    epochs = tuple(int(re.findall(r"\d+", file.stem)[-1]) for file in files)
    return Merged(folder.file("model_merged.pt"), epochs, loss, accuracy)
