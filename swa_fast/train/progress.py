"""What a run shows while it goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from .errors import import_extra

__all__ = ["Progress"]


class Progress:
    """A bar over the steps of each run on a terminal; otherwise a line per epoch.

    Args:
        quiet: lines, also on a terminal.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._tqdm: Any = None
        if not quiet and sys.stderr.isatty():
            self._tqdm = import_extra("tqdm").tqdm
        self._bar: Any = None
        self._epochs = 0
        self._label = ""

    def say(self, text: str) -> None:
        """Prints a line on standard output."""
        print(text, flush=True)

    def over(self, items: Iterator[None], count: int) -> Iterator[None]:
        """``items``, with a bar on a terminal."""
        if self._tqdm is None:
            return items
        bar: Iterator[None] = iter(self._tqdm(items, total=count, desc="images", unit="file"))
        return bar

    def start(self, label: str, *, epochs: int, steps: int, done: int) -> None:
        """Begins a run of ``epochs`` epochs of ``steps`` steps, ``done`` epochs being finished."""
        self._epochs = epochs
        self._label = label
        if self._tqdm is not None:
            self._bar = self._tqdm(
                total=epochs * steps, initial=done * steps, desc=label, unit="step"
            )

    def step(self) -> None:
        """Counts a finished step."""
        if self._bar is not None:
            self._bar.update()

    def epoch(self, record: dict[str, Any]) -> None:
        """Shows a finished epoch."""
        values = {
            "test": record["test_accuracy"],
            "average": record["swa_test_accuracy"],
        }
        shown = {name: f"{value:.2f}%" for name, value in values.items() if value is not None}
        if self._bar is not None:
            self._bar.set_postfix(epoch=f"{record['epoch']}/{self._epochs}", **shown)
            return
        accuracies = "".join(f"  {name} {value}" for name, value in shown.items())
        self.say(
            f"{self._label} epoch {record['epoch']}/{self._epochs}  lr {record['lr']:.4g}  "
            f"loss {record['train_loss']:.4f}  train {record['train_accuracy']:.2f}%{accuracies}  "
            f"{sum(record['seconds'].values()):.1f} s"
        )

    def stop(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
