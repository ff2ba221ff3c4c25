"""The benchmarks' own arithmetic: statistics, comparison, reports, counts, kernel limits. Nothing
here measures time."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

BENCH = Path(__file__).resolve().parent.parent / "bench"
# An installed wheel is tested away from the checkout, which alone has the benchmarks.
if not (BENCH / "harness.py").exists():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
NAMES = (
    "rows", "harness", "models", "competitors", "compare", "report", "counts", "sass",
    "kernel_facts",
    "bench_average", "bench_overhead", "precise_bn_reference", "bench_low_precision",
    "bench_update_bn", "differences", "scale_plan", "bench_sharding",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmarks' modules, which are found through sys.path only while this file is tested."""
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


def row(bench: Any, times: list[float], limit: list[float] | None = None, **columns: Any) -> Any:
    """A row of ``update`` with the times of one contender beside those of the limit."""
    summary = bench.harness.summarise(
        {"ours": times, **({} if limit is None else {"limit": limit})},
        None if limit is None else "limit",
        {"ours": 1200, "limit": 1200},
    )["ours"]
    base = {
        "op": "update", "contender": "ours", "side": bench.rows.OURS, "model": "m",
        "parameters": 100, "tensors": 2, "dtype": "float32", "mode": "warm", "device": "d",
        "threads": 1, "clock": "wall", "torch": "2", "commit": "c", "date": "2026-01-01",
        "status": "ok",
    }  # fmt: skip
    return bench.rows.Row(**{**base, **summary, **columns})


# ------------------------------------------------------------------------------------ statistics


def test_quartiles(bench: Any) -> None:
    assert bench.harness.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert bench.harness.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_the_ratio_to_the_limit_is_per_byte_and_of_the_same_round(bench: Any) -> None:
    # The machine becomes ten times slower in the second round: the ratio does not notice.
    times = {"ours": [2.0, 20.0, 2.0], "limit": [1.0, 10.0, 1.0]}
    found = bench.harness.summarise(times, "limit", {"ours": 400, "limit": 100})
    assert found["ours"]["limit_median"] == pytest.approx(0.5)  # twice the time, 4 times the bytes
    assert found["ours"]["limit_q1"] == found["ours"]["limit_q3"]
    assert found["limit"]["limit_median"] == 1.0
    nothing = bench.harness.summarise(times, "limit", {"ours": 0, "limit": 100})
    assert "limit_median" not in nothing["ours"]  # memory limits nothing that moves nothing
    unknown = bench.harness.summarise(times, "limit", {"ours": None, "limit": 100})
    assert unknown["ours"]["limit_median"] == pytest.approx(2.0)


def test_rounds_are_interleaved_in_an_order_drawn_anew(bench: Any) -> None:
    seen: list[str] = []
    runs = {name: (lambda name=name: seen.append(name)) for name in "abc"}

    def timer(run: Any) -> float:
        run()
        return 1.0  # so long that no run precedes the timed one

    times = bench.harness.interleaved(runs, timer, None, seconds=60, least=3, most=9)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert [sorted(each) for each in rounds] == 10 * [["a", "b", "c"]]
    assert len(set(rounds)) > 3
    assert {name: len(values) for name, values in times.items()} == {"a": 9, "b": 9, "c": 9}


def test_processors_of_one_name_are_told_apart(bench: Any) -> None:
    """Rows of two machines must not be compared: many clouds name all their processors alike."""
    text = "processor : 0\nmodel name : AMD EPYC\ncpu family : 25\nmodel : {}\nmodel : 99\n"
    names = {bench.harness._cpu_name(text.format(model)) for model in (1, 17)}
    assert len(names) == 2
    assert all(name.startswith("AMD EPYC (family 25, model 1") for name in names)
    assert torch.backends.cpu.get_cpu_capability() in bench.harness._cpu_name("")


def test_slow_contenders_have_fewer_turns(bench: Any) -> None:
    seconds = {"fast": 1.0, "slow": 5.0, "limit": 1.0, "slowest": 50.0, "other": 1.0}
    runs = {name: (lambda t=t: t) for name, t in seconds.items()}
    times = bench.harness.interleaved(runs, lambda run: run(), None, seconds=0, least=3, most=100)
    turns = {name: sum(t is not None for t in values) for name, values in times.items()}
    assert turns == {"fast": 9, "slow": 9, "limit": 9, "slowest": 3, "other": 9}
    found = bench.harness.summarise(times, "limit", dict.fromkeys(times, 1))
    assert found["slowest"]["rounds"] == 3
    assert found["slowest"]["limit_median"] == 50


def test_no_contender_has_fewer_than_twenty_turns_within_a_second(bench: Any) -> None:
    seconds = {"limit": 0.001, "fast": 0.002, "slow": 0.9, "of two seconds": 2.0, "endless": 90.0}
    runs = {name: (lambda t=t: t) for name, t in seconds.items()}
    settings = bench.harness.Settings(torch.device("cpu"), ("warm",))
    times = bench.harness.interleaved(
        runs, lambda run: run(), None, seconds=0, least=settings.least, most=settings.most
    )
    turns = {name: sum(t is not None for t in values) for name, values in times.items()}
    assert settings.least == 20
    assert min(turns[name] for name in ("limit", "fast", "slow")) >= 20
    assert turns["of two seconds"] >= 10 and 3 <= turns["endless"] < 20


def test_tables_show_turns_and_our_bytes_at_the_limits_speed(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = row(bench, [0.002] * 3, contender="lerp_flat", side="limit")
    ours = dataclasses.replace(row(bench, [0.003] * 3), bytes=3 * limit.bytes)
    bench.harness.show([limit, ours])
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if "quartiles" in line]
    assert " n " in head
    (scaled,) = [line for line in lines if "as many bytes as ours at this speed" in line]
    assert scaled.split()[-1] == "6.000"
    bench.harness.show([limit, dataclasses.replace(ours, bytes=limit.bytes)])
    assert "as many bytes" not in capsys.readouterr().out


def test_a_short_run_is_preceded_by_one_that_is_not_timed(bench: Any) -> None:
    seen: list[str] = []

    def timer(run: Any) -> float:
        seen.append("timed")
        run()
        return 0.001

    bench.harness.interleaved(
        {"a": lambda: seen.append("run")}, timer, lambda: seen.append("flush"),
        seconds=0, least=3, most=3,
    )  # fmt: skip
    # The first says whether it is short, the second how long it takes.
    assert seen == 2 * ["timed", "run"] + 3 * ["run", "flush", "timed", "run"]


def test_a_slow_first_run_costs_no_turns(bench: Any) -> None:
    """Such as one that binds its tensors, in a contender that is as fast as the other then."""
    durations = iter([0.05])
    runs = {name: lambda: None for name in ("first", "other")}

    def timer(run: Any) -> float:
        return next(durations, 0.001) if run is runs["first"] else 0.001

    times = bench.harness.interleaved(runs, timer, None, seconds=0, least=3, most=3)
    assert times == {"first": 3 * [0.001], "other": 3 * [0.001]}


def test_rows_survive_a_file_and_name_what_is_missing(bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    first = row(bench, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    wrong = dataclasses.replace(
        row(bench, [1.0]), contender="other", status="wrong", reason="off, by 1", q1=None,
        median=None, q3=None, rounds=0,
    )  # fmt: skip
    bench.rows.write(file, [first])
    bench.rows.write(file, [wrong], append=True)
    assert bench.rows.read([file]) == [first, wrong]
    assert first.gigabytes_per_second == pytest.approx(1200 / 2 / 1e9)
    assert first.percent_of_limit == pytest.approx(50)
    (tmp_path / "bad.csv").write_text("op,model\nupdate,m\n")
    with pytest.raises(ValueError, match="median"):
        bench.rows.read([tmp_path / "bad.csv"])


def test_an_interrupted_table_leaves_the_old_one(bench: Any, tmp_path: Path) -> None:
    """The file is another one afterwards, and a row that cannot be written changes nothing."""
    file = tmp_path / "table.csv"
    bench.rows.write_table(file, ["a"], [{"a": 1}])
    kept = tmp_path / "kept.csv"
    kept.hardlink_to(file)
    bench.rows.write_table(file, ["a"], [{"a": 2}], append=True)
    assert (kept.read_text(), file.read_text()) == ("a\n1\n", "a\n1\n2\n")
    with pytest.raises(ValueError):
        bench.rows.write_table(file, ["a"], [{"a": 3}, {"b": 4}])
    assert file.read_text() == "a\n1\n2\n"
    assert sorted(tmp_path.iterdir()) == [kept, file]


# ---------------------------------------------------------------------------------------- checks


def measured(bench: Any, contenders: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The rows of a case on a small network, checked and not timed."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).to(dtype)

    case = bench.harness.Case(
        "update", "m", bench.harness.dtype_name(dtype), make, bench.bench_average.size_of,
        contenders, modes=("warm",),
    )  # fmt: skip
    settings = bench.harness.Settings(torch.device("cpu"), ("warm",), check_only=True)
    return {r.contender: r for r in bench.harness.measure(case, settings)}


def test_contenders_are_checked_against_fp64(bench: Any) -> None:
    ours = bench.competitors.averager

    def drops_an_update(model: nn.Module) -> Any:
        found = ours(model)
        count = iter(range(100))
        return dataclasses.replace(found, update=lambda: next(count) == 2 or found.update())

    def is_absent(model: nn.Module) -> Any:
        raise ModuleNotFoundError("No module named 'absent'")

    make = bench.competitors.averaging
    found = measured(
        bench,
        {
            "lerp_flat": bench.harness.Contender("limit", bench.competitors.lerp_flat),
            "right": make(ours, True, "swa_fast"),
            "another rule": make(ours, False, "swa_fast"),
            "dropped": make(drops_an_update, True, "competitor"),
            "absent": make(is_absent, True, "competitor"),
        },
    )
    assert {name: r.status for name, r in found.items()} == {
        "lerp_flat": "ok", "right": "ok", "another rule": "wrong", "dropped": "wrong",
        "absent": "not installed",
    }  # fmt: skip
    assert "is off by" in found["dropped"].reason
    assert all(r.median is None for r in found.values())


def test_an_average_that_rounding_holds_still_is_wrong(bench: Any) -> None:
    def lerp_in_bf16(model: nn.Module) -> Any:
        averages = {k: p.detach().clone() for k, p in model.named_parameters()}

        def update() -> None:
            for k, p in model.named_parameters():
                averages[k].lerp_(p.detach(), 0.001)

        return bench.competitors.Averaged(update, lambda: averages)

    found = measured(
        bench, {"still": bench.competitors.averaging(lerp_in_bf16, False, "competitor")},
        torch.bfloat16,
    )  # fmt: skip
    assert found["still"].status == "wrong"
    assert "moved 0 % of its way" in found["still"].reason


def test_what_an_expert_writes_is_right(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the compiler, which takes longer than all other tests together."""
    compiled: list[bool] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(options["dynamic"])
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    names = [n for n in bench.competitors.AVERAGERS if "lerp_" in n]
    assert len(names) == 4

    def statuses() -> dict[str, str]:
        makers = bench.competitors.AVERAGERS
        cases = {n: bench.competitors.averaging(makers[n][1], False, "competitor") for n in names}
        return {name: each.status for name, each in measured(bench, cases).items()}

    assert set(statuses().values()) == {"ok"} and compiled == [False]
    monkeypatch.setitem(bench.competitors.COMPILED, "cpu", 1)
    assert [name for name, status in statuses().items() if status == "not served"] == [
        "foreach_lerp_, compiled"
    ]


def test_a_fault_of_ours_is_wrong_and_fails_the_run(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: nn.Module) -> Any:
        raise OSError("broken")

    def contender(side: str) -> Any:
        return bench.harness.Contender(side, broken)

    found = measured(bench, {"ours": contender("swa_fast"), "theirs": contender("competitor")})
    assert (found["ours"].status, found["theirs"].status) == ("wrong", "not served")
    assert found["ours"].reason == found["theirs"].reason == "OSError: broken"
    for side, code in (("swa_fast", 1), ("competitor", 0)):
        case = bench.harness.Case(
            "update", "m", "float32", lambda: nn.Linear(2, 2), bench.bench_average.size_of,
            {"it": contender(side)}, modes=("warm",),
        )  # fmt: skip
        suite = bench.harness.Suite("", lambda device, case=case: [case])
        assert bench.harness.main([suite], "", ["--device", "cpu", "--check-only"]) == code
    assert "OSError: broken" in capsys.readouterr().out


def test_caches_are_filled_for_cold_times_only(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[bool] = []

    def interleaved(runs: Any, timer: Any, flush: Any, **_: Any) -> dict[str, list[float]]:
        flushes.append(flush is not None)
        return {name: [1.0] for name in runs}

    monkeypatch.setattr(bench.harness, "interleaved", interleaved)
    case = bench.harness.Case(
        "update", "m", "float32", lambda: nn.Linear(2, 2), bench.bench_average.size_of,
        {"lerp_flat": bench.harness.Contender("limit", bench.competitors.lerp_flat)},
    )  # fmt: skip
    settings = bench.harness.Settings(torch.device("cpu"), ("warm", "cold"))
    rows = bench.harness.measure(case, settings)
    assert [(r.mode, r.status) for r in rows] == [("warm", "ok"), ("cold", "ok")]
    assert flushes == [False, True]


@pytest.mark.parametrize("name", ["torch", "swa_fast, bf16 autocast"])
def test_a_wrong_pass_is_found(bench: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that are 5 % off are, in bf16, beyond twice torch's own error."""
    module = bench.bench_update_bn
    shared = module._shared("preresnet8", 16, 2, torch.device("cpu"))
    work = module._contender(name).make(shared)
    work.run()
    work.check(work.run, 1)
    update, *rest = module.PASSES[name]

    def off(batches: Any, model: nn.Module) -> None:
        update(batches, model)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var *= 1.05

    monkeypatch.setitem(module.PASSES, name, (off, *rest))
    work = module._contender(name).make(shared)
    work.run()
    with pytest.raises(AssertionError, match="is off by"):
        work.check(work.run, 1)


@pytest.mark.parametrize("before", [None, "1"])
def test_equal_pages(bench: Any, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within, a pass of ours leaves malloc alone; afterwards the variable is what it was."""
    variable = "SWA_FAST_KEEP_MEMORY"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    kept: list[bool] = []
    monkeypatch.setattr(
        bench.bench_update_bn, "KeptMemory",
        lambda on: contextlib.nullcontext(kept.append(os.environ.get(variable) == "0")),
    )  # fmt: skip
    with bench.bench_update_bn.equal_pages(True):
        assert os.environ[variable] == "0"
    # Not yet, or it would have been left alone itself.
    assert kept == [False]
    assert os.environ.get(variable) == before


def test_each_pass_alone(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each contender in which nothing is set, and one with malloc set alike."""
    module, asked = bench.bench_update_bn, []

    def answer(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        asked.append((command[-1], {k: v for k, v in env.items() if k.startswith("MALLOC_")}))
        assert command[2:-2] == arguments and "SWA_FAST_KEEP_MEMORY" not in env
        return SimpleNamespace(stdout=f"[{len(asked)}, {0.01 * len(asked)}]")

    known = module.facts(torch.device("cpu"))
    monkeypatch.setattr(module, "facts", lambda device: known)
    monkeypatch.setattr(module.subprocess, "run", answer)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("SWA_FAST_KEEP_MEMORY", "0")
    threads, out = torch.get_num_threads(), tmp_path / "rows.csv"
    arguments = ["--alone", "--threads", str(threads), "--out", str(out)]
    assert module.alone_main(arguments) == 0
    assert [name for name, _ in asked[::2]] == list(module._ALONE)
    assert all(not env for _, env in asked[::2])
    assert all(env == module._EQUAL_MALLOC for _, env in asked[1::2])
    first = next(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert (first["as found, ms"], first["equal malloc, ms"], first["others"]) == (
        "1000", "2000", "0.020",
    )  # fmt: skip


def test_the_reference_of_precise_bn_is_pooled_and_biased(bench: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(4, 3, 5, 5) + 1, 2 * torch.randn(2, 3, 5, 5)]
    bench.precise_bn_reference.update_bn_stats(model, batches, 2)
    values = torch.cat([x.movedim(1, 0).flatten(1) for x in batches], 1).double()
    layer: Any = model[0]
    torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    variance = values.var(1, correction=0)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=0)
    assert layer.momentum == 0.1


# ------------------------------------------------------------------------------------ comparison


def noisy(bench: Any, seed: int, slower: float = 1.0, machine: float = 1.0, **columns: Any) -> Any:
    """30 rounds with 5 % noise; sometimes a round of ten times the time, as under other work."""
    generator = random.Random(seed)

    def times(middle: float) -> list[float]:
        return [
            middle * machine * generator.gauss(1, 0.05) * (10 if generator.random() < 0.05 else 1)
            for _ in range(30)
        ]

    return row(bench, times(0.02 * slower), times(0.01), **columns)


def test_noise_is_no_regression(bench: Any) -> None:
    for seed in range(200):
        old, new = noisy(bench, seed), noisy(bench, seed + 1000)
        assert not [c for c in bench.compare.changes([old], [new]) if c.slower], seed


def test_a_slow_down_is_a_regression(bench: Any) -> None:
    for seed in range(50):
        old, new = noisy(bench, seed), noisy(bench, seed + 1000, slower=1.4)
        (change,) = bench.compare.changes([old], [new])
        assert change.slower and change.ratio > 1.1
        (change,) = bench.compare.changes([new], [old])
        assert not change.slower


def test_a_slower_machine_is_no_regression(bench: Any) -> None:
    for seed in range(50):
        old, new = noisy(bench, seed), noisy(bench, seed + 1000, machine=1.5)
        assert bench.compare.changes([old], [new]) == []


def test_a_busy_machine_raises_the_bar(bench: Any) -> None:
    old, new = noisy(bench, 0, others=0.5), noisy(bench, 1, slower=1.4)
    assert bench.compare.changes([old], [new]) == []
    (change,) = bench.compare.changes([old], [noisy(bench, 1, slower=1.8)])
    assert change.slower


def test_what_happens_to_competitors_is_noise(bench: Any) -> None:
    """Two of them 1.5 times slower in the new run, so 1.4 of ours is no news; one could be of
    another version."""

    def run(seed: int, *slower: float) -> list[Any]:
        rows = [noisy(bench, seed, slower=slower[0])]
        for place, factor in enumerate(slower[1:]):
            columns = {"contender": f"theirs {place}", "side": "competitor"}
            rows.append(noisy(bench, seed + 10 * place + 10, slower=factor, **columns))
        return rows

    for seed in range(1000, 1020):
        for competitors, seen in (((1.5, 1.5, 1.0), False), ((1.5, 1.0, 1.0), True)):
            found = bench.compare.changes(run(seed, 1, 1, 1, 1), run(-seed, 1.4, *competitors))
            assert any(c.new.side == bench.rows.OURS for c in found) == seen


def test_compare_exits_by_our_rows_alone(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    theirs = {"contender": "theirs", "side": "competitor"}
    bench.rows.write(old, [noisy(bench, 0), noisy(bench, 1, **theirs)])

    bench.rows.write(new, [noisy(bench, 2), noisy(bench, 3, slower=2, **theirs)])
    assert bench.compare.main([str(old), str(new)]) == 0
    assert "not ours" in capsys.readouterr().out
    bench.rows.write(new, [noisy(bench, 2, slower=2), noisy(bench, 3, **theirs)])
    assert bench.compare.main([str(old), str(new)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    gone = dataclasses.replace(noisy(bench, 2), status="wrong", q1=None, median=None, q3=None)
    bench.rows.write(new, [gone])
    assert bench.compare.main([str(old), str(new)]) == 1
    capsys.readouterr()
    bench.rows.write(new, [noisy(bench, 2, device="another")])
    assert bench.compare.main([str(old), str(new)]) == 2
    said = capsys.readouterr().out
    assert said.startswith("expected rows of one machine, found ") and "another" in said
    # Beside rows of the same machine, too; a file of two machines serves either.
    bench.rows.write(new, [noisy(bench, 2, device="another"), noisy(bench, 3, **theirs)])
    assert bench.compare.main([str(old), str(new)]) == 2
    bench.rows.write(new, [noisy(bench, 2), noisy(bench, 2, device="another")])
    assert bench.compare.main([str(old), str(new)]) == 0
    bench.rows.write(new, [noisy(bench, 2, op="another")])
    assert bench.compare.main([str(old), str(new)]) == 2
    assert "no rows in common" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- reports


@pytest.fixture
def results(bench: Any, tmp_path: Path) -> Path:
    rows = [
        row(bench, [0.001, 0.001, 0.001], [0.001] * 3, op=op, model=model, contender=name, side=s)
        for op, models in (("update", ("a", "b")), ("growth", ("10^3 in 1 tensor",)))
        for model in models
        for name, s in (("lerp_flat", "limit"), ("ours", bench.rows.OURS))
    ]
    bench.rows.write(tmp_path / "rows_1.csv", rows)
    return tmp_path


README = """# Title

<!-- bench:times op="update" mode="warm" models="b|a" -->
old
<!-- /bench -->
text
"""


def test_report_fills_the_readme_and_check_finds_a_stale_one(
    bench: Any, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = results / "README.md"
    readme.write_text(README)
    options = ["--results", str(results), "--pages", str(readme)]
    assert bench.report.main([*options, "--check"]) == 1
    assert bench.report.main(options) == 0
    text = readme.read_text()
    assert "|  | b | a |" in text and "| ours | 1.00 | 1.00 |" in text
    assert "old" not in text and text.endswith("<!-- /bench -->\ntext\n")
    assert bench.report.main([*options, "--check"]) == 0

    readme.write_text(text.replace("1.00", "0.90"))
    assert bench.report.main([*options, "--check"]) == 1
    readme.write_text(text)
    # A row that no table shows, but a chart.
    extra = row(bench, [2.0], [1.0], op="growth", model="10^4 in 1 tensor", contender="ours")
    bench.rows.write(results / "rows_1.csv", [extra], append=True)
    capsys.readouterr()
    assert bench.report.main([*options, "--check"]) == 1
    assert "growth.svg" in capsys.readouterr().out


def test_report_shows_some_of_the_contenders(bench: Any, results: Path) -> None:
    data = bench.report.Data(results)
    place = '<!-- bench:times op="update" mode="warm" contenders="{}" -->\n<!-- /bench -->\n'
    text = bench.report.fill(place.format("ours"), data)
    assert "| ours | 1.00 | 1.00 |" in text and "lerp_flat" not in text
    with pytest.raises(ValueError, match="no row of theirs"):
        bench.report.fill(place.format("ours|theirs"), data)
    # Relative to the limit of the same rounds, whatever the times themselves are.
    data.rows = [dataclasses.replace(r, limit_median=1.5) for r in data.rows]
    text = bench.report.fill(place.format("ours").replace("times", "multiples"), data)
    assert "| ours | 1.50 | 1.50 |" in text


def test_report_looks_at_all_pages(bench: Any) -> None:
    names = {str(page.relative_to(BENCH.parent)) for page in bench.report.pages()}
    assert {"README.md", "docs/benchmarks.md", "docs/migration.md"} <= names


def test_differences_are_those_of_the_averages(bench: Any) -> None:
    """The recorded rows are those of the list, and what is measured is a distance: an average that
    stays at the start is as far away as ours has gone."""
    recorded = [(r["theirs"], r["ours"]) for r in bench.report.Data(BENCH / "results").differences]
    assert recorded == [(theirs, ours) for theirs, ours, _, _ in bench.differences.PAIRS]

    def still(model: nn.Module) -> Any:
        start = [p.detach().clone() for p in model.parameters()]
        return (lambda: None), lambda: start

    ours = bench.differences.averager(bench.differences.SWA())
    assert bench.differences.difference(still, ours) == pytest.approx(1)
    assert bench.differences.difference(bench.differences.moving_average, ours) < 1e-5
    shown = [bench.differences.shown(value) for value in (0.0, 4.6e-8, 0.0037, 0.53)]
    assert shown == ["0", "5e-08", "0.37 %", "53 %"]


def test_report_shows_what_the_model_expects_of_what_is_counted(bench: Any, tmp_path: Path) -> None:
    columns = bench.counts.COLUMNS
    plain = dict.fromkeys(columns, "0") | {"op": "update", "model": "m", "dtype": "float32"}
    ours = {"contender": "ours", "model us": "5.2", "model low us": "5.1", "model high us": "1e1"}
    theirs = {"contender": "theirs", **dict.fromkeys(columns[-3:], "")}
    place = '<!-- bench:counts op="update" model="m" -->\n<!-- /bench -->\n'
    path = tmp_path / "counts_1.csv"
    bench.rows.write_table(path, columns, [plain | ours, plain | theirs])
    text = bench.report.fill(place, bench.report.Data(tmp_path))
    assert "| at least, us | by the model, not measured, us |" in text
    assert "| 5.20 (5.10 to 10.0) |" in text and "| 0 |  |" in text
    bench.rows.write_table(path, columns, [plain | theirs])
    assert "model" not in bench.report.fill(place, bench.report.Data(tmp_path)).split("-->")[1]


def test_report_compares_across_rounds_by_the_limit(bench: Any, tmp_path: Path) -> None:
    """The competitor met a machine half as fast: 3 times the limit and 1.5 times ours, of which the
    row's bytes, half the limit's, make a ratio of 6 per byte."""
    slow = row(bench, [6.0] * 3, [2.0] * 3, contender="theirs", side="competitor")
    rows = [
        row(bench, [1.0] * 3, [1.0] * 3, contender="lerp_flat", side="limit", bytes=8),
        row(bench, [2.0] * 3, [1.0] * 3, contender="ours", side=bench.rows.OURS, bytes=8),
        dataclasses.replace(slow, bytes=4, limit_q1=6.0, limit_median=6.0, limit_q3=6.0),
    ]
    bench.rows.write(tmp_path / "rows_1.csv", rows)
    text = bench.report.ratios(bench.report.Data(tmp_path), {"of": "ours", "mode": rows[0].mode})
    assert "| theirs | 1.5 |" in text


def test_report_shows_the_limits_speed_where_bytes_differ(bench: Any, tmp_path: Path) -> None:
    """An average of bf16 weights moves 10 bytes a parameter, an fp32 lerp_ 12."""
    limit = dataclasses.replace(row(bench, [1.2]), contender="lerp_flat", side="limit", bytes=1200)
    ours = dataclasses.replace(row(bench, [1.5]), bytes=1000)
    bench.rows.write(tmp_path / "rows_x.csv", [limit, ours])
    text = bench.report.times(bench.report.Data(tmp_path), {"mode": ours.mode})
    assert "as many bytes at lerp_flat's speed | 1,000 |" in text
    bench.rows.write(tmp_path / "rows_x.csv", [limit, dataclasses.replace(ours, bytes=1200)])
    assert "as many" not in bench.report.times(bench.report.Data(tmp_path), {"mode": ours.mode})


def test_report_refuses_what_it_has_no_rows_for(bench: Any, results: Path) -> None:
    data = bench.report.Data(results)
    for place in ('bench:times op="swap"', "bench:nothing"):
        with pytest.raises(ValueError):
            bench.report.fill(f"<!-- {place} -->\n<!-- /bench -->\n", data)


def test_the_committed_readme_is_made_from_the_committed_rows(bench: Any) -> None:
    assert bench.report.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.16491, "0.165"), (0.9996, "1.00"), (10.93, "10.9"), (1234.5, "1,230")],
)
def test_significant_digits(bench: Any, value: float, text: str) -> None:
    assert bench.report.significant(value) == text


# ---------------------------------------------------------------------------------------- counts


def test_the_least_time_is_the_larger_of_both_costs(bench: Any) -> None:
    counts = bench.counts.Counts(launches=2, host_syncs=0, allocations=0, copies=1)
    least = bench.counts.least_seconds
    assert least(counts, 10**9, 1e12, 1e-6) == pytest.approx(1e-3)
    assert least(counts, 10, 1e12, 1e-6) == pytest.approx(3e-6)
    # Bytes that were counted take the place of the least that is needed.
    counted = dataclasses.replace(counts, bytes=2 * 10**9)
    assert least(counted, 10**9, 1e12, 1e-6) == pytest.approx(2e-3)


def test_profiler_events_are_told_apart(bench: Any) -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name=name, device_type=kind)
        for name, kind in (
            ("update_kernel", cuda), ("Memcpy DtoD (Device -> Device)", cuda),
            ("Memcpy DtoH (Device -> Pageable)", cuda), ("Memset (Device)", cuda),
            ("cudaLaunchKernel", cpu), ("cudaStreamSynchronize", cpu),
            ("cudaDeviceSynchronize", cpu), ("aten::add_", cpu),
        )
    ]  # fmt: skip
    assert bench.counts.count_events(events) == {"launches": 1, "copies": 3, "host_syncs": 1}


class FakeDevice:
    """Host and device as two clocks: what is enqueued starts when both are ready for it."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def enqueue(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.host, self.device) + device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = max(device.host, device.device)

            def query(self) -> bool:
                return self.at <= device.host

            def elapsed_time(self, other: Any) -> float:
                return float(1e3 * (other.at - self.at))

        return Event()


def test_a_queued_run_costs_what_the_device_takes(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the host does, which takes ten times as long here, and no time at all where a run
    waits for the device."""
    harness, fake = bench.harness, FakeDevice()
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: fake.enqueue(0, n / harness.CLOCK_RATE))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: fake.host)
    monkeypatch.setattr(harness, "simulated", lambda: False)
    timer = object.__new__(harness._Timer)
    timer._events = [fake.event(), fake.event()]
    assert timer.queued(lambda: fake.enqueue(1e-4, 1e-5)) == pytest.approx(1e-5)
    assert timer.queued(lambda: fake.enqueue(1e-6, 1e-3)) == pytest.approx(1e-3)

    def waits() -> None:
        fake.enqueue(1e-4, 1e-5)
        fake.synchronize()

    assert timer.queued(waits) is None


def test_rounds_without_a_time_have_no_ratio(bench: Any) -> None:
    found = bench.harness.summarise(
        {"ours": [2.0, None], "limit": [None, 1.0]}, "limit", {"ours": None, "limit": None}
    )
    assert found["ours"]["median"] == 2.0 and "limit_median" not in found["ours"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # to a simulator's driver
def test_the_columns_of_a_gpu(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Events, filled caches and replayed graphs. A simulator's times mean nothing, so nothing is
    asked of them but that they are there."""
    device = torch.device("cuda")
    (case,) = (c for c in bench.bench_average.SUITE.cases(device) if c.model == "10^3 in 1 tensor")
    modes = bench.harness.MODES["cuda"]
    settings = bench.harness.Settings(device, modes, seconds=0.01, least=2, most=2)
    rows = bench.harness.measure(case, settings)
    for name in ("lerp_flat", "Averager EMA"):
        mine = [r for r in rows if r.contender == name]
        assert tuple(r.mode for r in mine) == modes
        for r in mine:
            assert (r.status, r.clock) == ("ok", "events"), (r.mode, r.reason)
            assert r.rounds >= 2
            assert r.median > 0 and r.limit_median > 0
    bench.harness.show(rows)
    assert "graph cold, ms" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_batch_of_the_pass_is_counted(
    bench: Any,
    simulator: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch adds one to num_batches_tracked and reads it in every layer. swa_fast has two kernels
    for a layer, where the plain forward has one, and one launch for all layers together."""
    counter = bench.counts.Counter(bench.counts.simulator_counts, "simulator", 1e12, 1e-6)
    found = {r["contender"]: r for r in bench.counts.count_pass("preresnet8", counter)}
    forward, torchs, ours = (found[n] for n in (bench.bench_update_bn.LIMIT, "torch", "swa_fast"))
    assert (ours["launches"], ours["host syncs"], ours["copies"]) == (
        forward["launches"] + 7 + 1,
        0,
        0,
    )
    assert torchs["host syncs"] == torchs["copies"] == 7
    assert torchs["launches"] == forward["launches"] + 2 * 7
    assert forward["host syncs"] == 0 and forward["at least us"] == f"{forward['launches']:.3g}"

    nothing = (lambda batches, model: None, *bench.bench_update_bn.PASSES["torch"][1:])
    monkeypatch.setitem(bench.bench_update_bn.PASSES, "torch", nothing)
    monkeypatch.setattr(bench.bench_update_bn, "LIMIT", "torch")  # the first one, on new layers
    found = {r["contender"]: r for r in bench.counts.count_pass("preresnet8", counter)}
    assert "torch" not in found and "swa_fast" in found
    assert "wrong: " in capsys.readouterr().out


def test_counts_start_again_under_the_simulator(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(bench.counts, "simulated", lambda: False)
    with pytest.raises(SystemExit):
        bench.counts.main(["--simulate", "--ops", "update"])
    (command,) = started
    python, folder, run, *script = command
    assert (python, run, script[0]) == (sys.executable, "run", sys.executable)
    assert script[1:] == [bench.counts.__file__, "--simulate", "--ops", "update"]
    usage = subprocess.run([python, folder], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "run CMD..." in usage.stdout

    # A benchmark that was copied out of the repository.
    monkeypatch.setattr(bench.counts, "SIMULATOR", tmp_path / "tests" / "gpusim")
    with pytest.raises(SystemExit, match="2"):
        bench.counts.main(["--simulate"])
    assert "not of a wheel" in capsys.readouterr().err and len(started) == 1


def test_a_source_of_counts_has_to_be_complete(bench: Any) -> None:
    with pytest.raises(ValueError, match="allocations"):
        bench.counts.Counts.of({"launches": 1, "host_syncs": 0, "copies": 0})
    with pytest.raises(ValueError, match="MODULE:FUNCTION"):
        bench.counts.source_named("module")


def test_a_counted_row_has_the_model_s_time_and_how_far_off_it_may_be(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = dict.fromkeys(("device", "torch", "commit", "date"), "")
    monkeypatch.setattr(bench.counts, "facts", lambda device: dict(about))
    counter = bench.counts.Counter(dict, "simulator", 1e12, 1e-6, "H100")
    counts = bench.counts.Counts(1, 0, 0, 0, 20_000_000)
    off = bench.counts.predict.spread_of("update: m", "Averager SWA")

    def row(expected: float | None) -> list[str]:
        found = counter.row("update", "Averager SWA", "m", "float32", counts, None, expected)
        assert list(found) and set(found) == set(bench.counts.COLUMNS)
        return [found[f"{name} us"] for name in ("at least", "model", "model low", "model high")]

    least, *times = row(1e-5)
    assert least == "20" and times == ["10", f"{10 * off.low:.3g}", f"{10 * off.high:.3g}"]
    assert f"10 ({times[1]} - {times[2]})" in capsys.readouterr().out
    assert row(None) == ["20", "", "", ""]


# ---------------------------------------------------------------------------------- kernel facts


# As the update kernels are: registers, stack, local, shared, threads, barriers, loads, stores.
FACTS = (64, 0, 0, 2504, 256, 1, 8, 16, 0, 48)


def test_kernels_over_their_limits_are_found(bench: Any) -> None:
    facts = bench.kernel_facts
    limit = facts.Facts(*FACTS)
    limits = {"cuda sm_90 k": limit}

    def problems(same: bool = True, **changed: Any) -> list[str]:
        found: list[str] = facts.check(
            {"cuda sm_90 k": dataclasses.replace(limit, **changed)}, limits, {"cuda": same}
        )
        return found

    assert problems() == [] and problems(registers=38, shared=0, wide=9) == []
    for changed in ({"registers": 65}, {"shared": 2505}, {"barriers": 2}, {"narrow": 15}):
        assert problems(**changed) and not problems(same=False, **changed)
    for changed in ({"stack": 8}, {"local": 1}, {"wide": 0}, {"wide_stores": 0}):
        assert problems(**changed) and problems(same=False, **changed)
    (gone,) = facts.check({"cuda sm_90 other": limit}, {}, {"cuda": True})
    assert "no limits" in gone
    assert any("is gone" in p for p in facts.check({"cuda sm_90 other": limit}, limits, {}))
    # What was not looked at is not missed: no kernel, or none for an architecture.
    assert facts.check({}, limits, {}) == []
    assert facts.check({"cuda sm_80 k": limit}, limits | {"cuda sm_80 k": limit}, {}) == []


def test_blocks_that_fit_on_a_multiprocessor(bench: Any) -> None:
    facts = bench.kernel_facts

    def fit(arch: int = 90, registers: int = 32, threads: int = 256, shared: int = 0) -> int:
        found = facts.Facts(registers, 0, 0, shared, threads, 0, 0, 0, 0, 0)
        return int(facts.resident_blocks(found, arch))

    # As the occupancy tables of NVIDIA have it.
    for registers, blocks in ((32, 8), (40, 6), (48, 5), (64, 4), (65, 3), (80, 3), (94, 2)):
        assert fit(registers=registers) == blocks
    assert [fit(arch) for arch in (75, 80, 90, 100, 120)] == [4, 8, 8, 8, 6]
    assert fit(registers=168, threads=128) == 3
    assert fit(shared=75 << 10) == 3 and fit(80, shared=75 << 10) == 2


def test_what_a_kernel_must_have_whatever_was_recorded(bench: Any) -> None:
    facts = bench.kernel_facts
    good = facts.Facts(*FACTS)
    name = "cuda sm_90 update_kernel<false>"

    def problems(**changed: Any) -> list[str]:
        """With limits that were recorded of the same kernel."""
        found = {name: dataclasses.replace(good, **changed)}
        checked: list[str] = facts.check(found, found, {"cuda": True})
        return checked

    assert problems() == [] and problems(registers=80) == []
    for changed, what in (
        ({"registers": 94}, "2 blocks a multiprocessor < 3"), ({"wide": 4}, "4 wide loads"),
        ({"narrow": 8}, "8 narrow loads"), ({"barriers": 2}, "2 barriers > 1"),
        ({"stack": 8}, "spills"), ({"local": 2}, "spills"),
    ):  # fmt: skip
        (problem,) = problems(**changed)
        assert what in problem
    # A pack of 16 bytes needs fewer loads than one of 8.
    wide = facts.gate_of("cuda", "statistics_kernel<BatchNormTraits<BFloat16, 8, false>>")
    narrow = facts.gate_of("cuda", "statistics_kernel<BatchNormTraits<float, 2, true>>")
    assert (wide.wide, wide.narrow, narrow.wide, narrow.narrow) == (4, 0, 0, 8)
    assert facts.gate_of("triton", "_update_kernel[fp32]").blocks == 3
    assert facts.gate_of("cuda", "merge_kernel") is None
    assert all(g.blocks <= facts.resident_blocks(good, 80) for g in facts.GATES.values())


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x0 */
        /*0010*/              @P0  LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0 */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/              @!P1 BRA 0x90 ;
        /*0040*/                   LDG.E.U16 R12, desc[UR4][R2.64+0x20] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   FADD R13, R13, R6 ;
        /*0070*/                   LDG.E.64 R14, desc[UR4][R2.64] ;
        /*0080*/                   BRA 0xc0 ;
        /*0090*/                   LDG.E R16, desc[UR4][R2.64] ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00b0*/                   BRA.U !UP0, 0xd0 ;
        /*00c0*/                   LDG.E.128.STRONG.GPU R20, desc[UR4][R2.64] ;
        /*00d0*/                   STL [R1], R20 ;
        /*00e0*/                   EXIT ;
"""


def test_loads_in_flight_are_read_from_machine_code(bench: Any) -> None:
    """Two wide ones and a narrow one before 0x60 needs the first; 0x70 lies behind a branch that is
    always taken, and 0x90 before one that may not be."""
    code = bench.sass.read(SASS)
    assert code == bench.sass.Code(bench.sass.Loads(2, 1, 1), 1, 1, 1)
    without = SASS.replace("BRA 0xc0", "@P2 BRA 0xc0").replace("R13, R13, R6", "R13, R13, R2")
    assert bench.sass.read(without).loads == bench.sass.Loads(2, 3, 1)


def test_limits_survive_their_file(bench: Any, tmp_path: Path) -> None:
    found = {"triton sm_80 k[fp32]": bench.kernel_facts.Facts(*FACTS)}
    bench.kernel_facts.save({"triton": "3"}, found, tmp_path / "limits.json")
    assert bench.kernel_facts.load(tmp_path / "limits.json") == ({"triton": "3"}, found)


# -------------------------------------------------------------------------------------- overhead


def test_both_libraries_train_the_same_average(bench: Any) -> None:
    overhead = bench.bench_overhead
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    batches = [(torch.randn(5, 3, 8, 8), torch.randint(2, (5,))) for _ in range(3)]
    for every_step in (True, False):
        trainers = []
        for library in overhead.LIBRARIES.values():
            trainer = overhead.Trainer(model, library, every_step, lambda: 0.0)
            for _ in range(2):
                trainer.epoch(batches, lambda: None)
            assert int(trainer.averaged.n_averaged) == (6 if every_step else 2)
            trainers.append(trainer)
        theirs, ours = (trainer.averaged.module for trainer in trainers)
        assert overhead.largest_difference(ours, theirs) < 1e-5
        torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)


def test_overhead_is_relative_to_training_alone(bench: Any) -> None:
    medians = {"forward/backward": 7.0, "optimiser": 1.0, "averaging": 0.4, "BN pass": 2.0}
    assert bench.bench_overhead.overhead(medians) == pytest.approx(30)


def test_scale_plan_is_the_table_of_the_docs(bench: Any) -> None:
    page = (BENCH.parent / "docs" / "sharding.md").read_text()
    assert "\n".join(bench.scale_plan.table()) in page


def test_bench_sharding(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    assert bench.bench_sharding.main(["--sides", "3", "--rounds", "3", "--out", str(out)]) == 0
    names = [line.split(",")[0] for line in out.read_text().splitlines()]
    assert names[:2] == ["contender", "swa_fast"] and len(names) == 6
    assert "_foreach_lerp_ of cached pieces" in capsys.readouterr().out
