"""The GPU report: its supervisor, its pages, its predictions. Nothing here measures time, and only
the last test needs a device."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import swa_fast
from swa_fast.train.models import PreResNet

BENCH = Path(__file__).resolve().parent.parent / "bench"
if not (BENCH / "gpu_report.py").exists():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
NAMES = (
    "rows", "harness", "gpu_report", "gpu_steps", "gpu_cases", "gpu_pages", "predict",
    "bench_combine",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    before = set(sys.modules)
    try:
        modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in NAMES}
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(BENCH))
        for name in set(sys.modules) - before:
            if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def row(bench: Any, **columns: Any) -> dict[str, Any]:
    base = {
        "op": "update", "contender": "Averager SWA", "side": bench.rows.OURS, "model": "ResNet-50",
        "parameters": 100, "tensors": 2, "dtype": "float32", "mode": "graph cold",
        "device": "NVIDIA H100 80GB HBM3", "threads": 1, "clock": "events", "torch": "2",
        "commit": "c", "date": "2026-01-01", "status": "ok", "rounds": 3, "q1": 1e-4,
        "median": 1e-4, "q3": 1e-4, "bytes": 300, "limit_median": 1.25,
    }  # fmt: skip
    return dataclasses.asdict(bench.rows.Row(**{**base, **columns}))


# -------------------------------------------------------------------------------- the supervisor


class Script:
    """A worker that says what it is told to: for each step a list of replies, of which None is the
    end of its process and an exception one that reaches the supervisor. After them it is silent."""

    replies: ClassVar[dict[str, list[Any]]] = {}
    started = 0
    ended = 0

    def __init__(self, device: str, small: bool, log: Any) -> None:
        type(self).started += 1
        self._now: list[Any] = []

    def order(self, message: dict[str, Any]) -> None:
        self._now = list(self.replies.get(message["step"], [{"done": True, "copy_bandwidth": 5.0}]))

    def messages(self, timeout: float) -> list[dict[str, Any]] | None:
        if not self._now:
            time.sleep(min(0.05, max(0.0, timeout)))
            return []
        reply = self._now.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return None if reply is None else [reply]

    def end(self) -> int:
        type(self).ended += 1
        return -9


@pytest.fixture
def script(bench: Any, monkeypatch: pytest.MonkeyPatch) -> type[Script]:
    worker = type("Worker", (Script,), {"replies": {}, "started": 0, "ended": 0})
    monkeypatch.setattr(bench.gpu_report, "Worker", worker)
    monkeypatch.setattr(bench.gpu_report, "GRACE", 0.2)
    return worker


def options(out: Path, **changes: Any) -> Any:
    given = {"out": out, "minutes": 1.0, "rehearse": False, "device": "cuda", "steps": None}
    return SimpleNamespace(**{**given, **changes})


def statuses(out: Path) -> dict[str, str]:
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {step["name"]: step["status"] for step in data["steps"]}


def test_a_step_that_fails_or_dies_does_not_stop_the_others(
    bench: Any, script: type[Script], tmp_path: Path
) -> None:
    done = {"done": True, "copy_bandwidth": 5.0}
    script.replies = {
        "a": [{"row": row(bench)}, {"failed": "ValueError: no"}, done],
        "b": [{"fact": "n", "value": 1.5, "unit": "us", "note": ""}, None],
    }
    assert bench.gpu_report.run(options(tmp_path)) == 0
    assert statuses(tmp_path) == {"a": "failed", "b": "failed", **dict.fromkeys("cdefg", "done")}
    assert script.started == 2  # the process that died was replaced, and only that one
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["schema"] == "swa_fast.gpu_report" and data["complete"]
    assert "ValueError: no" in data["steps"][0]["remarks"]
    assert "ended with -9" in data["steps"][1]["remarks"][0]
    assert data["steps"][1]["facts"] == [{"name": "n", "value": 1.5, "unit": "us", "note": ""}]
    assert [r.model for r in bench.rows.read([tmp_path / "rows.csv"])] == ["ResNet-50"]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"rows.csv", "report.json", "report.md", "report.html", "log.txt"}


def test_a_step_that_overruns_is_ended_and_the_next_one_has_its_time(
    bench: Any, script: type[Script], tmp_path: Path
) -> None:
    script.replies = {"a": [{"row": row(bench)}]}
    assert bench.gpu_report.run(options(tmp_path, minutes=0.04, steps="ab")) == 0
    assert statuses(tmp_path)["a"] == "overran"
    assert script.ended == script.started  # no process is left behind
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(data["rows"]) == 1


def test_an_interruption_leaves_what_was_measured(
    bench: Any, script: type[Script], tmp_path: Path
) -> None:
    script.replies = {"b": [{"row": row(bench)}, KeyboardInterrupt()]}
    assert bench.gpu_report.run(options(tmp_path)) == 130
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not data["complete"] and len(data["rows"]) == 1
    assert statuses(tmp_path)["a"] == "done" and statuses(tmp_path)["c"] == "not reached"
    assert script.ended == 1


def test_wrong_results_of_ours_are_an_error(
    bench: Any, script: type[Script], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = row(bench, status="wrong", reason="off by 1", median=None, q1=None, q3=None)
    script.replies = {"c": [{"row": wrong}, {"done": True, "copy_bandwidth": None}]}
    assert bench.gpu_report.run(options(tmp_path)) == 1
    assert "off by 1" in capsys.readouterr().out


def test_the_worker_reports_a_failure_and_takes_the_next_order(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: Any) -> None:
        context.fact("before", 1)
        raise RuntimeError("first line\nsecond line")

    def sound(context: Any) -> None:
        assert 0 < context.left() <= 3 and context.copy_bandwidth == 7.0

    step = bench.gpu_steps.Step
    monkeypatch.setattr(
        bench.gpu_steps, "STEPS", (step("x", "", 1.0, broken), step("y", "", 1.0, sound))
    )
    orders = [{"step": s, "seconds": 3.0, "copy_bandwidth": 7.0} for s in "xy"]
    monkeypatch.setattr(sys, "stdin", [json.dumps(order) + "\n" for order in orders])
    read, write = os.pipe()
    assert bench.gpu_report.work("cpu", True, write) == 0
    with os.fdopen(read) as file:
        found = [json.loads(line) for line in file]
    assert found[0]["fact"] == "before"
    assert found[1] == {"failed": "RuntimeError: first line"}
    assert [m for m in found if "done" in m] == 2 * [{"done": True, "copy_bandwidth": 7.0}]
    assert len(found) == 4


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "positive"),
        (["--steps", "az"], "'z'"),
        (["--device", "cpu"], "--rehearse"),
    ],
)
def test_bad_options_are_named(
    bench: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.gpu_report.main(arguments)
    assert message in capsys.readouterr().err


def refused(bench: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert bench.gpu_report.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out
    return str(said.err)


def test_what_is_missing_is_said_in_one_line(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 1).\nmore")

    folder = str(tmp_path / "out")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refused(bench, capsys, "--out", folder)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert "too old (found version 1)" in refused(bench, capsys, "--out", folder)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    assert "1.0 of 80.0 GiB are free" in refused(bench, capsys, "--out", folder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(bench, capsys, "--out", str(tmp_path / "file" / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unbuilt_checkout_is_no_package(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "neither installed nor built" in refused(bench, capsys)
    assert str(tmp_path) not in sys.path


# ----------------------------------------------------------------------------------------- pages


def page(bench: Any, **changes: Any) -> dict[str, Any]:
    facts = [{"name": "device", "value": "NVIDIA H100 80GB HBM3", "unit": "", "note": ""}]
    steps = [
        {"name": s.name, "title": s.title, "status": "done", "seconds": 1.0, "allowed": 2.0,
         "remarks": [], "facts": facts if s.name == "a" else [], "ncu": []}
        for s in bench.gpu_steps.STEPS
    ]  # fmt: skip
    return {
        "started": "now",
        "rehearsal": False,
        "steps": steps,
        "rows": [],
        "minutes": 8,
        **changes,
    }


def test_what_is_far_from_its_prediction_is_marked(bench: Any) -> None:
    expected = bench.predict.load()
    names = ["Averager SWA", "Averager SWA, triton"]
    times = [expected[bench.predict.key(row(bench, contender=n))]["H100"] for n in names]
    rows = [
        {"step": "c", **row(bench, contender=names[0], median=1.5 * times[0])},
        {"step": "c", **row(bench, contender=names[1], median=1.2 * times[1])},
        {"step": "c", **row(bench, contender="not predicted")},
    ]
    found = bench.gpu_pages.compared(page(bench, rows=rows))
    assert [(e["contender"], e["far"]) for e in found] == [(names[0], True), (names[1], False)]
    text = bench.gpu_pages.markdown_page(page(bench, rows=rows))
    assert "1.50 **" in text and "1.20 |" in text and "80 %" in text
    # A rehearsal's times are not compared, nor those of a machine that nothing was predicted for.
    assert bench.gpu_pages.compared(page(bench, rows=rows, rehearsal=True)) == []


def test_the_html_page_needs_nothing_else(bench: Any) -> None:
    rows = [{"step": "c", **row(bench)}, {"step": "d", **row(bench, op="BN layer")},
            {"step": "d", **row(bench, op="update_bn, a batch", mode="pass")},
            {"step": "c", **row(bench, contender="<b>", median=None, status="wrong",
                                reason="x")}]  # fmt: skip
    text = bench.gpu_pages.html_page(page(bench, rows=rows))
    assert text.count("<svg") == 3 and "<b>" not in text and "&lt;b&gt;" in text
    assert "src=" not in text and "<link" not in text
    assert text.count("<table>") == text.count("</table>") >= 5


NCU = """==PROF== Connected
"ID","Kernel Name","launch__registers_per_thread","gpu__time_duration.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
"","","register/thread","us","%","inst","inst","inst"
"0","update_kernel","64","101.5","88.25","12.5","3.5","99"
"""


def test_ncu_tables_are_read(bench: Any) -> None:
    (found,) = bench.gpu_steps.parse_ncu(NCU)
    assert found["kernel"] == "update_kernel" and found["registers"] == 64
    assert found["dram %"] == 88.25 and found["us"] == 101.5
    assert found["first stall"] == "long_scoreboard"
    assert found["blocks"] is None
    with pytest.raises(ValueError, match="no table"):
        bench.gpu_steps.parse_ncu("==ERROR== no permission")


# ----------------------------------------------------------------------------------- predictions


def test_the_terms_of_the_model(bench: Any) -> None:
    machine = bench.predict.Machine(100, 1e12, 1 << 20, 4e12, 1e-6, 1e-7)
    launch = bench.predict.Launch(
        read=9 << 20, written=0, blocks=200, resident=2, in_flight=1 << 16, chain=2.0
    )
    fixed = bench.predict.COLD_START

    def seconds(**changes: Any) -> float:
        changed = dataclasses.replace(launch, **changes)
        return float(bench.predict.seconds(machine, changed, "graph cold")) - fixed

    assert seconds() == pytest.approx((9 << 20) / 0.9e12)  # bytes
    # Little's law: what is asked for at a time, over the latency.
    assert seconds(in_flight=1 << 10) == pytest.approx((9 << 20) * 1e-6 / (200 << 10))
    # Waves of blocks that wait for two loads and then for their data.
    assert seconds(blocks=2001) == pytest.approx(11 * (2 * 1e-7 + 1e-6))
    assert seconds(tail=5.0) == pytest.approx(seconds() + 5 * 1e-7)
    small = dataclasses.replace(launch, read=1 << 19)
    warm = bench.predict.seconds(machine, small, "graph") - bench.predict.GAP
    assert warm == pytest.approx(max((1 << 19) / 4e12, 2 * 1e-7 + 1e-7))


def test_pieces_are_those_of_the_engine(bench: Any) -> None:
    predict = bench.predict
    # 4096 + 4096 + 1 elements of 4 bytes, 513 and 512 of them, nothing, eight of one.
    tensors = [(n, 4) for n in (8193, 513, 512, 0, *[1] * 8)]
    assert predict.pieces(tensors, "cuda") == (3 + 1 + 1 + 8, 2 + 1 + 2)
    assert predict.pieces(tensors, "triton") == (3 + 1 + 1 + 8, 3 + 1 + 1 + 8)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_model_has_as_many_blocks_as_the_kernels(
    bench: Any, simulator: Any, backend: str
) -> None:
    def launched(run: Any) -> dict[str, int]:
        simulator.reset()
        run()
        return {name: c["blocks"] for name, c in simulator.counters()["kernels"].items()}

    for shape, layout, dtype in (
        ((64, 24, 14, 14), "contiguous", torch.bfloat16),
        ((20, 64, 40, 25), "channels_last", torch.bfloat16),
        ((20, 96, 14, 14), "channels_last", torch.bfloat16),
        ((16, 130, 9, 8), "channels_last", torch.float32),
        ((8, 552, 4, 4), "channels_last", torch.bfloat16),
    ):
        inputs = bench.gpu_cases._inputs(shape, layout, dtype, torch.device("cuda"))
        found = launched(bench.gpu_cases._collect(True, backend, inputs).run)
        size, last = dtype.itemsize, layout == "channels_last"
        expected = bench.predict.batch_norm_launches(shape, size, last, True, backend)
        for name, launch in zip(("statistics", "normalise"), expected, strict=True):
            (blocks,) = (n for kernel, n in found.items() if name in kernel)
            assert blocks == launch.blocks, (shape, layout, name)
    model = PreResNet(20).cuda()
    averager = swa_fast.Averager(model, {"swa": swa_fast.SWA()}, backend=backend)
    averager.update()
    (blocks,) = launched(averager.update).values()
    launch = bench.predict.update_launch(
        [p.numel() for p in model.parameters()],
        [b.numel() * b.element_size() for b in model.buffers()],
        4, 4, 1, backend,
    )  # fmt: skip
    assert blocks == launch.blocks


def test_predictions_come_with_what_they_were_off_by(bench: Any, tmp_path: Path) -> None:
    predict = bench.predict
    entries = [
        {"what": "update: m, float32", "contender": "Averager SWA", "measured": m, "predicted": 2.0}
        for m in range(1, 12)
    ]
    entries.append(entries[0] | {"contender": "Averager SWA, triton"})
    entries.append(entries[0] | {"contender": "Averager SWA, triton", "measured": 2.0})
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"predictions": entries}), encoding="utf-8")
    found = predict.spreads(path)
    assert found["updates", "CUDA"] == predict.Spread(1.0, 3.0, 5.0, 11)
    assert found["updates", "Triton"].median == 0.75
    # All kinds of kernels that are predicted, in the file that explains the model.
    kinds = {"updates", "BatchNorm, contiguous", "BatchNorm, channels-last"}
    assert set(predict.spreads()) == {(k, b) for k in kinds for b in ("CUDA", "Triton")}
    assert predict.uncertainty() in (BENCH / "PREDICTIONS.md").read_text(encoding="utf-8")


def test_the_model_is_asked_about_cases_that_it_knows(bench: Any) -> None:
    (case,) = (
        c for c in bench.gpu_cases.update_cases(torch.device("meta"), small=False)
        if c.op == "update" and c.model == "PreResNet-164"
    )  # fmt: skip
    shared = case.make()
    predict = bench.predict
    row = {"op": "update", "model": case.model, "dtype": case.dtype, "mode": "graph"}
    for name in ("Averager SWA", "Averager SWA, triton"):
        found = predict.expected(case, name, shared, "H100")
        assert found == pytest.approx(
            predict.load()[predict.key(row | {"contender": name})]["H100"], rel=5e-3
        )
    assert predict.expected(case, "torch AveragedModel", shared, "H100") is None
    # Buffers of PreResNet-164 are half of its tensors.
    without = predict.launches_of(case, "Averager EMA, no buffers", shared)[0]
    assert without.blocks < predict.launches_of(case, "Averager EMA", shared)[0].blocks


def test_the_predictions_are_those_of_the_model(bench: Any) -> None:
    """There is one for every case and contender of ours that the report times."""
    assert bench.predict.predictions() == bench.predict.load()
    machines = set(bench.predict.MACHINES)
    assert machines == {"A100", "H100", "H200", "B200"}
    assert all(set(times) == machines for times in bench.predict.load().values())
    assert bench.predict.machine_of("NVIDIA H100 80GB HBM3") == "H100"
    assert bench.predict.machine_of("Tesla T4") is None


# --------------------------------------------------------------------------------- one rehearsal


@pytest.mark.gpu
def test_checks_and_times_of_a_case(bench: Any) -> None:
    """On whatever device there is; the whole rehearsal is a command of its own."""
    found: list[dict[str, Any]] = []
    device = torch.device("cuda")
    context = bench.gpu_steps.Context(device, True, found.append, time.monotonic() + 60, 1e12)
    (update,) = [
        c for c in bench.gpu_cases.update_cases(device, True)
        if c.op == "update of 3 averages"
    ]  # fmt: skip
    for case in (update, bench.bench_combine.case_of("494 in 494 tensors", device)):
        found.clear()
        bench.gpu_steps.measure(context, case, 0.1)
        rows = [message["row"] for message in found]
        assert {r["status"] for r in rows} == {"ok"}, rows
        assert all(r["limit_median"] for r in rows if r["mode"] == "graph cold")
        modes = {(r["contender"], r["mode"]) for r in rows}
        expected = {(n, m) for n in case.contenders for m in ("host", "graph", "graph cold")}
        assert expected <= modes


def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable, str(BENCH / "gpu_report.py"), "--rehearse", "--device", "cpu", "--steps",
        "ae", "--out", str(tmp_path),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert statuses(tmp_path)["a"] == statuses(tmp_path)["e"] == "done"
    assert "A rehearsal" in (tmp_path / "report.md").read_text(encoding="utf-8")
