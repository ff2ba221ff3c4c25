"""The figures of README and documentation and the charts, made from the committed rows.

    python bench/report.py                  fills the pages' marked places and draws the charts
    python bench/report.py --check          exits with 1 where pages or charts are not of the rows
    python bench/report.py FILE.csv ...     prints tables of any rows as Markdown

The pages are README.md and those of docs/. The rows are bench/results/rows_*.csv, counts_*.csv,
overhead_*.csv, checkpoints_*.csv, sharding_*.csv and differences.csv. A place in a page begins with
``<!-- bench:KIND option="value" ... -->`` and ends with ``<!-- /bench -->``. Kinds:

* ``machine``: what the rows were measured on (``threads``);
* ``times``: median ms, contenders by models (``op``, ``mode``; ``models`` and ``contenders`` with |
  between them; ``threads``, the most there are by default);
* ``limit``: the same in percent of the limit;
* ``multiples``: the same as multiples of the limit's time in the same rounds: for sizes whose time
  is that of a memory which is not always as fast;
* ``ratios``: how many times longer the others take than ours (``of``), each relative to the limit
  in its own rounds, as models too large for all contenders at once are compared in pieces;
* ``layers``: another contender's time over ours, least, median and most over the shapes, by type
  and layout (``op``, ``ours``, ``other``);
* ``counts``: launches, waits, allocations and copies counted (``op``, ``model``), the least time
  that they take, and where bench/predict.py knows the kernels, what its model expects and the range
  of what that model has been off by;
* ``overhead``: SWA's share in training;
* ``checkpoints``: averages of files;
* ``sharding``: an update of DTensors;
* ``differences``: other packages' averages beside ours, see bench/differences.py;
* ``gpu``: rows of ``bench/gpu_report.py`` in bench/results/gpu/*/rows.csv, or that there are none
  (``table`` machine, update, layers or pass; ``models`` with | between them; ``op``).

Charts: bench/results/growth.svg and update.svg. Drawing needs matplotlib, all else nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import OURS, Row, digest, read

__all__ = ["fill", "main", "significant"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(
    r"(?P<begin><!-- bench:(?P<kind>\w+)(?P<options>[^>]*?) -->\n).*?(?P<end><!-- /bench -->)",
    re.DOTALL,
)
CHARTS = ("growth.svg", "update.svg")


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits, and never an exponent."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    # Rounding up may have added a digit: 0.9996 is 1.00.
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in table)


def of_threads(rows: Sequence[Row], threads: str | None = None) -> list[Row]:
    """Those of so many threads, or of as many as torch took by itself."""
    number = max((r.threads for r in rows), default=0) if threads is None else int(threads)
    return [r for r in rows if r.threads == number]


class Data:
    """All committed results."""

    def __init__(self, folder: Path) -> None:
        self.rows = read(sorted(folder.glob("rows_*.csv")))
        self.gpu = read(sorted(folder.glob("gpu/*/rows.csv")))
        self.counts = self._plain(folder, "counts_*.csv")
        self.overhead = self._plain(folder, "overhead_*.csv")
        self.checkpoints = self._plain(folder, "checkpoints_*.csv")
        self.differences = self._plain(folder, "differences.csv")
        self.sharding = self._plain(folder, "sharding_*.csv")

    @staticmethod
    def _plain(folder: Path, pattern: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for path in sorted(folder.glob(pattern)):
            with path.open(encoding="utf-8", newline="") as file:
                found += csv.DictReader(file)
        return found

    def selected(self, options: dict[str, str]) -> list[Row]:
        wanted = options.get("models", "").split("|") if "models" in options else None
        rows = [
            r
            for r in self.rows
            if r.op == options.get("op", r.op)
            and r.mode == options.get("mode", "warm")
            and options.get("device", "") in r.device
            and options.get("clock", r.clock) == r.clock
            and (wanted is None or r.model in wanted)
        ]
        rows = of_threads(rows, options.get("threads"))
        if not rows:
            raise ValueError(f"no row for {options}")
        devices = sorted({(r.device, r.threads, r.clock) for r in rows})
        if len(devices) > 1:
            raise ValueError(f"rows of several devices, choose with device=, clock=: {devices}")
        if wanted is not None:
            rows.sort(key=lambda r: wanted.index(r.model))
        return rows


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _by_model(rows: Sequence[Row], cell: Callable[[Row], str], names: Sequence[str]) -> str:
    models = _unique((r.model, r.dtype) for r in rows)
    by = {(r.contender, (r.model, r.dtype)): r for r in rows}
    several = len({dtype for _, dtype in models}) > 1
    head = ["", *(f"{m}, {d}" if several else m for m, d in models)]
    lines = []
    for name in names:
        cells = []
        for model in models:
            row = by.get((name, model))
            cells.append("" if row is None else cell(row) if row.median else row.status)
        lines.append([name, *cells])
    return markdown(head, lines)


def _contenders(rows: Sequence[Row], options: dict[str, str]) -> list[str]:
    every = _unique(r.contender for r in rows)
    names = options["contenders"].split("|") if "contenders" in options else every
    if unknown := set(names) - set(every):
        raise ValueError(f"no row of {', '.join(sorted(unknown))} for {options}")
    return names


def multiples(data: Data, options: dict[str, str]) -> str:
    rows = data.selected(options)
    relative = in_limits(rows)

    def cell(row: Row) -> str:
        found = relative.get((row.contender, row.model, row.dtype))
        return "" if found is None else significant(found[1])

    return _by_model(rows, cell, _contenders(rows, options))


def times(data: Data, options: dict[str, str]) -> str:
    rows = data.selected(options)

    def cell(row: Row) -> str:
        return significant(1e3 * (row.median or 0))

    names = _contenders(rows, options)
    if "contenders" in options:
        return _by_model(rows, cell, names)
    scaled = _at_the_limits_speed(rows)
    if scaled:
        names.insert(1, scaled[0].contender)
    return _by_model([*rows, *scaled], cell, names)


def _at_the_limits_speed(rows: Sequence[Row]) -> list[Row]:
    """What the operation's bytes would take at the speed of the limit; nothing where the limit
    moves as many."""
    ours = {(r.model, r.dtype): r.bytes for r in rows if r.side == OURS and r.bytes}
    found = []
    for r in rows:
        least = ours.get((r.model, r.dtype))
        if r.side == "limit" and r.median and r.bytes and least and least != r.bytes:
            name = f"as many bytes at {r.contender}'s speed"
            median = r.median * least / r.bytes
            found.append(dataclasses.replace(r, contender=name, median=median))
    return found


def limit(data: Data, options: dict[str, str]) -> str:
    rows = data.selected(options)

    def cell(row: Row) -> str:
        return "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f} %"

    return _by_model(rows, cell, _unique(r.contender for r in rows))


def in_limits(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """Times in times of the limit's, of the same rounds: quartiles by contender, model, dtype."""
    moved = {(r.model, r.dtype): r.bytes for r in rows if r.side == "limit"}
    found = {}
    for r in rows:
        low, median, high = r.limit_q1, r.limit_median, r.limit_q3
        if low is not None and median is not None and high is not None:
            # The row's are ratios of times per byte where both sides' bytes are known.
            least = moved.get((r.model, r.dtype))
            scale = r.bytes / least if r.bytes and least else 1.0
            found[r.contender, r.model, r.dtype] = (scale * low, scale * median, scale * high)
    return found


def ratios(data: Data, options: dict[str, str]) -> str:
    rows = data.selected(options)
    relative = in_limits(rows)

    def cell(row: Row) -> str:
        ours = relative.get((options["of"], row.model, row.dtype))
        other = relative.get((row.contender, row.model, row.dtype))
        return significant(other[1] / ours[1], 2) if ours and other else ""

    names = _unique(r.contender for r in rows if r.side == "competitor")
    return _by_model(rows, cell, names)


def layers(data: Data, options: dict[str, str]) -> str:
    """Models are named ``shape layout``."""
    found: dict[tuple[str, str], list[float]] = {}
    rows = data.selected(options)
    by = {(r.contender, r.model, r.dtype): r for r in rows}
    for row in rows:
        if row.contender == options["ours"] and row.median:
            other = by[options["other"], row.model, row.dtype].median
            layout = row.model.split()[1].replace("_", "-")
            if other:
                found.setdefault((layout, row.dtype), []).append(other / row.median)
    dtypes = _unique(dtype for _, dtype in found)
    lines = []
    for layout in _unique(layout for layout, _ in found):
        cells = []
        for dtype in dtypes:
            v = found[layout, dtype]
            cells.append(f"{min(v):.1f}, {statistics.median(v):.1f}, {max(v):.1f}")
        lines.append([layout, *cells])
    return markdown(["", *dtypes], lines)


def counts(data: Data, options: dict[str, str]) -> str:
    rows = [
        r for r in data.counts
        if r["op"] == options["op"] and r["model"] == options["model"]
        and r["dtype"] == options.get("dtype", "float32")
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"no counts for {options}")
    columns = ["launches", "host syncs", "allocations", "copies", "bytes counted"]
    modelled = any(row.get("model us") for row in rows)
    lines = []
    for row in rows:
        cells = [row["contender"], *(f"{int(row[c]):,}" if row[c] else "" for c in columns)]
        cells.append(significant(float(row["at least us"])))
        lines.append([*cells, *[_expected(row)] * modelled])
    head = ["", *columns, "at least, us", *["by the model, not measured, us"] * modelled]
    return markdown(head, lines)


def _expected(row: dict[str, str]) -> str:
    """The expected time of a counted row and its range; nothing where the model knows none."""
    if not row.get("model us"):
        return ""
    expected, low, high = (
        significant(float(row[f"model {part}us"])) for part in ("", "low ", "high ")
    )
    return f"{expected} ({low} to {high})"


def overhead(data: Data, options: dict[str, str]) -> str:
    if not data.overhead:
        raise ValueError("there is no overhead_*.csv")
    phases = [c for c in data.overhead[0] if c.endswith(", s") and c != "epoch, s"]
    lines = []
    for row in data.overhead:
        cells = [row["model"], row["rule"], row["library"]]
        cells += [significant(1e3 * float(row[phase])) for phase in phases]
        lines.append([*cells, f"{float(row['overhead, %']):.1f} %"])
    head = ["network", "rule", "library", *(f"{p.removesuffix(', s')}, ms" for p in phases)]
    return markdown([*head, "overhead"], lines)


def checkpoints(data: Data, options: dict[str, str]) -> str:
    if not data.checkpoints:
        raise ValueError("there is no checkpoints_*.csv")
    columns = ["seconds", "fastest", "slowest", "GB/s read", "peak MiB"]
    lines = [[row["contender"], *(row[column] for column in columns)] for row in data.checkpoints]
    first = data.checkpoints[0]
    text = (
        f"{first['inputs']} files of {first['GiB each']} GiB; {first['device']}, "
        f"{first['threads']} threads, torch {first['torch']}, {first['date']}.\n\n"
    )
    return text + markdown(["", *columns], lines)


def sharding(data: Data, options: dict[str, str]) -> str:
    if not data.sharding:
        raise ValueError("there is no sharding_*.csv")
    columns = ["median, us", "q1, us", "q3, us", "against ours"]
    lines = [
        [row["contender"], f"{int(row['elements']):,}", *(row[column] for column in columns)]
        for row in data.sharding
    ]
    first = data.sharding[0]
    text = (
        f"{first['device']}, {first['threads']} thread, torch {first['torch']}, "
        f"{first['rounds']} rounds, {first['date']}.\n\n"
    )
    return text + markdown(["", "elements", *columns], lines)


def differences(data: Data, options: dict[str, str]) -> str:
    if not data.differences:
        raise ValueError("there is no differences.csv")
    head = ["you use", "write", "difference", "why it is more than rounding"]
    lines = [
        [f"`{row['theirs']}`", f"`{row['ours']}`", row["difference"], row["why"]]
        for row in data.differences
    ]
    return f"On the CPU, torch {data.differences[0]['torch']}.\n\n" + markdown(head, lines)


def machine(data: Data, options: dict[str, str]) -> str:
    lines = []
    clocks = {"wall": "", "cpu": ", CPU time of the process", "events": ", CUDA events"}
    every = of_threads(data.rows, options.get("threads"))
    for device, threads, clock in _unique((r.device, r.threads, r.clock) for r in every):
        rows = [r for r in every if (r.device, r.threads, r.clock) == (device, threads, clock)]
        busy = [r.others for r in rows if r.others is not None]
        dates = sorted({r.date for r in rows})
        text = (
            f"{device}, {threads} thread{'s' if threads > 1 else ''}{clocks[clock]}, torch "
            f"{rows[0].torch}, "
            f"{dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}; medians of interleaved "
            f"rounds."
        )
        if busy and max(busy) > 0.05:
            text += (
                f" Other work used {100 * statistics.median(busy):.0f} % of the machine's time "
                f"meanwhile (median; at most {100 * max(busy):.0f} %)."
            )
        lines.append(text)
    return "\n\n".join(lines) + "\n"


def _gpu_cell(rows: Sequence[Row]) -> str:
    """Device time with cold caches: of a captured graph, else of the queued calls."""
    for mode in ("graph cold", "queued cold", "pass"):
        for row in rows:
            if row.mode == mode and row.median:
                scale = 1e3 if mode == "pass" else 1e6
                share = f" ({row.percent_of_limit:.0f} %)" if row.percent_of_limit else ""
                return significant(scale * row.median) + share
    return rows[0].status if rows else ""


def gpu(data: Data, options: dict[str, str]) -> str:
    """Tables of measured GPUs; one of each for every device."""
    if not data.gpu:
        return "No GPU has been measured yet: there are no such rows.\n"
    parts = []
    for device in _unique(r.device for r in data.gpu):
        rows = [r for r in data.gpu if r.device == device]
        if options["table"] == "machine":
            parts.append(f"{device}, torch {rows[0].torch}, {rows[0].date}.\n")
            continue
        wanted = options["models"].split("|") if "models" in options else None
        rows = [r for r in rows if r.op == options["op"] and (wanted is None or r.model in wanted)]
        columns = _unique((r.model, r.dtype) for r in rows)
        names = _unique(r.contender for r in rows)
        if options["table"] == "layers":
            head = [device, *names]
            lines = [
                [f"{m}, {d}", *(_gpu_cell([r for r in rows if (r.model, r.dtype, r.contender)
                                           == (m, d, n)]) for n in names)]
                for m, d in columns
            ]  # fmt: skip
        else:
            several = len({dtype for _, dtype in columns}) > 1
            head = [device, *(f"{m}, {d}" if several else m for m, d in columns)]
            lines = [
                [n, *(_gpu_cell([r for r in rows if (r.model, r.dtype, r.contender)
                                 == (m, d, n)]) for m, d in columns)]
                for n in names
            ]  # fmt: skip
        parts.append(markdown(head, lines))
    return "\n".join(parts)


KINDS: dict[str, Callable[[Data, dict[str, str]], str]] = {
    "machine": machine,
    "times": times,
    "limit": limit,
    "multiples": multiples,
    "ratios": ratios,
    "layers": layers,
    "counts": counts,
    "overhead": overhead,
    "checkpoints": checkpoints,
    "sharding": sharding,
    "differences": differences,
    "gpu": gpu,
}


def fill(text: str, data: Data) -> str:
    """The text with all marked places filled.

    Raises:
        ValueError: an unknown kind, or a place that the rows have nothing for.
    """

    def place(match: re.Match[str]) -> str:
        kind = match["kind"]
        if kind not in KINDS:
            raise ValueError(f"bench:{kind}: expected one of {', '.join(KINDS)}")
        options = dict(re.findall(r'(\w+)="([^"]*)"', match["options"]))
        return f"{match['begin']}\n{KINDS[kind](data, options)}\n{match['end']}"

    return PLACE.sub(place, text)


# --------------------------------------------------------------------------------------- charts

_OURS_COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#d35400")


def _style(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    others = iter(["#2c3e50", "#2980b9", "#16a085", "#7f8c8d", "#27ae60", "#34495e", "#1abc9c"])
    ours = iter(_OURS_COLOURS)
    for row in rows:
        if row.contender in styles:
            continue
        if row.side == "limit":
            styles[row.contender] = {"color": "black", "linestyle": "--"}
        elif row.side == OURS:
            styles[row.contender] = {"color": next(ours, "#e74c3c"), "linewidth": 2}
        else:
            styles[row.contender] = {"color": next(others, "#95a5a6"), "linewidth": 1}
    return styles


def _save(figure: Any, path: Path, rows: Sequence[Row]) -> None:
    # Without a date, and with what --check looks for.
    figure.savefig(
        path, format="svg", bbox_inches="tight",
        metadata={"Date": None, "Description": f"rows {digest(rows)}"},
    )  # fmt: skip


def growth_rows(data: Data) -> list[Row]:
    """One tensor, and the models."""
    return [
        r for r in of_threads(data.rows)
        if r.mode == "warm" and r.median and "reference" not in r.contender
        and ((r.op == "growth" and r.model.endswith("in 1 tensor")) or r.op == "update")
    ]  # fmt: skip


def update_rows(data: Data) -> list[Row]:
    return [
        r for r in of_threads(data.rows)
        if r.op == "update" and r.mode == "warm" and r.limit_median
        and "reference" not in r.contender
    ]  # fmt: skip


def draw(data: Data, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "swa_fast", "font.size": 9})
    rows = growth_rows(data)
    styles = _style(rows)
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, style in styles.items():
        line = sorted(
            (r.parameters, 1e3 * (r.median or 0))
            for r in rows if r.contender == name and r.op == "growth"
        )  # fmt: skip
        if line:
            axes.plot(*zip(*line, strict=True), label=name, marker=".", **style)
        points = [(r.parameters, 1e3 * (r.median or 0)) for r in rows
                  if r.contender == name and r.op == "update"]  # fmt: skip
        if points and name != "lerp_flat":
            axes.scatter(*zip(*points, strict=True), color=style["color"], marker="x", s=18)
    axes.set(
        xscale="log", yscale="log", xlabel="parameters", ylabel="time of an update, ms",
        title=f"lines: one tensor; crosses: models of many tensors ({rows[0].device}, fp32)",
    )  # fmt: skip
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
    _save(figure, folder / CHARTS[0], rows)
    plt.close(figure)

    rows = update_rows(data)
    styles = _style(rows)
    models = _unique(r.model for r in rows)
    relative = in_limits(rows)
    least = {r.model: significant(1e3 * (r.median or 0)) for r in rows if r.side == "limit"}
    figure, axes = plt.subplots(figsize=(10, 5))
    width = 0.85 / len(styles)
    for index, (name, style) in enumerate(styles.items()):
        shown = [r for m in models for r in rows if r.contender == name and r.model == m]
        places = [models.index(r.model) + index * width for r in shown]
        found = [relative[name, r.model, r.dtype] for r in shown]
        errors = [[median - low for low, median, _ in found],
                  [high - median for _, median, high in found]]  # fmt: skip
        axes.bar(
            places, [median for _, median, _ in found], width, yerr=errors, label=name,
            color=style["color"], error_kw={"linewidth": 0.5},
            hatch="//" if shown[0].side == "limit" else None,
        )  # fmt: skip
    labels = [f"{model}\n{least.get(model, '?')} ms" for model in models]
    axes.set_xticks([i + 0.42 for i in range(len(models))], labels, fontsize=8)
    axes.set(
        yscale="log", ylabel="time of an update over the limit's, ms of which below",
        title=f"averaging update, fp32, medians and quartiles ({rows[0].device})",
    )  # fmt: skip
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    _save(figure, folder / CHARTS[1], rows)
    plt.close(figure)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale(texts: Sequence[Path], folder: Path) -> list[str]:
    """What is not as the rows say."""
    data = Data(folder)
    problems = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        if fill(text, data) != text:
            problems.append(path.name)
    for name, rows in zip(CHARTS, (growth_rows(data), update_rows(data)), strict=True):
        path = folder / name
        if not path.exists() or f"rows {digest(rows)}" not in path.read_text(encoding="utf-8"):
            problems.append(name)
    return problems


def tables(paths: Sequence[Path]) -> str:
    rows = read(paths)
    parts = []
    for device in _unique(r.device for r in rows):
        for op, mode in _unique((r.op, r.mode) for r in rows if r.device == device):
            some = [r for r in rows if (r.device, r.op, r.mode) == (device, op, mode)]
            parts.append(f"### {op}, {mode}, {device}: ms\n\n" + _by_model(
                some, lambda r: significant(1e3 * (r.median or 0)),
                _unique(r.contender for r in some),
            ))  # fmt: skip
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="print tables of these rows")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pages", type=Path, nargs="+", help="instead of README and docs/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    if options.files:
        print(tables(options.files))
        return 0
    texts = options.pages or pages()
    if options.check:
        problems = stale(texts, options.results)
        for name in problems:
            print(f"{name} is not made from the rows in {options.results}: run bench/report.py")
        return 1 if problems else 0
    data = Data(options.results)
    filled = 0
    for path in texts:
        text = path.read_text(encoding="utf-8")
        filled += len(PLACE.findall(text))
        if (new := fill(text, data)) != text:
            path.write_text(new, encoding="utf-8")
    draw(data, options.results)
    print(f"{filled} places in {len(texts)} pages and {', '.join(CHARTS)}: {len(data.rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
