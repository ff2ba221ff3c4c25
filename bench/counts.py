"""What one steady-state update and one BatchNorm batch cost a CUDA device: counted, not timed.

    python bench/counts.py                                     on whatever CUDA device is there
    python bench/counts.py --simulate                          on the simulator in tests/gpusim
    python bench/counts.py --out bench/results/counts.csv
    python bench/counts.py --source MODULE:FUNCTION            counts from somewhere else

For every contender and model: kernel launches, waits of the host, allocations, copies and, where
the source knows them, the bytes that kernels moved. Contenders are checked against fp64 first. A
batch of the BatchNorm pass is what a pass of five batches costs beyond one of four, with the
forward's own operators; the pass that only runs forwards tells how many those are.

On a real device the counts come from torch.profiler and from the allocator's statistics, and no
bytes are known. Under the simulator (``--simulate`` starts this script again under it) they come
from its counters, which count one operator of torch as one launch. ``--source`` (or the variable
SWA_FAST_COUNTS) names a function that is called with a function without arguments, runs it, and
returns a mapping with ``launches``, ``host_syncs``, ``allocations``, ``copies`` and, if known,
``bytes``.

No time is measured. ``AT LEAST`` is a bound, max(bytes / bandwidth, (launches + copies) * launch
cost), with the bytes counted or, where they are not known, those that the operation has to move.
``BY MODEL`` is what ``bench/predict.py`` expects of our kernels, called back to back, on the GPU
that is named first: that model knows waves of blocks and loads that wait for one another, too. Its
range is what its predictions were off by on an H100, from a tenth to nine tenths of them. Neither
knows the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import bench_average
import bench_batch_norm
import bench_k_averages
import bench_low_precision
import bench_update_bn
import predict
import torch
from harness import Case, Run, Size, _Ready, facts, select, simulated
from rows import OURS, write_table

import swa_fast
from swa_fast import _backends

__all__ = ["Counts", "least_seconds", "main", "profiler_counts", "simulator_counts"]

SIMULATOR = Path(__file__).resolve().parent.parent / "tests" / "gpusim"
# Peak bandwidth of the memory in GB/s by the vendor's data sheets.
BANDWIDTH = {"H200": 4800.0, "H100": 3350.0, "A100": 2039.0, "B200": 8000.0}
SUITES = [
    bench_average.SUITE,
    bench_k_averages.SUITE,
    bench_low_precision.SUITE,
    bench_batch_norm.SUITE,
]
MODELS = (
    "PreResNet-20", "PreResNet-164", "128x64x8x8 contiguous", "128x64x8x8 channels_last",
    "preresnet20", "preresnet164",
)  # fmt: skip
PASS = "batch of update_bn"
PASS_MODELS = ("preresnet20", "preresnet164")
IMAGES = 2  # of a batch: how many there are does not change what is counted


@dataclasses.dataclass(frozen=True)
class Counts:
    launches: int
    host_syncs: int
    allocations: int
    copies: int
    bytes: int | None = None  # by kernels; None: not known

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Counts:
        """Raises ValueError where a source leaves out what it has to say."""
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in found and name != "bytes"]
        if missing:
            raise ValueError(f"the source of counts returned no {', '.join(missing)}")
        return cls(**{name: found.get(name) for name in names})


Source = Callable[[Run], Mapping[str, Any]]


def least_seconds(
    counts: Counts, least_bytes: int | None, bandwidth: float, launch_cost: float
) -> float:
    """What it takes at least. ``bandwidth`` in bytes a second, ``launch_cost`` in seconds."""
    moved = least_bytes if counts.bytes is None else counts.bytes
    return max((moved or 0) / bandwidth, (counts.launches + counts.copies) * launch_cost)


def profiler_counts(run: Run) -> dict[str, int]:
    """From torch.profiler and the allocator's statistics."""
    from torch.profiler import ProfilerActivity, profile

    run()  # the profiler's own start would be counted with the first
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.synchronize()
    return count_events(profiled.events() or []) | {"allocations": after - before}


def count_events(events: Sequence[Any]) -> dict[str, int]:
    """Launches, copies and waits among a profiler's events, without the synchronisation of the
    device that ends the profile. Torch's blocking copies wait for their stream."""
    launches = copies = waits = 0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.name.startswith(("Memcpy", "Memset")):
                copies += 1
            else:
                launches += 1
        elif event.name in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            waits += 1
    return {"launches": launches, "copies": copies, "host_syncs": waits}


def simulator_counts(run: Run) -> dict[str, int | None]:
    """From the counters of gpusim. Operators of torch move bytes that it does not count, so bytes
    are known only where our own kernels did all the work."""
    gpusim = importlib.import_module("gpusim")
    torch.cuda.synchronize()
    gpusim.reset()
    run()
    counters = gpusim.counters()
    total = counters["total"]
    operators = total.get("aten_ops", 0)
    copies = sum(total.get(f"memcpy_{kind}", 0) for kind in ("DtoD", "DtoH", "HtoD"))
    copies += total.get("memset", 0)
    kernels = counters["kernels"].values()
    moved = sum(k["ld_bytes"] + k["st_bytes"] for k in kernels)
    return {
        "launches": total.get("kernel_launches", 0) + operators,
        "host_syncs": total.get("host_syncs", 0),
        "allocations": total.get("cudaMalloc", 0),
        "copies": copies,
        "bytes": None if operators or copies else moved,
    }


def simulate(folder: Path, arguments: Sequence[str]) -> NoReturn:
    """Starts this script again under the simulator in ``folder``, in place of this process. Raises
    FileNotFoundError where there is no simulator."""
    if not (folder / "__main__.py").is_file():
        raise FileNotFoundError(
            f"there is no simulator in {folder}: it is part of the repository and of the source "
            f"distribution, not of a wheel"
        )
    os.execv(
        sys.executable,
        [sys.executable, str(folder), "run", sys.executable, __file__, *arguments],
    )


def source_named(name: str) -> Source:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"--source: expected MODULE:FUNCTION, found {name!r}")
    found: Source = getattr(importlib.import_module(module), function)
    return found


def bandwidth_of(device: str) -> float | None:
    return next((value for name, value in BANDWIDTH.items() if name in device), None)


COLUMNS = [
    "op", "contender", "model", "dtype", "device", "counted by", "torch", "commit", "date",
    "launches", "host syncs", "allocations", "copies", "bytes counted", "bytes at least",
    "at least us", "model us", "model low us", "model high us",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counter:
    """Where counts come from, and what makes a time of them."""

    source: Source
    by: str
    bandwidth: float  # bytes per second
    launch_cost: float  # s
    machine: str | None = None  # whose model is asked; None: there is none of this device

    def row(
        self, op: str, contender: str, model: str, dtype: str, counts: Counts, least: int | None,
        expected: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Prints and returns the row of one contender. ``expected``: seconds by the model."""
        times = []
        if expected is not None:
            off = predict.spread_of(f"{op}: {model}", contender)
            times = [expected, off.low * expected, off.high * expected]
        range_ = "{:.3g} ({:.3g} - {:.3g})".format(*(1e6 * t for t in times)) if times else ""
        seconds = least_seconds(counts, least, self.bandwidth, self.launch_cost)
        line = (
            f"  {contender:34}{counts.launches:9}{counts.host_syncs:8}{counts.allocations:8}"
            f"{counts.copies:8}{'-' if counts.bytes is None else f'{counts.bytes:,}':>16}"
            f"{'-' if least is None else f'{least:,}':>16}{1e6 * seconds:15.1f}{range_:>22}"
        )
        print(line.rstrip())
        about = facts(torch.device("cuda"))
        if self.by == "simulator":
            about["device"] = "simulated"
        return {
            "op": op, "contender": contender, "model": model, "dtype": dtype,
            **{k: about[k] for k in ("device", "torch", "commit", "date")}, "counted by": self.by,
            "launches": counts.launches, "host syncs": counts.host_syncs,
            "allocations": counts.allocations, "copies": counts.copies,
            "bytes counted": "" if counts.bytes is None else counts.bytes,
            "bytes at least": "" if least is None else least,
            "at least us": f"{1e6 * seconds:.3g}",
            **{
                name: f"{1e6 * times[i]:.3g}" if times else ""
                for i, name in enumerate(("model us", "model low us", "model high us"))
            },
        }  # fmt: skip


def count_case(case: Case, counter: Counter) -> list[dict[str, Any]]:
    shared = case.make()
    size: Size = case.size(shared)
    found = []
    for name, contender in case.contenders.items():
        ready = _Ready(contender, shared, graph=False)
        if ready.work is None:
            print(f"  {name:34}{ready.status}: {ready.reason}")
            continue
        ready.work.run()
        counts = Counts.of(counter.source(ready.work.run))
        least = size.bytes if ready.work.bytes is None else ready.work.bytes
        expected = None
        if contender.side == OURS and counter.machine is not None:
            expected = predict.expected(case, name, shared, counter.machine)
        found.append(counter.row(case.op, name, case.model, case.dtype, counts, least, expected))
    return found


def count_pass(model: str, counter: Counter) -> list[dict[str, Any]]:
    """What one more batch costs a pass over PreResNet's images."""
    network, batches = bench_update_bn.make(model, IMAGES, 1)
    network, batch = network.cuda(), batches[0].cuda()
    names = (bench_update_bn.LIMIT, "torch", "fvcore-style PreciseBN", "swa_fast")
    passes = {name: bench_update_bn.PASSES[name][0] for name in names}
    if _backends.why_unusable("triton", "cuda") is None:
        passes["swa_fast, triton"] = functools.partial(swa_fast.update_bn, backend="triton")
    exact = bench_update_bn.exact_statistics(network, [batch])
    found = []
    for name, update in passes.items():
        # The first runs of a pass are unlike the others: nothing is fused or left out yet.
        four, five = (
            Counts.of(counter.source(functools.partial(update, [batch] * count, network)))
            for count in (4, 5)
        )
        # Equal batches, so the statistics are those of one of them.
        estimator = bench_update_bn.PASSES[name.removesuffix(", triton")][2]
        error, layer = bench_update_bn.largest_error(network, exact.get(estimator, {}))
        if not error <= 1e-3:
            print(f"  {name:34}wrong: {layer} is off by {error:.2g}")
            continue
        counts = Counts(
            five.launches - four.launches, five.host_syncs - four.host_syncs,
            five.allocations - four.allocations, five.copies - four.copies,
        )  # fmt: skip
        found.append(counter.row(PASS, name, model, "float32", counts, None))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="as bench/run.py --list names")
    parser.add_argument("--ops", nargs="+", help="only these operations")
    parser.add_argument(
        "--simulate", action="store_true", help="on the simulator of the tests, without a GPU"
    )
    parser.add_argument("--source", default=os.environ.get("SWA_FAST_COUNTS"))
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/s",
        help="of the device's memory, for the least time (default: the data sheet's peak)",
    )  # fmt: skip
    parser.add_argument(
        "--launch-cost", type=float, default=1.2, metavar="us",
        help="of a launch or copy, for the least time (default: %(default)s, the smallest kernel "
        "of a graph on an H100)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    options = parser.parse_args(arguments)
    if options.simulate and not simulated():
        try:
            simulate(SIMULATOR, sys.argv[1:] if arguments is None else arguments)
        except FileNotFoundError as problem:
            parser.error(f"--simulate: {problem}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; --simulate counts without one")
    source, by = profiler_counts, "torch.profiler"
    if options.source:
        source, by = source_named(options.source), options.source
    elif simulated():
        source, by = simulator_counts, "simulator"
    name = torch.cuda.get_device_name()
    bandwidth = options.bandwidth or bandwidth_of(name)
    if bandwidth is None:
        parser.error(f"--bandwidth: {name} is not in the table of this script")
    cases = select(
        SUITES, torch.device("cuda"), quick=False, ops=options.ops, models=options.models
    )
    models = [m for m in PASS_MODELS if m in options.models]
    if options.ops is not None and PASS not in options.ops:
        models = []
    if not cases and not models:
        parser.error("nothing is selected: see the operations and models of bench/run.py --list")
    head = (
        "launches   syncs  allocs  copies   bytes counted  bytes at least    AT LEAST, us"
        "          BY MODEL, us"
    )
    print(
        f"counted by {by}; times are bounds, by {bandwidth:g} GB/s and {options.launch_cost:g} us "
        f"a launch, and were not measured"
    )
    machine = predict.machine_of(name)
    if machine is not None:
        print(
            f"BY MODEL: as bench/PREDICTIONS.md has an {machine}; the range is what the model was "
            f"off by on an H100, from 10 to 90 % of its times"
        )
    counter = Counter(source, by, 1e9 * bandwidth, 1e-6 * options.launch_cost, machine)
    found = []
    for case in cases:
        print(f"\n{case.op}: {case.model}, {case.dtype}\n  {'':34}{head}", flush=True)
        found += count_case(case, counter)
    for model in models:
        print(f"\n{PASS}: {model}, float32\n  {'':34}{head}", flush=True)
        found += count_pass(model, counter)
    if options.out is not None:
        write_table(options.out, COLUMNS, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
