"""The state of a run as a checkpoint holds it, and the run that goes on from it.

Since everything random is a function of the seed and the epoch, a continued run needs no saved
generator but in the middle of an epoch. Its weights, averages and records are those of an
uninterrupted one, bit by bit, on the same machine with the same software. Sharded runs may also go
on with another number of processes, whose sums are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .averages import Ensemble
from .clock import Clock
from .config import TrainConfig
from .errors import TrainError
from .randomness import random_state
from .sharded import load_training, training_state
from .trainer import Run, Trainer


def take(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Everything from which :func:`restore` continues the run. All processes must call it."""
    states = {method: average.state_dict() for method, average in run.averages.items()}
    own = {method for method, average in run.averages.items() if average.per_process}
    ranks = trainer.world.gather(
        {
            "random": random_state(trainer.device),
            "averages": {method: state for method, state in states.items() if method in own},
            "loss": run.loss,
            "correct": run.correct,
        }
    )
    return {
        "config": trainer.config.to_json(),
        "epoch": run.epoch,
        "step": run.step,
        "captured": run.captured,
        "seconds": run.clock.read(),
        "records": run.records,
        **training_state(run.model, run.optimizer, trainer.config.shard != "none"),
        "averages": {method: state for method, state in states.items() if method not in own},
        "scaler": run.scaler.state_dict(),
        "ranks": ranks,
    }


def restore(trainer: Trainer, run: Run, state: Mapping[str, Any], path: Path) -> None:
    """Puts a run made by :meth:`Trainer.start` into a state that :func:`take` gave; ``path`` is the
    file that it came from, for messages.

    Raises:
        TrainError: the state is of other settings, or of another number of processes, or does not
            fit the network.
    """
    trajectory, world = run.trajectory, trainer.world
    with _fitting(trainer.config, state, path):
        portable, ranks = trainer.config.shard != "none", state["ranks"]
        if len(ranks) != world.size and not portable:
            raise TrainError(
                f"expected {world.size} processes, found the state of {len(state['ranks'])}; "
                f"continue with as many as the run began with"
            )
        epochs = state["epoch"] - trajectory.begin
        if not (0 <= epochs == len(state["records"]) and state["epoch"] <= trajectory.end):
            raise TrainError(
                f"expected a record for each epoch from {trajectory.begin + 1} to "
                f"{trajectory.end} at most, found epoch {state['epoch']} and "
                f"{len(state['records'])} records"
            )
        _load_training(run, state, portable)
        for method, average in run.averages.items():
            if not average.per_process:
                average.load_state_dict(state["averages"][method])
            elif len(ranks) == world.size:
                average.load_state_dict(ranks[world.rank]["averages"][method])
            else:
                assert isinstance(average, Ensemble)
                average.join([r["averages"][method] for r in ranks], world.rank, world.size)
        if len(ranks) == world.size:
            own = ranks[world.rank]
            run.loss.copy_(own["loss"])
            run.correct.copy_(own["correct"])
            run.random = own["random"]
        elif world.main:  # the others have nothing to add
            run.loss.copy_(sum(rank["loss"] for rank in ranks))
            run.correct.copy_(sum(rank["correct"] for rank in ranks))
        run.epoch, run.step = int(state["epoch"]), int(state["step"])
        run.captured = bool(state["captured"])
        run.clock = Clock(trainer.device, state["seconds"])
        run.records = list(state["records"])


def continue_from(trainer: Trainer, run: Run, state: Mapping[str, Any], path: Path) -> None:
    """Puts a new run at the end of the first part of another trajectory: its weights, buffers and
    momenta. The arguments are those of :func:`restore`.

    Raises:
        TrainError: the state is of other settings or does not fit the network.
    """
    begin = run.trajectory.begin
    with _fitting(trainer.config, state, path):
        if state["epoch"] != begin or state["step"] != 0:
            raise TrainError(
                f"expected the state after epoch {begin}, found one after epoch "
                f"{state['epoch']} and step {state['step']}"
            )
        _load_training(run, state, trainer.config.shard != "none")
    run.epoch = begin


def _load_training(run: Run, state: Mapping[str, Any], portable: bool) -> None:
    load_training(run.model, run.optimizer, state, portable)
    run.scaler.load_state_dict(state["scaler"])


@contextmanager
def _fitting(config: TrainConfig, state: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Refuses a state of other settings, and names the file in the errors of one that does not
    fit."""
    try:
        saved = TrainConfig.from_json(state["config"])
        if differences := saved.differences(config):
            found = ", ".join(f"{name} = {getattr(saved, name)}" for name in differences)
            expected = ", ".join(f"{name} = {getattr(config, name)}" for name in differences)
            raise TrainError(f"expected {expected} as in results.json, found {found}")
        yield
    except TrainError as error:
        raise TrainError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise TrainError(
            f"{path}: expected the state of a {config.model}, found one that does not fit: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
