"""One HTML page of a run, which needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..train.errors import TrainError
from ..train.files import write_atomically
from ..train.report import format_phases, format_table
from ..train.run_folder import RunFolder

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .82rem; }
table { border-collapse: collapse; font-size: .85rem; }
td { border-bottom: 1px solid #ddd; padding: .15rem .8rem .15rem 0; vertical-align: top; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .85rem; }
"""


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes ``report.html`` of a finished run: its table, where the time went, its curves, the
    figures of ``swa-fast analyze`` that lie in ``out`` or below the run, settings and environment.

    Args:
        run: its folder.
        out: folder of the page; None is the run's.

    Raises:
        TrainError: no finished run, or a folder that cannot be written.
    """
    folder = RunFolder(run)
    results = folder.read_results()
    if results["status"] != "complete":
        raise TrainError(f"{folder.path}: expected a finished run, found one that is not complete")
    where = folder.path if out is None else Path(out)
    config = results["config"]
    title = f"{config['model']} on {config['dataset']}, seed {config['seed']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _text("Results", format_table(results["summary"])),
        _images(folder.path, where),
        _text("Time", format_phases(results)),
        _rows("Settings", config),
        _rows("Data", results["data"]),
        _rows("Environment", results["environment"]),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = where / "report.html"
    try:
        where.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise TrainError(
            f"--out: expected a folder that can be written, found {where} ({error})"
        ) from error
    return path


def _text(heading: str, text: str) -> str:
    return f"<h2>{heading}</h2><pre>{html.escape(text)}</pre>"


def _images(run: Path, out: Path) -> str:
    kinds = ("plane", "rays", "segment", "ensemble", "trajectory", "distances")
    found = {path.resolve(): path for path in [run / "curves.png"] if path.is_file()}
    for top in (run, out):
        for kind in kinds:
            found.update({path.resolve(): path for path in sorted(top.rglob(f"{kind}.png"))})
    figures = []
    for path in found.values():
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem)
        figures.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return "<h2>Figures</h2>" + "\n".join(figures)


def _rows(heading: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<h2>{heading}</h2><table>{rows}</table>"
