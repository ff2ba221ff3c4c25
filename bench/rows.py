"""The benchmarks' results: one row for each contender, case and way of timing, in CSV files.

Needs the standard library alone, so that reports and comparisons run anywhere.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["OURS", "Row", "digest", "read", "write"]

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
    mode: str  # "warm", "cold" (caches flushed), "graph" (CUDA graph), "graph cold"
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
        if self.bytes is None or not self.median:
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
    """Writes rows, with a header line unless the file that is appended to has one."""
    header = not (append and path.exists() and path.stat().st_size)
    with path.open("a" if append else "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if header:
            writer.writerow([*FIELDS, *DERIVED])
        for row in rows:
            names = [*FIELDS, *DERIVED.values()]
            writer.writerow([_text(getattr(row, name)) for name in names])


def _parse(name: str, text: str) -> object:
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
                row = Row(**{n: _parse(n, entry[n]) for n in FIELDS})  # type: ignore[arg-type]
                rows[row.key] = row
    return list(rows.values())


def digest(rows: Iterable[Row]) -> str:
    """Of the rows' content, in any order."""
    lines = sorted(",".join(_text(getattr(row, name)) for name in FIELDS) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
