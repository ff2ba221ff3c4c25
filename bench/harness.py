"""What all benchmarks share: cases and contenders, checks, interleaved timing, rows, options.

A suite (``bench_*.py``) lists cases: one operation on one model. Each case has contenders that do
the same work, and one of them is the limit: the least that this machine's memory allows, measured
in the same rounds. A contender is checked against fp64 before it is timed; a wrong one is reported
as wrong and not timed.

Times come from rounds in which the contenders take turns in an order drawn anew, so that neither a
machine that drifts nor the caches that another contender leaves favour one; those that are slower
than most take part in fewer rounds. Each has twenty turns or more, unless its runs take longer than
a second. On a CUDA device times are those of its events; on the CPU every case has a process of its
own.

* ``warm``: a turn begins with a run that is not timed (unless it takes more than 0.1 s). On a CUDA
  device it is the latency: of one run on an idle device, the host's share included.
* ``queued``: on a CUDA device, its time for one of several runs that the host enqueued back to back
  while the device was kept busy. Not for runs that wait for the device.
* ``cold``: before the timed run the caches are filled with other memory, as by a training step.
* ``graph``, ``graph cold``: the same for the replay of a captured CUDA graph.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.util
import math
import multiprocessing
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rows as row_files
import torch
from rows import OURS, Row
from torch import Tensor

import swa_fast
from swa_fast import _backends

__all__ = [
    "CHECKED_RUNS",
    "Case",
    "Contender",
    "NotServed",
    "Size",
    "Suite",
    "Work",
    "close",
    "dtype_name",
    "main",
    "pytest_cases",
    "quartiles",
    "summarise",
]

LONG = 0.1  # s: a run that takes longer is not preceded by one that is not timed
TURN_BYTES = 4e9  # contenders of more memory than this take turns in groups, each with the limit
SPARED = 8  # a slow contender takes a turn in one of so many rounds at least
TURNS = 20  # of each contender, at least
WHOLE = 1.0  # s: runs that take longer have as many fewer turns, three at least
BUSY = 0.05  # share of the CPU's time from which on other work is mentioned
MODES = {"cpu": ("warm", "cold"), "cuda": ("warm", "queued", "cold", "graph", "graph cold")}
QUEUED = 16  # runs of the mode ``queued`` that are timed together
CLOCK_RATE = 2e9  # Hz: of multiprocessors, at most about
CHECKED_RUNS = 3  # calls of ``run`` in a check
# Of a row in the mode ``queued`` whose runs cannot be enqueued ahead of the device.
WAITS = {"status": "not served", "reason": "the device waits for the host"}
Run = Callable[[], object]


class NotServed(Exception):
    """A contender that cannot do this case; the message says why."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one contender does in one case."""

    run: Run
    # check(run, done) calls ``run``, which was called ``done`` times before, CHECKED_RUNS times and
    # raises AssertionError where its results are wrong. Done for a captured graph, too.
    check: Callable[[Run, int], None] | None = None
    # That it has to move at least, 0: the limit of memory says nothing; None: as the case says.
    bytes: int | None = None
    # Whether capturing it is tried.
    graph: bool = True


@dataclasses.dataclass(frozen=True)
class Contender:
    side: str  # OURS, "competitor" or "limit"
    make: Callable[[Any], Work]  # from what the case's contenders share


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a case averages."""

    parameters: int
    tensors: int
    bytes: int | None  # that the operation has to move at least, None: not a question of memory


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    model: str
    dtype: str
    make: Callable[[], Any]  # what the contenders share
    size: Callable[[Any], Size]
    contenders: Mapping[str, Contender]
    quick: bool = False  # part of the short run
    copies: float = 1.5  # model-sized tensors that a contender holds, for grouping
    modes: tuple[str, ...] = MODES["cuda"]
    around: Callable[[], contextlib.AbstractContextManager[object]] = (
        contextlib.nullcontext
    )  # all rounds


@dataclasses.dataclass(frozen=True)
class Suite:
    title: str
    cases: Callable[[torch.device], list[Case]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def close(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError where ``found`` is off by more than ``tolerance`` times
    ``max(1, |exact|)``."""
    error = (found.double() - exact).abs().div_(exact.abs().clamp_(min=1)).max().item()
    assert error <= tolerance, f"{what} is off by {error:.2g}, allowed {tolerance:.2g}"


# ------------------------------------------------------------------------------------- machine


def simulated() -> bool:
    """Whether the CUDA device is a simulation, which has no times."""
    if importlib.util.find_spec("gpusim") is None:
        return False
    return bool(importlib.import_module("gpusim").active())


def _cpu_name(info: str | None = None) -> str:
    """Name, family and model, instruction set that torch's kernels use, cores. Many virtual
    machines hide the name's number: the family and the model tell the generation.

    Args:
        info: the text of Linux' ``/proc/cpuinfo``; None reads it.
    """
    if info is None:
        info = ""
        with contextlib.suppress(OSError):
            info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@functools.cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip

    package = Path(swa_fast.__file__).resolve().parent
    if package.parent != Path(__file__).resolve().parent.parent:
        # What is measured was built somewhere else.
        return str(_backends.build_info().get("commit") or "unknown")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def facts(device: torch.device) -> dict[str, Any]:
    """The columns of a row that do not depend on what is timed."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


# -------------------------------------------------------------------------------------- timing


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


class _Timer:
    """Seconds of one run on a device. ``clock`` is ``wall`` or ``cpu``, for the CPU."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self._cuda = device.type == "cuda"
        self._now = time.process_time if clock == "cpu" else time.perf_counter
        # Larger than any cache it is to fill: 128 MiB for a CPU, 512 MiB for a GPU.
        elements = (128 if self._cuda else 32) << 20
        self._other = torch.zeros(elements, device=device)
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def flush(self) -> None:
        self._other.add_(1)

    def __call__(self, run: Run) -> float:
        if not self._cuda:
            start = self._now()
            run()
            return self._now() - start
        torch.cuda.synchronize()
        self._events[0].record()
        run()
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3

    def queued(self, run: Run) -> float | None:
        """Seconds of the CUDA device for one of QUEUED runs; None where it waited for the host
        after all, as it does for a run that waits for it."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(QUEUED):
            run()
        host = time.perf_counter() - start
        for longer in (2, 4, 8):
            torch.cuda.synchronize()
            if not simulated():
                torch.cuda._sleep(int(CLOCK_RATE * host * longer))  # type: ignore[no-untyped-call]
            self._events[0].record()
            for _ in range(QUEUED):
                run()
            self._events[1].record()
            ahead = simulated() or not self._events[0].query()
            torch.cuda.synchronize()
            if ahead:
                return self._events[0].elapsed_time(self._events[1]) / 1e3 / QUEUED
        return None


class OtherWork:
    """The share of all CPU time that other processes use from here on; None where it is not known.
    Timings beside other work say little."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
        except OSError:
            return None
        # user, nice, system, idle, waiting for disks, interrupts, ...
        ticks = [int(text) for text in line.split()[1:9]]
        used = sum(ticks) - ticks[3] - ticks[4]
        return used / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        now = self._now()
        if now is None or self._start is None:
            return None
        used, own, wall = (b - a for a, b in zip(self._start, now, strict=True))
        cores = os.cpu_count() or 1
        return min(1.0, max(0.0, (used - own) / (wall * cores))) if wall > 0 else None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(
    runs: Mapping[str, Run], timer: Callable[[Run], float | None], flush: Run | None, *,
    seconds: float, least: int, most: int, whole: float = WHOLE,
) -> dict[str, list[float | None]]:  # fmt: skip
    """Seconds of each run in every round; None where the timer has none, or it had no turn, as
    those have that take longer than the average run: one in as many rounds, up to SPARED, as they
    are times slower.

    As many rounds as fit into ``seconds``, at most ``most`` turns, and for each run at least
    ``least``, of one that takes longer than ``whole`` seconds as many fewer as it is longer, but
    three. The order of a round is drawn anew, or each run would always find the caches as the same
    other one leaves them. ``flush`` fills the caches before each timed run."""
    # A first run may do what later ones need not, such as looking for the tensors.
    once = {name: timer(run) or 0.0 for name, run in runs.items()}
    once |= {name: timer(runs[name]) or 0.0 for name, t in once.items() if t < whole}
    average = statistics.fmean(once.values()) or 1.0
    every = {name: min(SPARED, max(1, round(t / average))) for name, t in once.items()}
    needed = {
        name: max(min(3, least), min(least, math.ceil(least * whole / t))) if t > 0 else least
        for name, t in once.items()
    }
    times: dict[str, list[float | None]] = {name: [] for name in runs}
    draw = random.Random(0)
    with _no_collection():
        start = time.perf_counter()
        for number in range(most * max(every.values())):
            order = list(runs)
            draw.shuffle(order)
            for name in order:
                if number % every[name]:
                    times[name].append(None)
                    continue
                run = runs[name]
                if once[name] < LONG:
                    run()
                if flush is not None:
                    flush()
                times[name].append(timer(run))
            passed = time.perf_counter() - start
            enough = all(number // every[name] + 1 >= needed[name] for name in runs)
            if enough and (number + 1 >= most or passed > seconds):
                break
    return times


def summarise(
    times: Mapping[str, Sequence[float | None]], limit: str | None, moved: Mapping[str, int | None]
) -> dict[str, dict[str, Any]]:
    """The columns of each contender's row that come from its times.

    The ratio to the limit is of times per byte where both sides' bytes are known, else of times;
    of the same round, so that both met the same machine. What moves nothing has none.
    """
    columns = {}
    for name, of_rounds in times.items():
        values = [t for t in of_rounds if t is not None]
        low, median, high = quartiles(values)
        found: dict[str, Any] = {
            "rounds": len(values), "q1": low, "median": median, "q3": high, "bytes": moved[name],
        }  # fmt: skip
        if limit is not None and moved[name] != 0:
            scale = 1.0
            ours, least = moved[name], moved[limit]
            if ours is not None and least is not None:
                scale = least / ours
            pairs = zip(of_rounds, times[limit], strict=True)
            ratios = [scale * t / base for t, base in pairs if t is not None and base is not None]
            keys = ("limit_q1", "limit_median", "limit_q3")
            if ratios:
                found |= zip(keys, quartiles(ratios), strict=True)
        columns[name] = found
    return columns


# --------------------------------------------------------------------------------------- cases


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]


class _Ready:
    """A contender that was made, checked and, where asked, captured."""

    def __init__(self, contender: Contender, shared: Any, graph: bool) -> None:
        self.side = contender.side
        self.graph: Run | None = None
        self.status, self.reason, self.graph_reason = "ok", "", ""
        self.work: Work | None = None
        try:
            work = contender.make(shared)
            work.run()
            if work.check is not None:
                work.check(work.run, 1)
        except ImportError as error:
            self.status, self.reason = "not installed", _reason(error)
        except AssertionError as error:
            self.status, self.reason = "wrong", _reason(error)
        except NotServed as error:
            self.status, self.reason = "not served", _reason(error)
        except Exception as error:
            # Whatever another package raises must not end the run of the others; from our own code
            # it is a fault.
            self.status = "wrong" if self.side == OURS else "not served"
            self.reason = f"{type(error).__name__}: {_reason(error)}"
        else:
            self.work = work
            if graph:
                self._capture(work)

    def _capture(self, work: Work) -> None:
        if not work.graph:
            self.graph_reason = "not to be captured"
            return
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                before = 2
                for _ in range(before):
                    work.run()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                work.run()
            if work.check is not None:
                work.check(graph.replay, 1 + CHECKED_RUNS + before)
        except AssertionError as error:
            self.graph_reason = f"wrong: {_reason(error)}"
        except RuntimeError as error:
            self.graph_reason = _reason(error)
        else:
            self.graph = graph.replay


def _groups(case: Case, size: Size, dtype_bytes: int, most: float = TURN_BYTES) -> list[list[str]]:
    """Contenders that take turns together, the limit in each group. Together they hold at most
    about ``most`` bytes."""
    names = list(case.contenders)
    limit = [n for n in names if case.contenders[n].side == "limit"]
    others = [n for n in names if n not in limit]
    each = max(1.0, case.copies * size.parameters * dtype_bytes)
    count = max(2, min(len(others), int(most / each))) if others else 1
    return [limit + others[i : i + count] for i in range(0, len(others), count)] or [limit]


@dataclasses.dataclass
class Settings:
    device: torch.device
    modes: tuple[str, ...]
    seconds: float = 4.0  # for a case and a mode
    least: int = TURNS
    most: int = 200
    whole: float = WHOLE
    check_only: bool = False
    clock: str = "wall"


def measure(case: Case, settings: Settings) -> list[Row]:
    """Checks and times one case's contenders: a row for each of them and each mode."""
    device = settings.device
    torch.manual_seed(0)
    shared = case.make()
    size = case.size(shared)
    modes = [m for m in settings.modes if m in case.modes and m in MODES[device.type]]
    timer = None if settings.check_only else _Timer(device, settings.clock)
    try:
        dtype_bytes = getattr(torch, case.dtype).itemsize
    except AttributeError:
        dtype_bytes = 4
    found: list[Row] = []
    seen: set[str] = set()
    for names in _groups(case, size, dtype_bytes):
        ready = {
            name: _Ready(case.contenders[name], shared, any("graph" in m for m in modes))
            for name in names
        }
        base = {
            name: {
                "op": case.op, "contender": name, "side": r.side, "model": case.model,
                "parameters": size.parameters, "tensors": size.tensors, "dtype": case.dtype,
                "clock": "events" if device.type == "cuda" else settings.clock, **facts(device),
            }
            for name, r in ready.items()
        }  # fmt: skip
        # The limit stands in the first group's rows.
        new = [n for n in names if n not in seen]
        seen.update(names)
        for mode in modes:
            runs = {}
            for name, r in ready.items():
                status, reason = r.status, r.reason
                run = r.graph if "graph" in mode else (r.work.run if r.work else None)
                if r.work is not None and run is None:
                    status, reason = "not served", r.graph_reason
                if run is not None and status == "ok" and timer is not None:
                    runs[name] = run
                elif name in new:
                    found.append(Row(**base[name], mode=mode, status=status, reason=reason))
            if mode == "queued" and timer is not None:
                for name in [name for name, run in runs.items() if timer.queued(run) is None]:
                    del runs[name]
                    if name in new:
                        found.append(Row(**base[name], mode=mode, **WAITS))
            if timer is None or not runs:
                continue
            beside = OtherWork()
            times = interleaved(
                runs, timer.queued if mode == "queued" else timer,
                timer.flush if "cold" in mode else None,
                seconds=settings.seconds * len(runs) / len(case.contenders),
                least=settings.least, most=settings.most, whole=settings.whole,
            )  # fmt: skip
            others = beside.share()
            limit = next((n for n in runs if ready[n].side == "limit"), None)
            moved = {n: _bytes(ready[n].work, size) for n in runs}
            for name in [name for name, values in times.items() if not any(values)]:
                del times[name]
                if name in new:
                    found.append(Row(**base[name], mode=mode, **WAITS))
            limit = limit if limit in times else None
            for name, columns in summarise(times, limit, moved).items():
                if name in new:
                    columns["others"] = others
                    found.append(Row(**base[name], mode=mode, status="ok", **columns))
        del ready
        gc.collect()
    order = list(case.contenders)
    return sorted(found, key=lambda r: (modes.index(r.mode), order.index(r.contender)))


def _bytes(work: Work | None, size: Size) -> int | None:
    return size.bytes if work is None or work.bytes is None else work.bytes


# --------------------------------------------------------------------------------------- output


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.{max(0, 3 - max(0, math.floor(math.log10(1e3 * seconds + 1e-12))))}f}"


def _at_its_speed(limit: Row | None, ours: Row | None) -> float | None:
    """Seconds that our bytes would take at the speed of the limit, which may be of another type or
    do less; None where it moves as many."""
    if limit is None or limit.side != "limit" or not limit.median or ours is None:
        return None
    if not limit.bytes or not ours.bytes or limit.bytes == ours.bytes:
        return None
    return limit.median * ours.bytes / limit.bytes


def show(rows: Sequence[Row]) -> None:
    """Prints one case as a table: a column for each mode, then what the first mode's times mean."""
    if not rows:
        return
    first = rows[0]
    modes = list(dict.fromkeys(r.mode for r in rows))
    names = list(dict.fromkeys(r.contender for r in rows))
    by = {(r.contender, r.mode): r for r in rows}
    # Ours that the others are compared with: the first one.
    mine = next((r for r in rows if r.side == OURS and r.mode == modes[0] and r.median), None)
    print(
        f"\n{first.op}: {first.model}, {first.dtype}, {first.parameters:,} elements in "
        f"{first.tensors:,} tensors; {first.device}, {first.threads} threads, {first.clock} clock, "
        f"torch {first.torch}"
    )
    ratio = f"x {mine.contender}"[:22] if mine else ""
    head = "".join(f"{mode + ', ms':>15}" for mode in modes)
    print(f"  {'':38}{head}{'quartiles':>19}{'n':>5}{'GB/s':>8}{'% limit':>9}{ratio:>24}")
    for name in names:
        row = by[name, modes[0]]
        cells = ""
        for mode in modes:
            entry = by.get((name, mode))
            text = "-" if entry is None else _milliseconds(entry.median) or entry.status
            cells += f"{text:>15}"
        rest = ""
        if row.median is not None:
            quartile = f"{_milliseconds(row.q1)} - {_milliseconds(row.q3)}"
            speed = row.gigabytes_per_second
            share = row.percent_of_limit
            rest = f"{quartile:>19}{row.rounds:5}{'' if speed is None else f'{speed:.1f}':>8}"
            rest += f"{'' if share is None else f'{share:.0f}':>9}"
            if mine is not None and mine.median:
                rest += f"{row.median / mine.median:24.2f}"
        print(f"  {name:38}{cells}{rest}")
        scaled = [_at_its_speed(by.get((name, mode)), mine) for mode in modes]
        if any(scaled):
            print(f"    {'as many bytes as ours at this speed':36}"
                  + "".join(f"{_milliseconds(t) or '-':>15}" for t in scaled))  # fmt: skip
        for mode in modes:
            entry = by.get((name, mode))
            if entry is not None and entry.reason and (mode == modes[0] or row.median is not None):
                print(f"    {mode}: {entry.status}: {entry.reason}")
    others = max((r.others or 0.0 for r in rows), default=0.0)
    if others > BUSY and first.clock == "wall":
        print(f"  beside other work, which used {100 * others:.0f} % of the CPU's time")
    sys.stdout.flush()


def select(
    suites: Iterable[Suite], device: torch.device, *, quick: bool, ops: Sequence[str] | None,
    models: Sequence[str] | None,
) -> list[Case]:  # fmt: skip
    cases = [case for suite in suites for case in suite.cases(device)]
    return [
        case
        for case in cases
        if (case.quick or not quick)
        and (ops is None or case.op in ops)
        and (models is None or case.model in models)
    ]


Key = tuple[str, str, str]
Cases = Callable[[torch.device], list[Case]]


def _key(case: Case) -> Key:
    return case.op, case.model, case.dtype


def _measure_there(
    cases: Cases, key: Key, settings: Settings, threads: int | None, rows: Connection
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    case = next(c for c in cases(settings.device) if _key(c) == key)
    with case.around():
        rows.send(measure(case, settings))


def measure_alone(cases: Cases, case: Case, settings: Settings, threads: int | None) -> list[Row]:
    """:func:`measure` of one of these cases, on the CPU in a new process, as a training begins: in
    the holes that other cases leave in the heap a model's tensors are scattered, and an update of
    hundreds of them then takes a quarter longer.

    Raises:
        RuntimeError: the process ended without rows.
    """
    try:
        pickle.dumps(cases)
    except (pickle.PicklingError, AttributeError):
        here = True  # such as a function within another one, which no process could import
    else:
        here = settings.device.type != "cpu" or settings.check_only
    if here:
        with case.around():
            return measure(case, settings)
    # A fork of a process that has imported everything and made nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness", cases.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure_there, args=(cases, _key(case), settings, threads, sender)
    )
    process.start()
    sender.close()
    try:
        rows: list[Row] = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{', '.join(_key(case))}: its process ended with {process.exitcode} and no rows"
        ) from None
    process.join()
    return rows


def main(suites: Sequence[Suite], description: str, arguments: Sequence[str] | None = None) -> int:
    """The command line of a suite, or of all of them. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=description.strip() + "\n\n" + str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the short list of cases, less often")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these operations")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="only these models")
    parser.add_argument("--modes", nargs="+", choices=MODES["cuda"], default=MODES["cuda"])
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: the CPU, then the CUDA device if there is one",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: its own choice)")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: the CPU time of the process, for a machine that is shared; with --threads 1",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="of rounds for a case and mode (default 4)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the rows to this file")
    parser.add_argument("--append", action="store_true", help="add to FILE.csv")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--check-only", action="store_true",
        help="check the contenders, time nothing; all that can be done on a simulated GPU",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        # Threads that wait for each other would count as work.
        parser.error("--clock cpu needs --threads 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kinds = ["cpu", "cuda"] if options.device == "auto" else [options.device]
    if not torch.cuda.is_available():
        if options.device == "cuda":
            parser.error("--device cuda: there is no CUDA device")
        kinds = ["cpu"]
    if "cuda" in kinds and simulated() and not options.check_only:
        if options.device == "cuda":
            parser.error("the CUDA device is simulated and has no times: use --check-only")
        kinds = ["cpu"]
    found: list[Row] = []
    wrong_ours = 0
    start = time.perf_counter()
    for kind in kinds:
        device = torch.device(kind)
        settings = Settings(device, tuple(options.modes), check_only=options.check_only)
        settings.clock = options.clock
        if options.quick:
            settings.seconds, settings.most, settings.whole = 0.4, 60, WHOLE / 10
        if options.seconds is not None:
            settings.seconds = options.seconds
        chosen = [
            (suite.cases, case)
            for suite in suites
            for case in select(
                [suite], device, quick=options.quick, ops=options.ops, models=options.models
            )
        ]
        if not chosen:
            parser.error("no case is selected; --list shows all")
        for cases, case in chosen:
            if options.list:
                print(f"{kind}: {case.op}: {case.model}, {case.dtype}")
                continue
            rows = measure_alone(cases, case, settings, options.threads)
            show(rows)
            wrong_ours += sum(r.side == OURS and r.status == "wrong" for r in rows)
            found += rows
            if options.out is not None:
                # After every case, so that an interrupted run leaves what it has.
                options.out.parent.mkdir(parents=True, exist_ok=True)
                append = options.append or len(found) > len(rows)
                row_files.write(options.out, rows, append=append)
    if not options.list:
        print(f"\n{len(found)} rows in {time.perf_counter() - start:.0f} s"
              + (f", in {options.out}" if options.out else ""))  # fmt: skip
    return 1 if wrong_ours else 0


# --------------------------------------------------------------------------------------- pytest


def pytest_cases(suite: Suite) -> Callable[..., None]:
    """A test for each case and contender, timed by pytest-benchmark: every contender by itself."""
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() and not simulated() else "cpu")
    pairs = [
        pytest.param(case, name, id=f"{case.op}-{case.model}-{case.dtype}-{name}")
        for case in suite.cases(device)
        for name in case.contenders
    ]

    @pytest.mark.parametrize(("case", "name"), pairs)
    def test_contender(benchmark: Any, case: Case, name: str) -> None:
        ready = _Ready(case.contenders[name], case.make(), graph=False)
        if ready.work is None:
            if ready.status == "wrong":
                pytest.fail(ready.reason)
            pytest.skip(ready.reason)
        run = ready.work.run

        def wait() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{case.op}: {case.model}, {case.dtype}"
        with case.around():
            benchmark.pedantic(wait, rounds=20, warmup_rounds=3)

    return test_contender
