"""What a run shows while it goes on: a bar, lines, and curves for TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import import_extra


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


class Progress:
    """A bar over the steps of each run on a terminal; otherwise a line per epoch.

    Args:
        quiet: lines, also on a terminal.
        silent: nothing at all, for all processes of a run but one.
    """

    def __init__(self, *, quiet: bool, silent: bool = False) -> None:
        self._tqdm: Any = None
        self._silent = silent
        self._write: Callable[[str], object] | None = None
        self._unwritten: list[str] = []
        if not (quiet or silent) and sys.stderr.isatty():
            self._tqdm = import_extra("tqdm").tqdm
        self._bar: Any = None
        self._epochs = 0
        self._label = ""

    def write_log(self, write: Callable[[str], object]) -> None:
        """Hands all lines, those said before too, to ``write``, with the time in front."""
        self._write = write
        for line in self._unwritten:
            write(line)
        self._unwritten.clear()

    def say(self, text: str) -> None:
        """Prints a line on standard output."""
        if self._silent:
            return
        with suppress(OSError):  # the terminal may be gone
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)
        self._log(text)

    def _log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.strip()}\n"
        if self._write is None:
            self._unwritten.append(line)
        else:
            self._write(line)

    def over(self, items: Iterator[None], count: int) -> Iterator[None]:
        """``items``, with a bar on a terminal."""
        if self._tqdm is None:
            return items
        bar: Iterator[None] = iter(self._tqdm(items, total=count, desc="images", unit="file"))
        return bar

    def start(self, label: str, *, epochs: int, steps: int, done: int) -> None:
        """Begins a trajectory of ``epochs`` epochs of ``steps`` steps, ``done`` steps of which are
        finished."""
        self._epochs = epochs
        self._label = label
        if self._tqdm is not None:
            self._bar = self._tqdm(total=epochs * steps, initial=done, desc=label, unit="step")

    def step(self) -> None:
        """Counts a finished step."""
        if self._bar is not None:
            self._bar.update()

    def epoch(self, record: dict[str, Any], left: float) -> None:
        """Shows a finished epoch, and the seconds that are ``left`` of the whole run if its epochs
        go on taking as long as those so far."""
        values = {
            "test": record["test_accuracy"],
            **{method: a["test_accuracy"] for method, a in record["averages"].items()},
        }
        shown = {name: f"{value:.2f}%" for name, value in values.items() if value is not None}
        accuracies = "".join(f"  {name} {value}" for name, value in shown.items())
        line = (
            f"{self._label} epoch {record['epoch']}/{self._epochs}  lr {record['lr']:.4g}  "
            f"loss {record['train_loss']:.4f}  train {record['train_accuracy']:.2f}%{accuracies}  "
            f"{sum(record['seconds'].values()):.1f} s  {duration(left)} left"
        )
        if self._bar is not None:
            epoch = f"{record['epoch']}/{self._epochs}"
            self._bar.set_postfix(epoch=epoch, **shown, left=duration(left))
            self._log(line)
            return
        self.say(line)

    def stop(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Board:
    """Event files of one trajectory, a folder per curve: the iterate's and each average's.

    The tags are the same everywhere (test/accuracy, test/loss, train/accuracy, train/loss, lr, and
    seconds by phase), so that TensorBoard lays the curves over each other; the step is the epoch.
    Without the package tensorboard nothing is written.

    Args:
        folder: of all event files of the run.
        trajectory: name of the trajectory.
        epoch: finished epochs; what earlier files have of later ones is not shown any more.
        say: told once if nothing can be written.
    """

    def __init__(
        self, folder: Path, trajectory: str, epoch: int, say: Callable[[str], object]
    ) -> None:
        self._folder, self._trajectory, self._first, self._say = folder, trajectory, epoch + 1, say
        self._writers: dict[str, Any] = {}
        self._closed = False

    def add(self, record: dict[str, Any]) -> None:
        """Writes the values of an epoch's record and flushes them."""
        if self._closed:
            return
        iterate = {
            "lr": record["lr"],
            **{
                tag: record[tag.replace("/", "_")]
                for tag in ("train/loss", "train/accuracy", "test/loss", "test/accuracy")
            },
            **{f"seconds/{phase}": s for phase, s in record["seconds"].items()},
        }
        curves = {self._trajectory: iterate}
        for method, average in record["averages"].items():
            curves[f"{method}-average"] = {
                "test/loss": average["test_loss"],
                "test/accuracy": average["test_accuracy"],
            }
        try:
            from torch.utils.tensorboard import SummaryWriter

            for name, values in curves.items():
                if name not in self._writers:
                    folder = str(self._folder / name)
                    self._writers[name] = SummaryWriter(folder, purge_step=self._first)
                for tag, value in values.items():
                    if value is not None:
                        self._writers[name].add_scalar(tag, value, record["epoch"])
                self._writers[name].flush()
        # TensorBoard cannot write into a folder whose name is no text.
        except (ImportError, OSError, UnicodeError) as error:
            remedy = '; pip install "swa_fast[train]" brings it' * isinstance(error, ImportError)
            self._say(f"note: no curves for TensorBoard ({error}{remedy})")
            self.close()

    def close(self) -> None:
        """Closes the files; nothing is written afterwards."""
        self._closed = True
        for writer in self._writers.values():
            writer.close()
