"""The benchmarks' results: one row for each contender, case and way of timing, in CSV files.

Needs the standard library alone, so that reports and comparisons run anywhere.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["OURS", "Row", "digest", "read", "write", "write_table"]

OURS = "swa_fast"


@dataclasses.dataclass(frozen=True)
class Row:
    """Times are seconds. ``limit_*``: times the limit's time in the same round, as time per byte
    where both move a known number of bytes; quartiles over the rounds, empty without a limit."""

    op: str
    contender: str
    side: str  # OURS, "competitor" or "limit"
    model: str
    parameters: int
    tensors: int
    dtype: str  # of the weights or activations
    mode: str  # "warm", "queued" (CUDA), "cold" (caches flushed), "graph", "graph cold"
    device: str
    threads: int
    clock: str  # "wall", "cpu" (of the process: not disturbed by other work), "events" (CUDA)
    torch: str
    commit: str
    date: str
    status: str  # "ok", or "wrong", "not installed", "not served": with a reason and without times
    reason: str = ""
    rounds: int = 0
    q1: float | None = None
    median: float | None = None
    q3: float | None = None
    bytes: int | None = None  # that the operation has to move at least
    limit_q1: float | None = None
    limit_median: float | None = None
    limit_q3: float | None = None
    others: float | None = None  # share of the CPU's time that other processes used meanwhile

    @property
    def gigabytes_per_second(self) -> float | None:
        if not self.bytes or not self.median:
            return None
        return self.bytes / self.median / 1e9

    @property
    def percent_of_limit(self) -> float | None:
        return None if not self.limit_median else 100 / self.limit_median

    @property
    def key(self) -> tuple[str, ...]:
        """What a row of another run has in common with this one."""
        return (
            self.op, self.contender, self.model, self.dtype, self.mode, self.device,
            str(self.threads), self.clock,
        )  # fmt: skip

    @property
    def case(self) -> tuple[str, ...]:
        """What it has in common with the other contenders of its rounds."""
        op, _, *rest = self.key
        return (op, *rest)


FIELDS = [field.name for field in dataclasses.fields(Row)]
# Written for whoever reads the file; computed again when it is read.
DERIVED = {"GB/s": "gigabytes_per_second", "% of limit": "percent_of_limit"}
_INTEGERS = {"parameters", "tensors", "threads", "rounds", "bytes"}
_FLOATS = {"q1", "median", "q3", "limit_q1", "limit_median", "limit_q3", "others"}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: Iterable[Row], append: bool = False) -> None:
    """Writes rows, or adds them to those that the file holds."""
    names = {**{name: name for name in FIELDS}, **DERIVED}
    table = [{column: _text(getattr(row, name)) for column, name in names.items()} for row in rows]
    write_table(path, list(names), table, append)


def write_table(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]], append: bool = False
) -> None:
    """Replaces a CSV file at once, so that an interrupted run leaves the old one.

    Args:
        path: the file.
        columns: in their order.
        rows: values by column.
        append: keep what the file holds; its columns have to be the same.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    before = path.read_text(encoding="utf-8") if append and path.exists() else ""
    if not before:
        writer.writeheader()
    writer.writerows(rows)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(before + text.getvalue(), encoding="utf-8", newline="")
    part.replace(path)


def _parse(name: str, text: str) -> Any:
    if name in _INTEGERS:
        return int(text) if text else (0 if name == "rounds" else None)
    if name in _FLOATS:
        return float(text) if text else None
    return text


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows of some files. A later row replaces an earlier one of the same key.

    Raises:
        ValueError: a file without the columns of :class:`Row`.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(FIELDS) - set(reader.fieldnames or ()))
            if missing:
                raise ValueError(f"{path}: expected the columns {', '.join(missing)}")
            for entry in reader:
                row = Row(**{n: _parse(n, entry[n]) for n in FIELDS})
                rows[row.key] = row
    return list(rows.values())


def digest(rows: Iterable[Row]) -> str:
    """A digest of the rows' content, whatever their order."""
    lines = sorted(",".join(_text(getattr(row, name)) for name in FIELDS) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
