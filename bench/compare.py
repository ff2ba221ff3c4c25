"""Regressions between two sets of rows, beyond the noise.

    python bench/compare.py OLD.csv NEW.csv       exits with 1 if something of ours became slower

Rows of the same operation, contender, model, type, way of timing, device and number of threads are
compared. A row became slower if both hold

* for the times, and
* where there is a limit, for the times relative to the limit of the same round, which leaves a
  machine that is slower as a whole out of account:

the middle halves do not overlap (the new first quartile is above the old third one), and the new
median is above the old one by more than a minimum, the largest of

* 10 %, unless given otherwise,
* the share of the CPU's time that other processes used meanwhile in either run: caches and memory
  are shared even where CPU time is not, and
* the second largest change of a competitor in the same rounds. Their code is what it was, so that
  is what another process, with its memory at other places, does to a time; the largest is left out
  because one of them may be of another version.

Faster: the same with the sides exchanged. Rows of one operation on two machines are refused: what
differs between them is the machine. Competitors that changed by more than the first two are
listed, but are no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rows import OURS, Row, read

__all__ = ["Change", "changes", "main"]


@dataclasses.dataclass(frozen=True)
class Change:
    old: Row
    new: Row
    slower: bool

    @property
    def ratio(self) -> float:
        assert self.old.median and self.new.median
        return self.new.median / self.old.median


Quartiles = tuple[float, float, float]


def _beyond(low: Quartiles, high: Quartiles, minimum: float) -> bool:
    """Whether ``high`` is above ``low`` by more than the noise of both."""
    return high[0] > low[2] and high[1] > (1 + minimum) * low[1]


def _views(row: Row) -> list[Quartiles]:
    """The times, and those relative to the limit; a limit itself has only the first."""
    assert row.q1 is not None and row.median is not None and row.q3 is not None
    views = [(row.q1, row.median, row.q3)]
    if row.side != "limit" and row.limit_median is not None:
        assert row.limit_q1 is not None and row.limit_q3 is not None
        views.append((row.limit_q1, row.limit_median, row.limit_q3))
    return views


def changes(old: Sequence[Row], new: Sequence[Row], minimum: float = 0.1) -> list[Change]:
    """What became slower or faster, the largest change first."""
    before = {row.key: row for row in old if row.median is not None}
    common = [(before[r.key], r) for r in new if r.key in before and r.median is not None]
    drifts: dict[tuple[str, ...], list[float]] = {}
    for was, row in common:
        if row.side == "competitor":
            ratio = _views(row)[-1][1] / _views(was)[-1][1]
            drifts.setdefault(row.case, []).append(max(ratio, 1 / ratio) - 1)
    found = []
    for was, row in common:
        pairs = list(zip(_views(was), _views(row), strict=False))
        least = max(minimum, was.others or 0.0, row.others or 0.0)
        if row.side == OURS:
            least = max([least, *sorted(drifts.get(row.case, []))[-2:-1]])
        if all(_beyond(a, b, least) for a, b in pairs):
            found.append(Change(was, row, True))
        elif all(_beyond(b, a, least) for a, b in pairs):
            found.append(Change(was, row, False))
    return sorted(found, key=lambda c: -max(c.ratio, 1 / c.ratio))


def broken(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows that had a time and have none now, because the contender is wrong or not served."""
    timed = {row.key for row in old if row.status == "ok"}
    return [row for row in new if row.key in timed and row.status in ("wrong", "not served")]


def other_machines(old: Sequence[Row], new: Sequence[Row]) -> list[tuple[str, str]]:
    """Pairs of devices, old and new, of what was timed on two and on none in both runs."""

    def devices(rows: Sequence[Row]) -> dict[tuple[str, ...], set[str]]:
        found: dict[tuple[str, ...], set[str]] = {}
        for row in rows:
            # GPUs are timed by events, which a CPU is not.
            rest = (
                row.op,
                row.contender,
                row.model,
                row.dtype,
                row.mode,
                str(row.clock == "events"),
            )
            found.setdefault(rest, set()).add(row.device)
        return found

    before, after = devices(old), devices(new)
    both = [(before[key], after[key]) for key in before.keys() & after.keys()]
    return sorted({(min(a), min(b)) for a, b in both if not a & b})


def _show(title: str, found: Sequence[Change]) -> None:
    if found:
        print(f"\n{title}")
    for change in found:
        old, new = change.old, change.new
        assert old.median and new.median
        print(
            f"  {change.ratio:5.2f} times the time  {1e3 * old.median:.4g} -> "
            f"{1e3 * new.median:.4g} ms  {new.op}: {new.contender}, {new.model}, {new.dtype}, "
            f"{new.mode}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--minimum", type=float, default=0.1, help="0.1 is 10 %% (default)")
    options = parser.parse_args(arguments)
    old, new = read([options.old]), read([options.new])
    if pairs := other_machines(old, new):
        for was, now in pairs:
            print(f"expected rows of one machine, found {was} in {options.old} and {now} in "
                  f"{options.new}")  # fmt: skip
        return 2
    common = {r.key for r in old} & {r.key for r in new}
    if not common:
        print("no rows in common: other operations, or another number of threads?")
        return 2
    found = changes(old, new, options.minimum)
    ours = [c for c in found if c.new.side == OURS]
    slower = [c for c in ours if c.slower]
    gone = [r for r in broken(old, new) if r.side == OURS]
    _show("SLOWER", slower)
    _show("faster", [c for c in ours if not c.slower])
    _show("not ours, changed", [c for c in found if c.new.side != OURS])
    for row in gone:
        print(f"  {row.status.upper()}: {row.op}: {row.contender}, {row.model}: {row.reason}")
    busy = max((row.others or 0.0 for row in [*old, *new] if row.key in common), default=0.0)
    print(
        f"\n{len(common)} rows compared: {len(slower)} slower, {len(gone)} without a result"
        + (f"; other work used up to {100 * busy:.0f} % of the CPU's time" if busy > 0.05 else "")
    )
    return 1 if slower or gone else 0


if __name__ == "__main__":
    sys.exit(main())
