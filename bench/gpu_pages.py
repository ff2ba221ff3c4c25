"""Pages of a GPU report: Markdown for reading and pasting, HTML with charts, JSON for programs."""

from __future__ import annotations

import html
import io
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import predict
from report import markdown, significant
from rows import OURS

__all__ = ["compared", "markdown_page", "summary", "write"]

DEVICE_MODES = ("graph cold", "queued cold")
FAR = 0.25  # a measured time that is off by more from its prediction is marked
SHOWN = 40  # lines of the table of predictions
Rows = Sequence[dict[str, Any]]


def _us(seconds: float | None) -> str:
    return "" if seconds is None else significant(1e6 * seconds)


def _fact(data: dict[str, Any], name: str) -> Any:
    for step in data["steps"]:
        for fact in step["facts"]:
            if fact["name"] == name:
                return fact["value"]
    return None


def gpu_name(data: dict[str, Any]) -> str:
    return str(_fact(data, "device") or "unknown")


# --------------------------------------------------------------------------------- predictions


def compared(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured beside predicted times of this GPU, the worst ratio first."""
    expected = predict.load()
    machine = predict.machine_of(gpu_name(data))
    if machine is None or data["rehearsal"]:
        return []
    found = []
    for row in data["rows"]:
        times = expected.get(predict.key(row))
        if row["median"] is None or times is None:
            continue
        ratio = row["median"] / times[machine]
        found.append({
            "what": f"{row['op']}: {row['model']}, {row['dtype']}", "contender": row["contender"],
            "mode": row["mode"], "measured": row["median"], "predicted": times[machine],
            "ratio": ratio, "far": not 1 - FAR <= ratio <= 1 + FAR,
        })  # fmt: skip
    return sorted(found, key=lambda e: -max(e["ratio"], 1 / e["ratio"]))


# ------------------------------------------------------------------------------------ tables


def _groups(rows: Rows) -> list[tuple[tuple[str, str, str], list[dict[str, Any]]]]:
    keys = list(dict.fromkeys((r["op"], r["model"], r["dtype"]) for r in rows))
    return [(key, [r for r in rows if (r["op"], r["model"], r["dtype"]) == key]) for key in keys]


def _device_row(rows: Rows, contender: str) -> dict[str, Any] | None:
    mine = [r for r in rows if r["contender"] == contender]
    for mode in (*DEVICE_MODES, "pass", "host"):
        for row in mine:
            if row["mode"] == mode:
                return row
    return mine[0] if mine else None


def _share(row: dict[str, Any] | None) -> str:
    return "" if row is None or not row["limit_median"] else f"{100 / row['limit_median']:.0f} %"


def _gbs(row: dict[str, Any] | None) -> str:
    if row is None or not row["bytes"] or not row["median"]:
        return ""
    return significant(row["bytes"] / row["median"] / 1e9)


def update_table(rows: Rows) -> str:
    """One line for each contender of a case."""
    lines = []
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for name in names:
        cold = _device_row(rows, name)
        modes = {r["mode"]: r for r in rows if r["contender"] == name}
        if cold is None or cold["median"] is None:
            status = "" if cold is None else f"{cold['status']}: {cold['reason']}"
            lines.append([name, status, "", "", "", ""])
            continue
        note = "" if cold["mode"] != "queued cold" else " (not captured)"
        lines.append([
            name, _us(cold["median"]) + note, _gbs(cold), _share(cold),
            _us(modes["graph"]["median"]) if "graph" in modes else "",
            _us(modes["host"]["median"]) if "host" in modes else "",
        ])  # fmt: skip
    head = ["", "device, cold L2, us", "GB/s", "of a copy", "back to back, us", "host, us"]
    return markdown(head, lines)


def layer_table(rows: Rows) -> str:
    """One line for each shape, device time with cold caches."""
    lines = []
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for (_, model, dtype), some in _groups(rows):
        cells = []
        for name in names:
            row = _device_row(some, name)
            if row is None:
                cells.append("")
            elif row["median"] is None:
                cells.append(row["status"])
            else:
                cells.append(_us(row["median"]) + (f" ({_share(row)})" if _share(row) else ""))
        lines.append([f"{model}, {dtype}", *cells])
    return markdown(["", *names], lines)


def pass_table(rows: Rows) -> str:
    lines = []
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for (_, model, dtype), some in _groups(rows):
        cells = []
        for name in names:
            row = _device_row(some, name)
            cells.append(
                "" if row is None else row["status"] if row["median"] is None
                else significant(1e3 * row["median"])
            )  # fmt: skip
        lines.append([f"{model}, {dtype}", *cells])
    return markdown(["ms a batch", *names], lines)


def _facts_table(step: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return significant(value, 4) if abs(value) >= 1e-12 else "0"
        return "" if value is None else str(value).replace("|", "/")

    return markdown(
        ["", "", ""],
        [[f["name"], f"{text(f['value'])} {f['unit']}".strip(), f["note"]] for f in step["facts"]],
    )


def _ncu_table(step: dict[str, Any]) -> str:
    columns = ["us", "dram %", "occupancy %", "registers", "blocks", "first stall"]
    lines = []
    for entry in step["ncu"]:
        cells = []
        for column in columns:
            value = entry[column]
            cells.append(
                "" if value is None else value if isinstance(value, str) else significant(value)
            )
        lines.append([entry["kernel"][:90].replace("|", "/"), *cells])
    return markdown(["kernel", *columns], lines)


def _prediction_table(found: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["", "", "mode", "measured, us", "predicted, us", "measured / predicted"],
        [
            [e["what"], e["contender"], e["mode"], _us(e["measured"]), _us(e["predicted"]),
             f"{e['ratio']:.2f}" + (" **" if e["far"] else "")]
            for e in found
        ],
    )  # fmt: skip


def summary(data: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{gpu_name(data)}, torch {_fact(data, 'torch')}"]
    for step in data["steps"]:
        lines.append(
            f"  {step['name']}  {step['status']:12} {step['seconds']:6.1f} s  {step['title']}"
        )
    found = compared(data)
    if found:
        far = [e for e in found if e["far"]]
        lines.append(
            f"  {len(found)} times predicted, {len(far)} off by more than {100 * FAR:.0f} %; "
            f"median ratio {statistics.median(e['ratio'] for e in found):.2f}"
        )
    return "\n".join(lines)


def _sections(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles and Markdown."""
    rows = data["rows"]
    sections = []
    if data["rehearsal"]:
        sections.append(("A rehearsal", "Every step at its smallest size. Times mean nothing.\n"))
    sections.append((
        "Steps",
        markdown(["", "step", "status", "seconds", "allowed"], [
            [s["name"], s["title"], s["status"], f"{s['seconds']:.1f}", f"{s['allowed']:.1f}"]
            for s in data["steps"]
        ]),
    ))  # fmt: skip
    remarks = [f"* {s['name']}: {r}" for s in data["steps"] for r in s["remarks"]]
    if remarks:
        sections.append(("Remarks", "\n".join(remarks) + "\n"))
    found = compared(data)
    if found:
        text = (
            "Predictions were written before the first run (bench/predictions.json, explained in "
            "bench/PREDICTIONS.md). ** marks what is off by more than 25 %.\n\n"
        )
        shown = found[:SHOWN]
        if len(found) > len(shown):
            text += (
                f"The {len(shown)} that are furthest off, of {len(found)}, of which "
                f"{sum(e['far'] for e in found)} are marked; all are in report.json.\n\n"
            )
        sections.append(("Measured against predicted", text + _prediction_table(shown)))
    for step in data["steps"]:
        parts = []
        if step["facts"]:
            parts.append(_facts_table(step))
        mine = [r for r in rows if r["step"] == step["name"]]
        passes = [r for r in mine if r["mode"] == "pass"]
        if passes:
            parts.append("**update_bn**\n\n" + pass_table(passes))
        layers = [r for r in mine if r["op"].startswith("BN ")]
        for op in dict.fromkeys(r["op"] for r in layers):
            parts.append(
                f"**{op}**, device time with cold L2 in us, and the share of the copy limit\n\n"
                + layer_table([r for r in layers if r["op"] == op])
            )
        for (op, model, dtype), some in _groups(
            [r for r in mine if r not in layers and r not in passes]
        ):
            first = some[0]
            parts.append(
                f"**{op}: {model}, {dtype}** ({first['parameters']:,} elements, "
                f"{first['tensors']:,} tensors)\n\n" + update_table(some)
            )
        if step["ncu"]:
            parts.append("**ncu**\n\n" + _ncu_table(step))
        if parts:
            sections.append((f"{step['name']}. {step['title']}", "\n".join(parts)))
    return sections


def markdown_page(data: dict[str, Any]) -> str:
    head = (
        f"# swa_fast on {gpu_name(data)}\n\n{data['started']}, swa_fast "
        f"{_fact(data, 'swa_fast')} at commit {_fact(data, 'commit') or 'unknown'}, torch "
        f"{_fact(data, 'torch')}, Triton {_fact(data, 'triton')}, driver "
        f"{_fact(data, 'driver_version') or 'unknown'}.\n\n"
        "`device` is the time between two events around one replay of a captured graph after other "
        "memory has filled the caches, `back to back` that of one call among sixteen in a graph, "
        "`host` that of the call on an idle device. Medians of shuffled rounds.\n\n"
    )
    return head + "\n".join(f"## {title}\n\n{text}" for title, text in _sections(data))


# ------------------------------------------------------------------------------------- charts


def _charts(data: dict[str, Any]) -> list[str]:
    """SVG pictures; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = []

    def keep(figure: Any) -> None:
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        pictures.append(text.getvalue()[text.getvalue().index("<svg") :])

    rows = [r for r in data["rows"] if r["median"] and r["step"] == "c"]
    for op in ("update",):
        some = [r for r in rows if r["op"] == op and r["mode"] in DEVICE_MODES]
        models = list(dict.fromkeys(r["model"] for r in some))
        names = list(dict.fromkeys(r["contender"] for r in some))
        if not models:
            continue
        figure, axes = plt.subplots(figsize=(11, 4.5))
        width = 0.85 / len(names)
        for index, name in enumerate(names):
            shown = [(models.index(r["model"]), r) for r in some if r["contender"] == name]
            axes.bar(
                [place + index * width for place, _ in shown],
                [1e6 * r["median"] for _, r in shown], width, label=name,
                hatch="//" if shown[0][1]["side"] != OURS else None,
            )  # fmt: skip
        axes.set_xticks([i + 0.42 for i in range(len(models))], models, fontsize=8)
        axes.set(yscale="log", ylabel="us", title=f"{op}: device time, cold L2, {gpu_name(data)}")
        axes.legend(fontsize=7, ncols=2)
        axes.grid(True, axis="y", alpha=0.3)
        keep(figure)
    shares = [
        r for r in data["rows"]
        if r["side"] == OURS and r["mode"] == "graph cold" and r["limit_median"]
    ]  # fmt: skip
    if shares:
        figure, axes = plt.subplots(figsize=(8, 4.5))
        for op in dict.fromkeys(r["op"] for r in shares):
            some = [r for r in shares if r["op"] == op]
            axes.scatter(
                [r["bytes"] / 1e6 for r in some], [100 / r["limit_median"] for r in some], s=14,
                label=op,
            )  # fmt: skip
        axes.set(
            xscale="log", xlabel="MB moved at least", ylabel="% of the copy limit",
            title="share of what a large copy reaches",
        )  # fmt: skip
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=7)
        keep(figure)
    found = compared(data)
    if found:
        figure, axes = plt.subplots(figsize=(5.5, 5))
        axes.scatter([1e6 * e["predicted"] for e in found], [1e6 * e["measured"] for e in found],
                     s=12)  # fmt: skip
        ends = [1e6 * min(e["predicted"] for e in found), 1e6 * max(e["predicted"] for e in found)]
        axes.plot(ends, ends, "k--", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="predicted, us", ylabel="measured, us",
                 title="measured against predicted")  # fmt: skip
        axes.grid(True, alpha=0.3)
        keep(figure)
    return pictures


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 0.6em 0 1.2em }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: right }
td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
"""


def _html_of(text: str) -> str:
    """HTML for the Markdown that is written here: tables, bold lines, bullets and paragraphs."""
    out: list[str] = []
    lines = text.split("\n")
    index = 0
    while index < len(lines):
        line = lines[index]
        if line.startswith("|"):
            table = []
            while index < len(lines) and lines[index].startswith("|"):
                table.append([cell.strip() for cell in lines[index].strip("|").split("|")])
                index += 1
            out.append("<table>")
            for number, cells in enumerate(table):
                if number == 1:
                    continue
                tag = "th" if number == 0 else "td"
                out.append("<tr>" + "".join(
                    f"<{tag}>{html.escape(c).replace('**', '&#9664;')}</{tag}>" for c in cells
                ) + "</tr>")  # fmt: skip
            out.append("</table>")
            continue
        if line.startswith("* "):
            out.append(f"<li>{html.escape(line[2:])}</li>")
        elif line.startswith("**"):
            bold, _, rest = line[2:].partition("**")
            out.append(f"<h3>{html.escape(bold)}{html.escape(rest)}</h3>")
        elif line:
            out.append(f"<p>{html.escape(line)}</p>")
        index += 1
    return "\n".join(out)


def html_page(data: dict[str, Any]) -> str:
    body = "".join(
        f"<h2>{html.escape(title)}</h2>\n{_html_of(text)}\n" for title, text in _sections(data)
    )
    title = f"swa_fast on {html.escape(gpu_name(data))}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1><p>{html.escape(data['started'])}</p>"
        f"{''.join(_charts(data))}{body}</html>\n"
    )


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write(out: Path, data: dict[str, Any]) -> None:
    """Replaces the three pages in a folder, each at once."""
    whole = {**data, "predictions": compared(data)}
    _replace(out / "report.json", json.dumps(whole, indent=1) + "\n")
    _replace(out / "report.md", markdown_page(data))
    _replace(out / "report.html", html_page(data))
