"""Curves for TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Board"]


class Board:
    """Event files of one trajectory, a folder per curve: the iterate's and each average's.

    The tags are the same everywhere (test/accuracy, test/loss, train/accuracy, train/loss, lr, and
    seconds by phase), so that TensorBoard lays the curves over each other; the step is the epoch.
    Without the package tensorboard nothing is written.

    Args:
        folder: of all event files of the run.
        trajectory: name of the trajectory.
        say: told once if nothing can be written.
        silent: whether to write nothing, as all processes of a run but one.
    """

    def __init__(
        self, folder: Path, trajectory: str, say: Callable[[str], object], *, silent: bool = False
    ) -> None:
        self._folder = folder
        self._trajectory = trajectory
        self._say = say
        self._writers: dict[str, Any] = {}
        self._closed = silent

    def restart(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes the files of a continued trajectory anew, so that no epoch is missing or there
        twice.
        ``records`` are those of its finished epochs."""
        if self._closed:
            return
        names = {self._trajectory, *(f"{m}-average" for r in records for m in r["averages"])}
        for name in names:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Writes the values of an epoch's record and flushes them."""
        if self._closed:
            return
        epoch = record["epoch"]
        iterate = {
            "lr": record["lr"],
            "train/loss": record["train_loss"],
            "train/accuracy": record["train_accuracy"],
            "test/loss": record["test_loss"],
            "test/accuracy": record["test_accuracy"],
            **{f"seconds/{phase}": s for phase, s in record["seconds"].items()},
        }
        curves = {self._trajectory: iterate}
        for method, average in record["averages"].items():
            curves[f"{method}-average"] = {
                "test/loss": average["test_loss"],
                "test/accuracy": average["test_accuracy"],
            }
        try:
            for name, values in curves.items():
                writer = self._writer(name)
                for tag, value in values.items():
                    if value is not None:
                        writer.add_scalar(tag, value, epoch)
                writer.flush()
        except ImportError as error:
            self._give_up(f'{error}; pip install "swa_fast[train]" brings it')
        except OSError as error:
            self._give_up(str(error))

    def close(self) -> None:
        """Closes the files; nothing is written afterwards."""
        self._closed = True
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, name: str) -> Any:
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[name] = SummaryWriter(str(self._folder / name))
        return self._writers[name]

    def _give_up(self, reason: str) -> None:
        self._closed = True
        self._say(f"note: no curves for TensorBoard ({reason})")
