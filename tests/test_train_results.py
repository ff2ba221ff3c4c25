"""Records of results.json, and what is computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train_runs import ALL, EPOCHS, FIRST, PARTS, STEPS, records

from swa_fast.schedules import paper_lr, paper_swa_lr
from swa_fast.train.config import TrainConfig
from swa_fast.train.report import format_phases, format_table
from swa_fast.train.results import overhead, summarise

pytestmark = pytest.mark.usefixtures("small")


def test_records(finished: Path) -> None:
    config = TrainConfig.from_options(ALL)
    found = records(finished)
    assert [(r["trajectory"], r["epoch"]) for r in found] == [
        (name, epoch) for name, epochs in PARTS.items() for epoch in epochs
    ]
    captures = {
        "ema": {e: e * STEPS for e in range(1, 5)},
        "swa": {3: 1, 4: 2, 5: 3, 6: 4},
        "swa-cyclic": {4: 1, 5: 1, 6: 2},
        "fge": {3: 1, 4: 1},
        "fge-average": {3: 1, 4: 1},
        "swa-fixed": {3: 1, 4: 2, 5: 3, 6: 4},
    }
    for record in found:
        epoch, name = record["epoch"], record["trajectory"]
        if name == "sgd":
            expected = paper_lr(epoch - 1, lr=config.lr, total=EPOCHS, final_lr=0.01 * config.lr)
        elif name == "swa":
            expected = paper_swa_lr(epoch - 1, lr=config.lr, swa_lr=config.swa_lr, start=FIRST)
        elif name == "swa-cyclic":
            # The second of two steps, in the first or the second epoch of two.
            expected = {1: 0.5 * (0.05 + 0.0005), 0: 0.0005}[epoch % 2]
        elif name == "fge":
            # t = 1/4 in the first epoch of two, 3/4 in the second.
            expected = 0.5 * (0.05 + 0.0005)
        else:
            expected = config.fixed_lr
        assert record["lr"] == pytest.approx(expected, rel=1e-12), record
        for method, average in record["averages"].items():
            assert average["captures"] == captures[method].get(epoch, 0)
            if method == "swa-cyclic" and epoch == 5:
                assert average["test_accuracy"] is None  # as it was an epoch before
            else:
                assert (average["test_accuracy"] is not None) == (average["captures"] > 0)
        assert 0 <= record["test_accuracy"] <= 100
        assert record["train_loss"] > 0
    # Same weights, same batches, same rate: the first epochs of both runs are one.
    first = [r["train_loss"] for r in found if r["epoch"] == 1 and r["trajectory"] != "swa-fixed"]
    assert len(first) == 2 and first[0] == first[1]


def test_summary_and_tables(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    by_key = {(r["trajectory"], r["epoch"]): r for r in results["records"]}
    rows = results["summary"]
    assert [(r["method"], r["budget"], r["epochs"], r["captures"]) for r in rows] == [
        ("sgd", 1.0, 4, None),
        ("ema", 1.0, 4, 8),
        ("swa", 1.0, 4, 2),
        ("swa", 1.5, 6, 4),
        ("swa-cyclic", 1.0, 4, 1),
        ("swa-cyclic", 1.5, 6, 2),
        ("fge", 1.0, 4, 1),
        ("fge-average", 1.0, 4, 1),
        ("swa-fixed", 1.0, 4, 2),
        ("swa-fixed", 1.5, 6, 4),
    ]
    for row in rows:
        method = row["method"]
        trajectory = {"ema": "sgd", "fge-average": "fge"}.get(method, method)
        record = by_key[trajectory, row["epochs"]]
        source = record if method == "sgd" else record["averages"][method]
        assert row["test_accuracy"] == source["test_accuracy"]
        assert row["test_loss"] == source["test_loss"]
        assert row["iterate_accuracy"] == record["test_accuracy"]
    table = format_table(rows).splitlines()
    assert [line.split("  ")[0] for line in table[2:6]] == ["SGD", "EMA", "SWA", "SWA, 1.5 budgets"]
    assert f"{rows[3]['test_accuracy']:.2f} %" in table[5]
    assert summarise(results) == rows
    # A trajectory that goes on from the conventional run has cost that part of it too.
    shared = sum(
        by_key["sgd", e]["seconds"][p]
        for e in (1, 2)
        for p in ("data", "forward_backward", "optimizer")
    )
    cyclic = [by_key["swa-cyclic", e]["seconds"] for e in (3, 4)]
    own = sum(
        seconds[phase]
        for seconds in cyclic
        for phase in ("data", "forward_backward", "optimizer", "average")
    )
    assert rows[4]["seconds"] == pytest.approx(shared + own + cyclic[-1]["bn"])
    assert by_key["sgd", 1]["seconds"]["average"] > 0  # of the method ema, which does not count
    # SWA's own run: its captures, and of the BatchNorm passes the last one.
    spent = [by_key["swa", e]["seconds"] for e in range(1, 7)]
    training = sum(s[p] for s in spent for p in ("data", "forward_backward", "optimizer"))
    averaging = sum(s["average"] for s in spent) + spent[-1]["bn"]
    assert rows[3]["seconds"] == pytest.approx(training + averaging)
    phases = format_phases(results)
    assert "forward/backward" in phases and phases.count("100.0 %") == len(PARTS)


def test_overhead_counts_captures_and_the_passes_of_results() -> None:
    def record(epoch: int, average: float, bn: float) -> dict[str, Any]:
        seconds = {"data": 1, "forward_backward": 7, "optimizer": 1, "average": average, "bn": bn}
        return {"epoch": epoch, "seconds": {**seconds, "eval": 50}}

    found = [record(1, 0.0, 5.0), record(2, 0.5, 1.5)]
    assert overhead(found, frozenset({2})) == pytest.approx(2 / 20)
    assert overhead([], frozenset()) == 0
