"""A whole run: all trajectories of a configuration, with the files that they leave."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from . import snapshot
from .config import TrainConfig
from .curves import draw_curves
from .data import Dataset
from .distributed import World
from .errors import Stopped, TrainError, import_extra
from .machine import environment, peak_memory
from .methods import Trajectory, plan
from .presets import PRESETS, changes, format_changes
from .progress import Board, Progress
from .results import summarise
from .run_folder import RunFolder
from .sharded import whole_weights
from .trainer import Record, Run, Trainer, load_data

# Several processes have to agree before one of them saves or stops, which makes them wait.
_AGREE_EVERY = 20


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGINT (Ctrl-C), SIGTERM or SIGHUP (a lost terminal) has
    come; within this context they only ask for a stop, and the second one stops at once. SIGHUP
    stays ignored where it was, under nohup."""
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        with suppress(OSError):  # the terminal may be gone
            print(
                "\nStopping after this step; again to stop at once, which loses what came after "
                "the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    previous = [signal.signal(number, handle) for number in caught]
    try:
        yield lambda: requested
    finally:
        for number, handler in zip(caught, previous, strict=True):
            signal.signal(number, handler)


def run(
    config: TrainConfig,
    folder: RunFolder,
    progress: Progress,
    previous: dict[str, Any] | None = None,
    *,
    world: World | None = None,
    preset: str | None = None,
    scale: float = 1.0,
    checkpoint_minutes: float = 10.0,
) -> dict[str, Any]:
    """Trains along all trajectories of a configuration and leaves the files of :class:`RunFolder`.

    The folder exists. A new run replaces the one that it may hold, once everything is known to be
    in order. Torch's global random state is overwritten; its number of threads is restored.

    Args:
        previous: content of results.json of the run to continue; None starts a new one.
        world: the processes of the run; None for this one alone.
        preset, scale: the preset that the configuration came from, for reports.
        checkpoint_minutes: checkpoints are written after every epoch, and within one when the last
            is older than this.

    Returns:
        The content of results.json.

    Raises:
        TrainError: the data or the checkpoints cannot be used, the training diverged, the disk is
            full, or another process trains in the folder.
        Stopped: a signal asked for it; the state is saved.
    """
    if not checkpoint_minutes >= 0:
        raise TrainError(
            f"--checkpoint-minutes: expected a number of 0 or more, found {checkpoint_minutes}"
        )
    world = world or World()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        # Fixed algorithms: the autotuner may choose others in a process that continues a run.
        with (
            folder.locked() if world.main else nullcontext(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
            interrupts() as interrupted,
        ):
            session = _Session(
                config, folder, progress, world, interrupted, 60 * checkpoint_minutes
            )
            return session.run(previous, preset, scale)
    finally:
        progress.stop()
        torch.set_num_threads(threads)


@dataclass
class _Session:
    """One call of :func:`run`.

    Attributes:
        saved: when the last checkpoint was written.
        listed: the last epoch of each trajectory that results.json listed.
    """

    config: TrainConfig
    folder: RunFolder
    progress: Progress
    world: World
    interrupted: Callable[[], bool]
    checkpoint_seconds: float
    saved: float = field(default_factory=time.monotonic)
    listed: dict[str, int] = field(default_factory=dict)

    def run(
        self, previous: dict[str, Any] | None, preset: str | None, scale: float
    ) -> dict[str, Any]:
        config, progress, world = self.config, self.progress, self.world
        for module in ("matplotlib.figure", "tabulate"):
            import_extra(module)  # needed only at the end, which is late to miss it
        dataset = self._load_data()
        skipped = f"; {dataset.skipped_files} other files skipped" if dataset.skipped_files else ""
        progress.say(
            f"{config.dataset}: {len(dataset.train_labels):,} training and "
            f"{len(dataset.test_labels):,} {'validation' if config.validation else 'test'} images "
            f"of {len(dataset.classes)} classes{skipped}"
        )
        trainer = Trainer(config, dataset, world, self.interrupted)
        results: dict[str, Any] = {
            "status": "running",
            "preset": preset,
            "scale": scale,
            "changes": changes(PRESETS[preset], config) if preset in PRESETS else {},
            "config": config.to_json(),
            "environment": {
                **environment(config, world.size),
                "averaging_backend": trainer.check_backend(),
            },
            "data": dataset.to_json(),
            "initial": None,
            "records": [],
            "summary": [],
            "peak_memory": {},
        }
        if results["changes"]:
            progress.say(f"otherwise than {preset}: {format_changes(results['changes'])}")
        if previous is not None:
            self._compare(previous, results)
            self.listed = {r["trajectory"]: r["epoch"] for r in previous["records"]}
            for key in ("preset", "scale", "environment", "initial", "records"):
                results[key] = previous[key]
            results["peak_memory"] = previous.get("peak_memory", {})
        model = trainer.build()
        trainer.check_images(model)
        progress.say(
            f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, on "
            f"{config.device}" + (f", {world.size} processes" if world.size > 1 else "")
        )
        if config.pretrained is not None and results["initial"] is None:
            loss, accuracy = trainer.evaluation.score(model)
            results["initial"] = {"test_loss": loss, "test_accuracy": accuracy}
            progress.say(f"pretrained network: test {accuracy:.2f}%")
        if world.main:
            if previous is None:
                self.folder.clear()
            # First of all, because it says whose the other files are.
            self._write(results)
            progress.write_log(self.folder.log)
        world.wait()

        finished: list[Record] = []
        for trajectory in plan(config):
            finished = self._follow(trainer, trajectory, results, finished)
        results["summary"] = summarise(results)
        results["status"] = "complete"
        if world.main:
            draw_curves(results, self.folder.file("curves.png"), self.folder.write)
        self._write(results)
        world.wait()
        return results

    def _load_data(self) -> Dataset:
        """The data; the first process loads them before the others, for it may have to download."""
        config, main = self.config, self.world.main
        if not main:
            self.world.wait()
        dataset = load_data(config, self.progress.over)
        if main:
            self.world.wait()
        return dataset

    def _write(self, results: dict[str, Any]) -> None:
        if self.world.main:
            before, device = results["peak_memory"], self.world.device(self.config.device)
            results["peak_memory"] = {
                where: None if size is None else max(size, before.get(where) or 0)
                for where, size in peak_memory(device).items()
            }
            self.folder.write_results(results)

    def _follow(
        self,
        trainer: Trainer,
        trajectory: Trajectory,
        results: dict[str, Any],
        finished: list[Record],
    ) -> list[Record]:
        """Trains along one trajectory, from its beginning or from its last checkpoint; the records
        so far, of which ``finished`` are those before."""
        progress, steps = self.progress, len(trainer.batches)
        epochs = sum(each.end - each.begin for each in plan(self.config))  # of the whole run
        current = trainer.start(trajectory)
        self._restore(trainer, current)
        if (listed := self.listed.get(trajectory.name, 0)) > current.epoch:
            progress.say(
                f"note: results.json lists {trajectory.name} up to epoch {listed}, and no "
                f"checkpoint beyond epoch {current.epoch} is left; going on from there"
            )
        results["records"] = finished + current.records
        progress.start(
            trajectory.name.upper(),
            epochs=trajectory.end,
            steps=steps,
            done=current.epoch * steps + current.step,
        )
        board = Board(self.folder.tensorboard, trajectory.name, current.epoch, progress.say)
        try:
            while current.epoch < trajectory.end:
                try:
                    record = trainer.train_epoch(current, lambda: self._between(trainer, current))
                except Stopped:
                    self._save(trainer, current)
                    raise
                # Everything that the epoch leaves comes before the checkpoint that says it is done.
                self._save_models(current)
                if current.epoch in trajectory.branches:
                    state = snapshot.take(trainer, current)
                    if self.world.main:
                        self.folder.save_branch(trajectory.name, current.epoch, state)
                self._save(trainer, current)
                results["records"] = finished + current.records
                self._write(results)
                if self.world.main:
                    board.add(record)
                records = results["records"]
                spent = sum(sum(r["seconds"].values()) for r in records)
                progress.epoch(record, spent / len(records) * (epochs - len(records)))
                if self.world.largest(self._wanted(), trainer.device) == 2:
                    raise Stopped
        finally:
            board.close()
            progress.stop()
        return finished + current.records

    def _between(self, trainer: Trainer, current: Run) -> None:
        """After every step: saves or stops where that is wanted."""
        self.progress.step()
        wanted = self._wanted()
        if self.world.size > 1:
            if current.step % _AGREE_EVERY:
                return
            wanted = self.world.largest(wanted, trainer.device)
        if wanted == 2:
            raise Stopped
        if wanted:
            self._save(trainer, current)

    def _wanted(self) -> int:
        """2 to stop, 1 to save, 0 to go on."""
        if self.interrupted():
            return 2
        return int(time.monotonic() - self.saved > self.checkpoint_seconds)

    def _save(self, trainer: Trainer, current: Run) -> None:
        state = snapshot.take(trainer, current)
        if self.world.main:
            name = current.trajectory.name
            self.folder.save_checkpoint(name, current.epoch, current.step, state)
        self.saved = time.monotonic()

    def _restore(self, trainer: Trainer, current: Run) -> None:
        trajectory, say = current.trajectory, self.progress.say
        found = self.folder.load_checkpoint(trajectory.name, trainer.device, say)
        if found is not None:
            path, state = found
            snapshot.restore(trainer, current, state, path)
        elif trajectory.begin > 0:
            path, state = self.folder.load_branch("sgd", trajectory.begin, trainer.device, say)
            snapshot.continue_from(trainer, current, state, path)

    def _save_models(self, current: Run) -> None:
        """Final weights of the methods whose results this epoch gives, and new ensemble members."""
        averages, name = current.averages.values(), current.trajectory.name
        if (
            self.config.keep_captures
            and name == "swa"
            and any(average.due(current.epoch) for average in averages)
        ):
            capture = f"capture-{name}-{current.epoch:04d}"
            self._save_model(capture, whole_weights(current.model))
        for method, marks in current.trajectory.marks.items():
            names = [
                method if budget == max(marks) else f"{method}-{budget:g}"
                for budget, end in marks.items()
                if end == current.epoch
            ]
            average = current.averages.get(method)
            if average is not None:
                found = average.networks(current.epoch, names, current.model)
            else:
                found = dict.fromkeys(names, whole_weights(current.model)) if names else {}
            for name, weights in found.items():
                self._save_model(name, weights)

    def _save_model(self, name: str, weights: Mapping[str, Tensor]) -> None:
        if self.world.main:
            self.folder.save_model(name, weights)

    def _compare(self, previous: dict[str, Any], current: dict[str, Any]) -> None:
        """Refuses other data; mentions other software or hardware."""
        if previous["data"] != current["data"]:
            changed = [
                key for key in current["data"] if previous["data"].get(key) != current["data"][key]
            ]
            raise TrainError(
                f"{self.folder.file('results.json')}: expected the data that the run began with, "
                f"found other {', '.join(changed)}"
            )
        for key, value in current["environment"].items():
            before = previous["environment"].get(key)
            if before != value:
                self.progress.say(
                    f"note: {key} was {before} when the run began and is {value} now; results may "
                    f"differ from those of an uninterrupted run"
                )
