"""The layout of results.json, and what is computed from its records.

``results.json`` is one object:

* ``schema`` ("swa_fast.train.results"), ``schema_version`` (3; a later version may add keys
  without changing it), ``status`` ("running" or "complete"), ``preset`` (its name, or null) and
  ``scale`` (1 for none), ``changes`` (what the run does otherwise than the preset, by setting or
  "captures of METHOD": the preset's value and the run's). Since version 3 the random crops of
  ``imagenet`` are torchvision's, drawn from torch's generator; nothing else differs from version 2,
  whose files can still be read, but whose unfinished runs on ``imagenet`` cannot be continued;
* ``config``: the settings, by the names of the command-line options with underscores;
* ``environment``: versions of swa_fast, torch, cuda (null on the CPU) and python, ``device`` name,
  ``threads``, ``processes``, ``git_commit`` (null for an installed package), ``averaging_backend``;
* ``data``: numbers of images, ``image_shape`` [C, H, W], ``classes``, ``normalise``, ``mean`` and
  ``std`` per channel in pixel values 0..255, ``fraction``, ``skipped_files``, ``sha256``;
* ``peak_memory``: bytes that the first process has held at most: ``host``, and ``device``, null
  on the CPU;
* ``initial``: ``test_loss`` and ``test_accuracy`` of a pretrained network before training, or null;
* ``records``: one object per epoch of every trajectory, in the order of training: ``trajectory``,
  ``epoch`` (from 1; a trajectory that goes on from the run sgd begins later), ``lr`` of its last
  step, ``train_loss``, ``train_accuracy`` (means over the epoch's augmented batches, before each
  step), ``test_loss``, ``test_accuracy`` of the iterate; ``averages``: by method, ``captures`` (so
  far), ``test_loss``, ``test_accuracy``, ``bn_share`` (of the training batches, that the BatchNorm
  pass of this measurement saw; below 1 only for points of curves, see ``--curve-data``); and
  ``seconds`` by phase: ``data``, ``forward_backward``, ``optimizer``, ``average``, ``bn``,
  ``eval``. What was not measured in an epoch is null;
* ``summary``: the rows of the table, empty before the end: ``name``, ``method``, ``budget``,
  ``epochs``, ``captures`` (null for sgd), ``test_accuracy``, ``test_loss``, ``iterate_accuracy``
  (of the last weights of the same trajectory), ``seconds``.

Losses are mean cross-entropies in nats, accuracies percentages, times seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .config import TrainConfig
from .defaults import TITLES
from .methods import plan

#: Content of results.json.
Results = Mapping[str, Any]

RESULTS_SCHEMA = "swa_fast.train.results"
RESULTS_VERSION = 3

_TRAINING = ("data", "forward_backward", "optimizer")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


_SCORE = {"test_loss": _or_null(_number), "test_accuracy": _or_null(_number)}
# What is read of it, besides what the settings' own class checks: a key's value by a condition, by
# the keys of an object, by one form for all values of an object ("*") or for all items of a list.
_FORM: Any = {
    "status": lambda value: value in ("running", "complete"),
    "preset": _or_null(_text),
    "scale": _number,
    "config": {
        "dataset": _text, "model": _text, "width": _count, "methods": _texts, "seed": _count,
        "epochs": _count, "budgets": lambda v: isinstance(v, list) and all(map(_number, v)),
    },
    "environment": {},
    "data": {"sha256": _text},
    "initial": _or_null(lambda value: _problem(value, _SCORE, "") is None),
    "records": [
        {
            "trajectory": _text, "epoch": _count, "lr": _number, "train_loss": _number,
            "train_accuracy": _number, **_SCORE, "averages": {"*": {"captures": _count, **_SCORE}},
            "seconds": dict.fromkeys((*_TRAINING, "average", "bn", "eval"), _number),
        }
    ],
    "summary": [
        {
            "name": _text, "method": _or_null(_text), "budget": _number, "epochs": _count,
            "captures": _or_null(_count), "test_accuracy": _number, "test_loss": _number,
            "iterate_accuracy": _number, "seconds": _number,
        }
    ],
}  # fmt: skip


def problem_of(results: Mapping[str, Any]) -> str | None:
    """What of results.json is not as the layout says, or None."""
    problem = _problem(results, _FORM, "")
    if problem is None and results["status"] == "complete" and not results["summary"]:
        return "no summary, though the run is complete"
    return problem


def _problem(value: Any, form: Any, name: str) -> str | None:
    if callable(form):
        return None if form(value) else f"{name} {repr(value)[:40]}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"no list {name}"
        parts = [(item, form[0], f"{name}[{k}]") for k, item in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"no object {name}"
        if "*" in form:
            parts = [(item, form["*"], f"{name}.{key}") for key, item in value.items()]
        elif missing := sorted(set(form) - set(value)):
            return f"no {', '.join(missing)}" + (f" in {name}" if name else "")
        else:
            parts = [(value[k], f, f"{name}.{k}" if name else k) for k, f in form.items()]
    return next((p for p in (_problem(*part) for part in parts) if p is not None), None)


def summarise(results: Results) -> list[dict[str, Any]]:
    """The rows of the table: every method at every budget, from the records.

    ``seconds`` is the time of training, the part of the conventional run that the trajectory goes
    on from included, with the averaging and the BatchNorm pass of this result; neither evaluations
    nor the passes that only the curves need are counted.
    """
    rows: list[dict[str, Any]] = []
    if (initial := results["initial"]) is not None:
        rows.append(_row("pretrained", None, 0.0, 0, initial, initial, 0.0))
    by_name: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in results["records"]:
        by_name.setdefault(record["trajectory"], {})[record["epoch"]] = record
    for trajectory in plan(TrainConfig.from_json(results["config"])):
        for method, marks in trajectory.marks.items():
            for budget, epoch in marks.items():
                record = by_name[trajectory.name][epoch]
                found = record if method == "sgd" else record["averages"].get(method)
                if found is None:
                    continue  # FGE's members were not always averaged
                before = [r for e, r in by_name.get("sgd", {}).items() if e <= trajectory.begin]
                own = [r for e, r in by_name[trajectory.name].items() if e <= epoch]
                seconds = sum(r["seconds"][phase] for r in before + own for phase in _TRAINING)
                if method != "sgd":
                    # What the conventional run averaged is another method's.
                    seconds += sum(r["seconds"]["average"] for r in own)
                    seconds += record["seconds"]["bn"]
                name = TITLES[method] + (f", {budget:g} budgets" if budget != 1.0 else "")
                rows.append(_row(name, method, budget, epoch, found, record, seconds))
    return rows


def _row(
    name: str,
    method: str | None,
    budget: float,
    epochs: int,
    found: Mapping[str, Any],
    iterate: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "budget": budget,
        "epochs": epochs,
        "captures": found.get("captures"),
        "test_accuracy": found["test_accuracy"],
        "test_loss": found["test_loss"],
        "iterate_accuracy": iterate["test_accuracy"],
        "seconds": seconds,
    }


def overhead(records: Iterable[Mapping[str, Any]], reported: frozenset[int]) -> float:
    """Share of a trajectory's training time that goes into averaging: captures, and the BatchNorm
    passes of the epochs whose results are reported. Passes for the curves do not count."""
    training = averaging = 0.0
    for record in records:
        seconds = record["seconds"]
        training += sum(seconds[phase] for phase in _TRAINING)
        averaging += seconds["average"] + (seconds["bn"] if record["epoch"] in reported else 0.0)
    return averaging / (training + averaging) if training + averaging > 0 else 0.0
