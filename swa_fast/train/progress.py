"""What a run shows while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from .errors import import_extra

__all__ = ["Progress"]


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

    def epoch(self, record: dict[str, Any]) -> None:
        """Shows a finished epoch."""
        values = {
            "test": record["test_accuracy"],
            **{method: a["test_accuracy"] for method, a in record["averages"].items()},
        }
        shown = {name: f"{value:.2f}%" for name, value in values.items() if value is not None}
        accuracies = "".join(f"  {name} {value}" for name, value in shown.items())
        line = (
            f"{self._label} epoch {record['epoch']}/{self._epochs}  lr {record['lr']:.4g}  "
            f"loss {record['train_loss']:.4f}  train {record['train_accuracy']:.2f}%{accuracies}  "
            f"{sum(record['seconds'].values()):.1f} s"
        )
        if self._bar is not None:
            self._bar.set_postfix(epoch=f"{record['epoch']}/{self._epochs}", **shown)
            self._log(line)
            return
        self.say(line)

    def stop(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
