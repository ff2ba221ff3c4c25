"""The steps of ``bench/gpu_report.py``: what is measured on a GPU, and how.

Each step is a function of a :class:`Context`, through which it reports rows, facts and remarks as
it gets them, so that whatever ends it early leaves what it has found. Times of an operation come in
four modes (``Row.mode``):

* ``graph``: of one call among several in a captured graph, back to back; caches as the calls leave
  them. The device's share alone, with the gap between two kernels.
* ``graph cold``: of one replay, events around it, after other memory has filled the caches.
* ``queued cold``: likewise without a graph, for what cannot be captured; the host's time shows
  where it launches more kernels than the device runs meanwhile.
* ``host``: of the call, on an idle device, until it returns.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Case, Run, _groups, _Ready, facts, quartiles, simulated
from rows import OURS, Row
from torch import nn
from torch.optim import swa_utils

import swa_fast
from swa_fast import EMA, SWA, Averager, __main__, _backends, _ops

__all__ = ["STEPS", "Context", "Step"]

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
GROUP_BYTES = 24e9  # of contenders that take turns together
CALLS = 16  # in a graph of several
LONGEST_TURN = 0.05  # s: what takes longer is not captured several times


@dataclasses.dataclass
class Context:
    """What a step works with."""

    device: torch.device
    small: bool  # the smallest size of everything: a rehearsal
    emit: Callable[[dict[str, Any]], None]
    until: float  # time.monotonic() at which the step should end
    copy_bandwidth: float | None = None  # bytes a second, from the step of facts

    def left(self) -> float:
        return self.until - time.monotonic()

    def fact(self, name: str, value: object, unit: str = "", note: str = "") -> None:
        self.emit({"fact": name, "value": value, "unit": unit, "note": note})

    def remark(self, text: str) -> None:
        self.emit({"remark": text})

    def row(self, row: Row) -> None:
        self.emit({"row": dataclasses.asdict(row)})


# ------------------------------------------------------------------------------------- timing


class Clock:
    """Times runs on one device."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.cuda = device.type == "cuda"
        if not self.cuda:
            return
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        size = 1 << 16 if small else max(256 << 20, 3 * cache)
        self._other = torch.zeros(size // 4, device=device)

    def flush(self) -> None:
        """Fills the caches; long enough for the host to enqueue what follows."""
        self._other.add_(1)

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def cold(self, run: Run, attempts: int = 1) -> float:
        """``attempts``: how often to try again where the host has fallen behind, so that the device
        has waited for it between the events."""
        for _ in range(attempts):
            begin, end = self._events()
            self.flush()
            self.flush()
            begin.record()
            run()
            end.record()
            late = begin.query()
            torch.cuda.synchronize()
            if not late:
                break
        return begin.elapsed_time(end) / 1e3

    def repeated(self, replay: Run, calls: int) -> float:
        """One call of a graph of several. The first replay is there for the host to get ahead."""
        begin, end = self._events()
        replay()
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def host(self, run: Run) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def _several(run: Run, calls: int) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


class _Turns:
    """One contender's ways of being timed."""

    def __init__(self, ready: _Ready, clock: Clock) -> None:
        self.ready = ready
        if ready.side == OURS and ready.graph_reason.startswith("wrong"):
            ready.status, ready.reason, ready.work = "wrong", ready.graph_reason, None
        self.times: dict[str, list[float]] = {}
        self.ways: dict[str, Callable[[], float]] = {}
        if ready.work is None:
            return
        run = ready.work.run
        if clock.cuda and ready.graph is not None:
            self.ways["graph cold"] = functools.partial(
                clock.cold, ready.graph, 1 if simulated() else 5
            )
            calls = CALLS if clock.cold(ready.graph) * CALLS < LONGEST_TURN else 1
            with contextlib.suppress(RuntimeError):
                self.ways["graph"] = functools.partial(clock.repeated, _several(run, calls), calls)
        elif clock.cuda:
            self.ways["queued cold"] = functools.partial(clock.cold, run)
        self.ways["host"] = functools.partial(clock.host, run)
        self.times = {way: [] for way in self.ways}


def _round(turns: Mapping[str, _Turns], generator: random.Random) -> None:
    names = list(turns)
    generator.shuffle(names)
    for name in names:
        for way, timed in turns[name].ways.items():
            turns[name].times[way].append(timed())


def measure(context: Context, case: Case, seconds: float) -> None:
    """Checks a case's contenders, times those that are right in shuffled rounds, reports rows."""
    device = context.device
    torch.manual_seed(0)
    generator = random.Random(0)
    shared = case.make()
    size = case.size(shared)
    clock = Clock(device, context.small)
    dtype_bytes = getattr(torch, case.dtype).itemsize
    about = facts(device)
    seen: set[str] = set()
    captured = clock.cuda and any("graph" in mode for mode in case.modes)
    groups = _groups(case, size, dtype_bytes, GROUP_BYTES)
    for names in groups:
        turns = {
            name: _Turns(_Ready(case.contenders[name], shared, captured), clock)
            for name in names
            if name not in seen
        }
        seen.update(names)
        timed = {name: t for name, t in turns.items() if t.ways}
        most = 2 if context.small else 100
        start = time.monotonic()
        gc.collect()
        gc.disable()
        try:
            for number in range(most):
                _round(timed, generator)
                spent = time.monotonic() - start
                if number >= 4 and spent > seconds * len(timed) / len(case.contenders):
                    break
        finally:
            gc.enable()
        for name, t in turns.items():
            work = t.ready.work
            moved = size.bytes if work is None or work.bytes is None else work.bytes
            base = {
                "op": case.op, "contender": name, "side": t.ready.side, "model": case.model,
                "parameters": size.parameters, "tensors": size.tensors, "dtype": case.dtype,
                **about,
            }  # fmt: skip
            if not t.ways:
                context.row(Row(
                    **base, mode="graph cold", clock="events", status=t.ready.status,
                    reason=t.ready.reason))  # fmt: skip
            for way, times in t.times.items():
                # The first round warms up.
                low, median, high = quartiles(times[1:] or times)
                columns: dict[str, Any] = {
                    "mode": way, "clock": "wall" if way == "host" else "events", "status": "ok",
                    "rounds": len(times[1:] or times), "q1": low, "median": median, "q3": high,
                    "reason": t.ready.graph_reason if way == "queued cold" else "",
                }  # fmt: skip
                if way != "host" or device.type == "cpu":
                    columns["bytes"] = moved
                    if moved and context.copy_bandwidth:
                        scale = context.copy_bandwidth / moved
                        columns |= {
                            "limit_q1": low * scale, "limit_median": median * scale,
                            "limit_q3": high * scale,
                        }  # fmt: skip
                context.row(Row(**base, **columns))
        del turns, timed
        gc.collect()


def measure_all(context: Context, cases: Sequence[Case], seconds: float) -> None:
    """As many cases as there is time for, in their order; what is left out is named."""
    for index, case in enumerate(cases):
        if context.left() < 1.0 and not context.small:
            rest = [f"{c.op}: {c.model}, {c.dtype}" for c in cases[index:]]
            context.remark(
                f"left out for want of time: {len(rest)} of {len(cases)} cases, from {rest[0]} on"
            )
            return
        try:
            measure(context, case, seconds)
        except torch.cuda.OutOfMemoryError as error:
            context.remark(f"{case.op}: {case.model}, {case.dtype}: {str(error).splitlines()[0]}")
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------- a: the facts

SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "ecc.mode.current", "power.limit", "temperature.gpu", "compute_mode",
)  # fmt: skip


def _output(command: Sequence[str], timeout: float, **options: Any) -> str:
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    if found.returncode != 0:
        lines = (found.stderr or found.stdout).strip().splitlines() or ["no output"]
        raise RuntimeError(f"{Path(command[0]).name} ended with {found.returncode}: {lines[-1]}")
    return found.stdout


def nvidia_smi(context: Context) -> None:
    if shutil.which("nvidia-smi") is None:
        context.remark("nvidia-smi is not installed: no clocks, no driver version")
        return
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
        text = _output(
            ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"], 20
        )
        lines = list(csv.reader(io.StringIO(text), skipinitialspace=True))
        for field, value in zip(SMI_FIELDS, lines[0], strict=False):
            context.fact(field, value.strip())
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
        text = _output(
            ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory",
             "--format=csv,noheader"], 20,
        )  # fmt: skip
        # This process, and the one that watches over it and has looked at the device, too.
        own = {str(os.getpid()), str(os.getppid())}
        others = [
            line for line in text.splitlines() if line.split(",")[0].strip() not in own | {""}
        ]
        if others:
            context.remark(f"another process is on the GPU, times may be too long: {others[0]}")


def _median_seconds(clock: Clock, run: Run, rounds: int) -> float:
    run()
    return statistics.median(clock.cold(run) for _ in range(rounds))


def _limits(clock: Clock, device: torch.device, elements: int, rounds: int) -> tuple[float, float]:
    """Seconds of a copy and of an in-place lerp_ of fp32 elements."""
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return (
        _median_seconds(clock, lambda: target.copy_(source), rounds),
        _median_seconds(clock, lambda: target.lerp_(source, 0.001), rounds),
    )


FIRST_UPDATE = """
import time
begin = time.perf_counter()
import torch
imported_torch = time.perf_counter()
import swa_fast
imported = time.perf_counter()
model = torch.nn.Linear(64, 64).cuda()
torch.cuda.synchronize()
ready = time.perf_counter()
averager = swa_fast.Averager(model, {"swa": swa_fast.SWA()})
averager.update()
torch.cuda.synchronize()
first = time.perf_counter()
averager.update()
torch.cuda.synchronize()
second = time.perf_counter()
print(imported_torch - begin, imported - imported_torch, ready - imported, first - ready,
      second - first)
"""


def step_facts(context: Context) -> None:
    """The machine, and the two limits that everything is compared with."""
    device = context.device
    for name, value in __main__.report()["versions"].items():
        context.fact(name, value)
    context.fact("built for", _backends.build_info().get("arch_list"))
    about = facts(device)
    for name in ("device", "threads", "commit", "date"):
        context.fact(name, about[name])
    if device.type != "cuda":
        return
    nvidia_smi(context)
    properties = torch.cuda.get_device_properties(device)
    context.fact("compute capability", f"{properties.major}.{properties.minor}")
    context.fact("multiprocessors", properties.multi_processor_count)
    context.fact("L2 cache", getattr(properties, "L2_cache_size", 0) / 2**20, "MiB")
    context.fact("memory", properties.total_memory / 2**30, "GiB")
    context.fact("devices", torch.cuda.device_count())

    rounds = 2 if context.small else 10
    clock = Clock(device, context.small)
    elements = 1 << 12 if context.small else 1 << 29  # 2 GiB
    copied, lerped = _limits(clock, device, elements, rounds)
    context.copy_bandwidth = 8 * elements / copied
    context.fact("copy limit", context.copy_bandwidth / 1e9, "GB/s", "read and write counted")
    context.fact("lerp_ limit", 12 * elements / lerped / 1e9, "GB/s", "12 bytes an element")
    one = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    one.add_(1)
    with torch.cuda.graph(graph):
        one.add_(1)
    seconds = _median_seconds(clock, graph.replay, rounds)
    context.fact("smallest kernel, graph cold", 1e6 * seconds, "us", "events around one replay")
    several = _several(lambda: one.add_(1), CALLS)
    seconds = statistics.median(clock.repeated(several, CALLS) for _ in range(rounds))
    context.fact("smallest kernel, graph", 1e6 * seconds, "us", "back to back")
    torch.cuda.empty_cache()

    # What someone waits for who runs one update in a new process.
    try:
        text = _output(
            [sys.executable, "-c", FIRST_UPDATE], max(20.0, context.left()),
            env={**os.environ, "PYTHONPATH": _python_path()},
        )  # fmt: skip
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        context.remark(f"time until the first update: {error}")
    else:
        for what, value in zip(
            ("import torch", "import swa_fast", "first CUDA tensor", "first update", "second"),
            map(float, text.split()), strict=True,
        ):  # fmt: skip
            context.fact(f"{what}, in a new process", value, "s")
    if not simulated():
        compile_ptx(context)


def compile_ptx(context: Context) -> None:
    """How long the driver takes to compile the library's PTX, as at the first use on a GPU that
    the library has no code for. (The environment variable that forces it stops torch's own
    kernels, most of which have no PTX.)"""
    tool = shutil.which("cuobjdump")
    library = Path(swa_fast.__file__).with_name("_C_cuda.abi3.so")
    if tool is None or not library.exists():
        context.remark("no cuobjdump or no CUDA library: the compilation of PTX was not timed")
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        with tempfile.TemporaryDirectory() as folder:
            _output([tool, "--extract-ptx", "all", str(library)], 20, cwd=folder)
            # Named as a_b_cuda.N.sm_NN.ptx; the driver takes none for later devices.
            major, minor = torch.cuda.get_device_capability(context.device)
            files = [
                file
                for file in sorted(Path(folder).glob("*.ptx"))
                if int(file.stem.rpartition("sm_")[2].rstrip("af")) <= 10 * major + minor
            ]
            for file in files:
                module = ctypes.c_void_p()
                begin = time.perf_counter()
                status = driver.cuModuleLoadData(ctypes.byref(module), file.read_bytes() + b"\0")
                seconds = time.perf_counter() - begin
                if status == 0:
                    driver.cuModuleUnload(module)
                    # A second time comes from the driver's cache.
                    context.fact(f"PTX compiled by the driver, {file.stem}", seconds, "s")
                else:
                    context.remark(f"PTX of {file.stem}: the driver answered {status}")
            if not files:
                context.remark("the library holds no PTX for this device")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        context.remark(f"PTX: {error}")


def _python_path() -> str:
    """With which a new process imports the same swa_fast as this one."""
    place = str(Path(swa_fast.__file__).resolve().parent.parent)
    return os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])


# ---------------------------------------------------------------------------------- b: the tests

# A test of each kernel and of what only a real device can show: streams, graphs, no waiting.
CHOSEN = "(graph or stream or stochastic or misaligned or unaligned or estimator) and not triton"


def step_tests(context: Context) -> None:
    """Whether results are right here: self-checks, then a chosen part of the tests."""
    for name, state in __main__.report()["backends"].items():
        context.fact(f"self-check, {name}", state["self_check"] or f"not usable: {state['reason']}")
    if context.device.type == "cuda" and torch.cuda.device_count() > 1:
        second_device(context)
    if not (ROOT / "tests" / "conftest.py").exists():
        context.remark("the tests are not beside bench/, so none of them ran")
        return
    if context.small or context.device.type != "cuda":
        selection = ["--collect-only"] if context.device.type == "cuda" else ["--version"]
    else:
        selection = []
    if not context.small and importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into the host's work and Triton's compiler.
        selection += ["-n", str(min(8, os.cpu_count() or 1))]
    allowed = 120.0 if context.small else max(10.0, min(60.0, context.left() - 2))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", "gpu", "-k", CHOSEN,
            "-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}", *selection,
            *(str(ROOT / "tests" / f) for f in ("test_averager.py", "test_update_bn.py")
              if (ROOT / "tests" / f).exists()),
        ]  # fmt: skip
        try:
            found = subprocess.run(
                command, capture_output=True, text=True, timeout=allowed, check=False, cwd=folder,
                env={**os.environ, "PYTHONPATH": _python_path()},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            tail = (error.stdout or b"").decode(errors="replace").strip().splitlines()[-1:]
            context.remark(f"the tests did not end within {allowed:.0f} s; last line: {tail}")
            return
        lines = found.stdout.strip().splitlines() or [found.stderr.strip()[-200:]]
        context.fact("chosen gpu tests", lines[-1])
        for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]:
            context.remark(line)


def second_device(context: Context) -> None:
    """An update on the device that is not the current one."""
    with torch.cuda.device(0):
        model = nn.Linear(64, 64).to("cuda:1")
        averager = Averager(model, {"swa": SWA()})
        for _ in range(3):
            averager.update()
        error = (averager.averages["swa"]["weight"] - model.weight).abs().max().item()
    context.fact("update on the second of two GPUs", "right" if error < 1e-6 else f"off by {error}")


# ---------------------------------------------------------------------- c, d: updates, BatchNorm


def step_update(context: Context) -> None:
    """Updates of averages beside what else does them."""
    from gpu_cases import update_cases

    cases = update_cases(context.device, context.small)
    measure_all(context, cases, max(0.05, 0.5 * context.left() / len(cases)))


def step_batch_norm(context: Context) -> None:
    """BatchNorm layers and statistics beside torch's and cuDNN's, then whole passes."""
    from gpu_cases import batch_norm_cases

    share = 0.3 * context.left()
    measure_passes(context, share)
    cases = batch_norm_cases(context.device, context.small)
    measure_all(context, cases, max(0.02, 0.4 * context.left() / len(cases)))


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def measure_passes(context: Context, seconds: float) -> None:
    """Whole BatchNorm passes, wall-clock time of a batch."""
    import bench_update_bn

    def forward(batches: list[torch.Tensor], model: nn.Module) -> None:
        with torch.no_grad(), _eval_mode(model):
            for batch in batches:
                model(batch)

    passes: dict[str, tuple[str, Any]] = {
        "forward in eval mode": ("limit", forward),
        "torch": ("competitor", swa_utils.update_bn),
        "swa_fast": (OURS, swa_fast.update_bn),
        "swa_fast, captured forward": (OURS, functools.partial(swa_fast.update_bn, graph=True)),
    }
    # The forward is captured after three batches: in the small size one is replayed, in the full
    # size 21 of 24.
    count = 4 if context.small else 24
    settings = [("preresnet20", 2, False)] if context.small else [
        ("preresnet164", 128, False), ("resnet50", 64, True), ("preresnet20", 128, False),
    ]  # fmt: skip
    about = facts(context.device)
    for name, images, bf16 in settings:
        model, batches = bench_update_bn.make(name, images, 1)
        model = model.to(context.device, memory_format=torch.channels_last)
        batch = batches[0].to(context.device, memory_format=torch.channels_last)
        given = [batch] * count
        autocast = functools.partial(
            torch.autocast, context.device.type, torch.bfloat16, enabled=bf16
        )
        ready: dict[str, Any] = {}
        exact = {} if bf16 else bench_update_bn.exact_statistics(model, [batch])["torch"]
        rows: dict[str, dict[str, Any]] = {}
        for label, (side, run) in passes.items():
            rows[label] = {
                "op": "update_bn, a batch", "contender": label, "side": side,
                "model": f"{name}, {images} images", "parameters": batch.numel(),
                "tensors": sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
                "dtype": "bfloat16" if bf16 else "float32", "mode": "pass", "clock": "wall",
                **about,
            }  # fmt: skip
            try:
                # Rounded to TF32, convolutions would hide what the statistics are off by.
                with autocast(), _without_tf32():
                    run(given, model)
                if side != "limit":
                    error, layer = bench_update_bn.largest_error(model, exact)
                    assert error <= 1e-3, f"{layer} is off by {error:.2g}"
            except Exception as failure:  # a contender's fault must not end the others' turns
                status = "wrong" if side == OURS else "not served"
                text = (str(failure) or type(failure).__name__).splitlines()[0][:160]
                context.row(Row(**rows[label], status=status, reason=text))
            else:
                ready[label] = run
        times: dict[str, list[float]] = {label: [] for label in ready}
        start = time.monotonic()
        for number in range(2 if context.small else 20):
            for label in random.Random(number).sample(sorted(ready), len(ready)):
                with autocast():
                    _wait(context.device)
                    begin = time.perf_counter()
                    ready[label](given, model)
                    _wait(context.device)
                times[label].append((time.perf_counter() - begin) / count)
            if number >= 2 and time.monotonic() - start > seconds / len(settings):
                break
        for label, values in times.items():
            low, median, high = quartiles(values)
            context.row(Row(
                **rows[label], status="ok", rounds=len(values), q1=low, median=median, q3=high,
            ))  # fmt: skip
        del model, batches, batch, given, ready
        gc.collect()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------- e: swaps, the CPU, no waiting


def step_around(context: Context) -> None:
    """The average put into the model, linear combinations of weights, averages kept on the CPU, and
    who waits for the device."""
    import bench_combine
    import bench_swap
    from models import make_model

    device = context.device
    wanted = ("PreResNet-20",) if context.small else ("ResNet-50", "ViT-L/16")
    cases = [
        dataclasses.replace(
            case, model=name, make=functools.partial(make_model, name, torch.float32, device)
        )
        for case in bench_swap.cases(device)[:1]
        for name in wanted
    ]
    plane = "494 in 494 tensors" if context.small else "ResNet-50"
    cases.append(bench_combine.case_of(plane, device))
    measure_all(context, cases, 0.12 * context.left())
    if device.type != "cuda":
        return
    for name in wanted[:1]:
        on_the_cpu(context, make_model(name, torch.float32, device), name)
    without_waiting(context)
    counted(context)


def on_the_cpu(context: Context, model: nn.Module, name: str) -> None:
    import counts

    for label, options in (("blocking", {}), ("overlapped", {"overlap": True})):
        try:
            averager = Averager(model, {"ema": EMA(0.999)}, device="cpu", **options)
            averager.update()
        except TypeError as error:
            context.remark(f"averages on the CPU, {label}: not in this version ({error})")
            continue
        times = []
        for _ in range(2 if context.small else 8):
            _wait(context.device)
            begin = time.perf_counter()
            averager.update()
            times.append(time.perf_counter() - begin)
        context.fact(
            f"average on the CPU, {label}, {name}", 1e3 * statistics.median(times), "ms",
            "host, an update",
        )  # fmt: skip
        source = counts.simulator_counts if simulated() else counts.profiler_counts
        with contextlib.suppress(RuntimeError):
            found = source(averager.update)
            context.fact(
                f"average on the CPU, {label}, {name}: waits and copies",
                f"{found['host_syncs']} and {found['copies']}",
            )


def without_waiting(context: Context) -> None:
    """torch's own detector of calls that wait for the device, around everything of ours."""
    device = context.device
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(device)
    batches = [torch.rand(4, 3, 8, 8, device=device) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=not simulated())
    scaler = torch.amp.GradScaler("cuda")
    averager = Averager(model, {"swa": SWA(), "ema": EMA(0.99)}, on_nonfinite="skip")
    averager.update()

    def applied() -> None:
        with averager.applied("ema"):
            pass

    def scaled_step() -> None:
        optimizer.zero_grad()
        scaler.scale(model(batches[0]).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    parts: dict[str, Run] = {"update": averager.update, "applied": applied}
    if hasattr(averager, "attach"):
        handle = averager.attach(optimizer)
        scaled_step()
        parts["a step with attach and GradScaler"] = scaled_step
    else:
        context.remark("Averager of this version has no attach: update() was called by hand")
        scaled_step()
        handle = None
    for name, run in parts.items():
        run()
        _wait(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            context.fact(f"waits for the device: {name}", str(error).splitlines()[0])
        else:
            context.fact(f"waits for the device: {name}", "never")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if handle is not None:
        handle.remove()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            swa_fast.update_bn(batches, model)
        waits = [w for w in caught if "synchroniz" in str(w.message)]
        context.fact("waits for the device: a pass of update_bn", len(waits), "", "at its end")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def counted(context: Context) -> None:
    """Launches of one update and of one batch of the pass, by the profiler."""
    import counts
    from models import make_model

    model = make_model("PreResNet-20", torch.float32, context.device)
    for backend in ("cuda", "triton"):
        averager = Averager(model, {"swa": SWA()}, backend=backend)
        averager.update()
        source = counts.simulator_counts if simulated() else counts.profiler_counts
        try:
            found = source(averager.update)
        except RuntimeError as error:
            context.remark(f"counts of an update, {backend}: {error}")
            return
        shown = {k: v for k, v in found.items() if v is not None}
        context.fact(
            f"an update of 65 tensors and their buffers, {backend}",
            ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in shown.items()),
        )


# ------------------------------------------------------------------------- f: inside the kernels

NCU_SECTIONS = ("Occupancy", "LaunchStats", "WarpStateStats")
# Instead of the section that has them among dozens of others: each few cost a pass of the kernel.
NCU_METRICS = "gpu__time_duration.sum,gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
# Ours among the launches of --kernels.
NCU_KERNELS = "regex:update_kernel|statistics|normalise|merge_kernel|nonfinite|swap|combine"


def _in_and_out(averager: Averager) -> None:
    with averager.applied("swa"):
        pass


def run_kernels(small: bool, backends: Sequence[str] = ("cuda", "triton")) -> None:
    """Each of our kernels at one representative size: what profilers look at."""
    from gpu_cases import _collect, _inputs
    from models import make_model

    device = torch.device("cuda")
    name = "PreResNet-20" if small else "ResNet-50"
    model = make_model(name, torch.float32, device)
    shape = (2, 8, 6, 6) if small else (64, 256, 56, 56)
    plane = torch.rand((3, 1 << (12 if small else 22)), device=device)
    points, weights = torch.empty((4, *plane.shape[1:]), device=device), torch.ones(4, 3).double()
    runs: list[Run] = []
    for backend in backends:
        averager = Averager(model, {"swa": SWA()}, backend=backend, on_nonfinite="skip")
        runs += [averager.update, functools.partial(_in_and_out, averager)]
        for layout, dtype in (("channels_last", torch.bfloat16), ("contiguous", torch.float32)):
            runs.append(_collect(True, backend, _inputs(shape, layout, dtype, device)).run)
        accumulators = torch.zeros((9, 64 if small else 24_000), dtype=torch.float64, device=device)
        batch = torch.ones_like(accumulators[:4])
        runs.append(functools.partial(
            _ops.batch_norm_merge_, accumulators, batch, "pooled", backend=backend))  # fmt: skip
        runs.append(functools.partial(
            swa_fast.combine_, list(points), list(plane), weights, backend=backend))  # fmt: skip
    for run in runs:
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    # With --profile-from-start off a profiler sees what follows, where everything is warm.
    torch.cuda.cudart().cudaProfilerStart()
    for run in runs:
        run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """One entry for each profiled launch, from ``ncu --csv --page raw``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu printed no table")
    rows = list(csv.DictReader(lines[start:]))
    found = []
    for row in rows[1:] if rows and not rows[0]["ID"].strip() else rows:  # the first holds units

        def number(name: str, row: Mapping[str, str] = row) -> float | None:
            try:
                return float(row[name].replace(",", ""))
            except (KeyError, ValueError):
                return None

        stalls = {
            match[1]: value
            for name in row
            if (match := re.fullmatch(
                r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio", name))
            and not match[1].endswith("not_issued") and (value := number(name)) is not None
        }  # fmt: skip
        found.append({
            "kernel": row.get("Kernel Name", ""),
            "us": _microseconds(row, number),
            "dram %": number("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"),
            "occupancy %": number("sm__warps_active.avg.pct_of_peak_sustained_active"),
            "registers": number("launch__registers_per_thread"),
            "blocks": number("launch__grid_size"),
            "first stall": max(stalls, key=lambda k: stalls[k]) if stalls else None,
        })  # fmt: skip
    return found


def _microseconds(row: Mapping[str, str], number: Callable[[str], float | None]) -> float | None:
    value = number("gpu__time_duration.sum")
    return None if value is None else value / 1e3 if value > 1e3 else value


def step_inside(context: Context) -> None:
    """What ncu and compute-sanitizer say of our kernels, where they are installed."""
    if context.device.type != "cuda":
        return
    command = [sys.executable, str(HERE / "gpu_report.py"), "--kernels"]
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    if simulated():
        run_kernels(True)
        context.remark("ncu and compute-sanitizer cannot look at a simulated device")
        return
    if shutil.which("ncu") is None:
        context.remark("ncu is not installed")
    else:
        sections = [word for section in NCU_SECTIONS for word in ("--section", section)]
        # One after the other, so that a slow one takes nothing from the one before.
        for backend, share in (("cuda", 0.6), ("triton", 0.7)):
            try:
                text = _output(
                    ["ncu", "--csv", "--page", "raw", "--clock-control", "none",
                     "--profile-from-start", "off", "--metrics", NCU_METRICS, *sections,
                     "--kernel-name", NCU_KERNELS, *command, backend,
                     *(["--rehearse"] if context.small else [])],
                    max(15.0, share * context.left()), env=environment,
                )  # fmt: skip
                for entry in parse_ncu(text):
                    context.emit({"ncu": entry})
            except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                context.remark(f"ncu, {backend}: {str(error).splitlines()[0][-300:]}")
    if shutil.which("compute-sanitizer") is None:
        context.remark("compute-sanitizer is not installed")
        return
    for tool in ("memcheck", "racecheck"):
        if context.left() < 8:
            context.remark(f"compute-sanitizer {tool}: no time left")
            continue
        try:
            found = subprocess.run(
                ["compute-sanitizer", "--tool", tool, *command, "all", "--rehearse"],
                capture_output=True, text=True, timeout=max(8.0, context.left()), check=False,
                env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            context.remark(f"compute-sanitizer {tool} did not end in time")
            continue
        said = [line for line in found.stdout.splitlines() if "SUMMARY" in line]
        context.fact(f"compute-sanitizer {tool}", (said or ["no summary"])[-1].strip("= "))


# ------------------------------------------------------------------------------- g: the trainer


def step_trainer(context: Context) -> None:
    """Epochs of PreResNet-164 with the trainer, on made-up images of CIFAR's size."""
    model, epochs = ("preresnet8", 2) if context.small else ("preresnet164", 2)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "swa_fast.train", "--dataset", "synthetic", "--model",
            model, "--width", "8" if context.small else "16", "--epochs", str(epochs), "--methods",
            "ema", "--batch-size", "128", "--quiet", "--out", str(out), "--device",
            context.device.type, *(["--fraction", "0.1"] if context.small else []),
        ]  # fmt: skip
        _output(
            command, 150.0 if context.small else max(20.0, context.left()), cwd=folder,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )  # fmt: skip
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    # The last epoch counts, of the trajectory that averages at every step; the first one warms up.
    records = [r for r in results["records"] if "ema" in r["averages"]]
    seconds = records[-1]["seconds"]
    images = results["data"]["train_images"]
    training = sum(seconds[phase] for phase in ("data", "forward_backward", "optimizer"))
    context.fact(f"trainer, {model}", images / (training + seconds["average"]), "images/s")
    context.fact("trainer, share of averaging at every step",
                 100 * seconds["average"] / (training + seconds["average"]), "%")  # fmt: skip
    passes = [r["seconds"] for r in results["records"] if r["seconds"]["bn"]]
    if passes:
        context.fact("trainer, a BatchNorm pass beside an epoch",
                     100 * passes[-1]["bn"] / training, "%")  # fmt: skip
    if model == "preresnet164":
        # The preset trains 1.5 budgets of 150 epochs with SWA, of which 125 are shared with SGD,
        # and 150 more cyclically: about 400 epochs of 50,000 images.
        hours = 400 * 50_000 / images * training / 3600
        context.fact("trainer, preset cifar100-preresnet164, one seed, about", hours, "h")


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    title: str
    share: float  # of the minutes
    run: Callable[[Context], None]


STEPS = (
    Step("a", "The machine", 0.10, step_facts),
    Step("b", "Tests", 0.10, step_tests),
    Step("c", "Updates of averages", 0.22, step_update),
    Step("d", "BatchNorm", 0.22, step_batch_norm),
    Step("e", "Swap, combinations, CPU averages, waits", 0.06, step_around),
    Step("f", "Inside the kernels", 0.19, step_inside),
    Step("g", "Trainer", 0.11, step_trainer),
)
