"""Greedy soups: averages of the checkpoints that a score keeps."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .averaging import AverageReport, average
from .compare import check_output_apart
from .errors import CheckpointError
from .weights import expand

__all__ = ["SoupReport", "greedy"]


@dataclass
class SoupReport:
    """What :func:`greedy` did.

    Attributes:
        scores: of each input by itself, in the order in which they were tried.
        kept: the inputs that the soup is made of.
        tried: (input, score of the soup with it, whether it was kept).
        score: of the soup.
        average: the report of the last average.
    """

    scores: dict[str, float]
    kept: list[str]
    tried: list[tuple[str, float, bool]]
    score: float
    average: AverageReport | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{score:12.6g}  {path}" for path, score in self.scores.items()]
        lines += [
            f"{score:12.6g}  with {path}: {'kept' if kept else 'left out'}"
            for path, score, kept in self.tried
        ]
        lines.append(f"{self.score:12.6g}  the soup of {len(self.kept)}")
        return "\n".join(lines + ([] if self.average is None else [str(self.average)]))


def greedy(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    evaluate: Callable[[Path], float],
    *,
    higher: bool = True,
    sort: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> SoupReport:
    """Averages those checkpoints that make the average better, best first.

    All are scored by themselves and sorted by it. Starting from the best, each in turn joins the
    average with equal weights, and stays if the score of the average is strictly better then.

    Scores are kept in a hidden file beside the output until it is there, so that the same call
    after an interruption does not ask for them again.

    Args:
        inputs, sort: see :func:`average`.
        output: see :func:`average`; where the soup will be.
        evaluate: scores a checkpoint in the form of the output, at a path that ends like it.
        higher: whether a higher score is better.
        overwrite: replace an output that is there.
        progress: show a bar for each average.
        options: others of :func:`average`, but for weights and the choice of inputs.

    Raises:
        CheckpointError: as :func:`average`, or a score that is not a number.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time", ICML 2022.
    """
    wrong = sorted({"weights", "last", "window", "every", "dry_run"} & set(options))
    if wrong:
        raise CheckpointError(f"{wrong[0]}: not together with greedy, which chooses by itself")
    target = Path(output)
    paths = expand(inputs, sort=sort)
    check_output_apart(paths, target)
    # Everything that can be wrong without reading a tensor.
    average(paths, target, dry_run=True, overwrite=overwrite, **options)
    known = _Scores(target, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    trial = scratch / target.name

    def score(members: Sequence[Path]) -> float:
        found = known.get(members)
        if found is None:
            average(members, trial, overwrite=True, progress=progress, **options)
            found = float(evaluate(trial))
            if math.isnan(found):
                raise CheckpointError(f"greedy: expected a number for {members[-1]}, found nan")
            known.put(members, found)
        return found

    sign = 1.0 if higher else -1.0
    try:
        single = {path: score([path]) for path in dict.fromkeys(paths)}
        order = sorted(single, key=lambda path: -sign * single[path])
        kept, best = order[:1], single[order[0]]
        tried = []
        for path in order[1:]:
            now = score([*kept, path])
            better = sign * now > sign * best
            tried.append((str(path), now, better))
            if better:
                kept, best = [*kept, path], now
        report = average(kept, target, overwrite=overwrite, progress=progress, **options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    known.forget()
    scores = {str(path): single[path] for path in order}
    return SoupReport(scores, [str(path) for path in kept], tried, best, report)


class _Scores:
    """Scores by what was averaged: names, sizes and times of change of the members."""

    def __init__(self, target: Path, options: dict[str, Any]) -> None:
        self._path = target.with_name(f".{target.name}.swa_fast-scores.json")
        self._options = {k: str(v) for k, v in options.items() if k != "update_bn"}
        try:
            self._known: dict[str, float] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def _key(self, members: Sequence[Path]) -> str:
        facts = []
        for path in members:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            facts += [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return json.dumps([self._options, facts])

    def get(self, members: Sequence[Path]) -> float | None:
        return self._known.get(self._key(members))

    def put(self, members: Sequence[Path], score: float) -> None:
        self._known[self._key(members)] = score
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._known), encoding="utf-8")
        os.replace(partial, self._path)

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)
