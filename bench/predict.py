"""What the kernels should take on a GPU, from a model that PREDICTIONS.md explains.

    python bench/predict.py            writes predictions.json for the kernels as they are
    python bench/predict.py --print    prints it as a table, with what it has been off by
    python bench/predict.py --uncertainty  by what the predictions for a GPU were off

Times are of ``bench/gpu_report.py``'s modes ``graph`` (back to back) and ``graph cold``. They are
written before a run and not adjusted to what it measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swa_fast import _layout as layout

__all__ = [
    "MACHINES",
    "Launch",
    "Machine",
    "Spread",
    "expected",
    "key",
    "load",
    "machine_of",
    "seconds",
    "spread_of",
    "spreads",
]

FILE = Path(__file__).resolve().parent / "predictions.json"
# What was measured beside the predictions for the same kernels.
MEASURED = FILE.parent / "results" / "gpu" / "h100" / "report.json"
MODES = ("graph", "graph cold")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bandwidths by the vendors' data sheets; latencies as published microbenchmarks have them."""

    multiprocessors: int
    bandwidth: float  # of the memory, bytes a second, peak
    cache: int  # L2, bytes
    cache_bandwidth: float  # of L2, bytes a second
    latency: float  # of a load from memory, s
    cache_latency: float  # of a load from L2, s


MACHINES = {
    "A100": Machine(108, 2039e9, 40 << 20, 4.0e12, 560e-9, 200e-9),
    "H100": Machine(132, 3350e9, 50 << 20, 5.5e12, 600e-9, 220e-9),
    "H200": Machine(132, 4800e9, 50 << 20, 5.5e12, 600e-9, 220e-9),
    "B200": Machine(148, 8000e9, 126 << 20, 10e12, 700e-9, 260e-9),
}
ACHIEVABLE = 0.90  # share of the peak bandwidth that a large copy reaches
COLD_START = 4.0e-6  # s: two events, a replay, code that is not in the caches
GAP = 1.5e-6  # s: from one kernel of a graph to the next
CACHED = 0.6  # share of L2 below which repeated calls find what they need there


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch as the model sees it."""

    read: int  # bytes
    written: int
    blocks: int
    resident: int  # blocks of a multiprocessor at a time
    in_flight: int  # bytes that a block has asked for before it waits
    chain: float  # loads from L2 or memory that wait for each other before the block's data
    tail: float = 0.0  # loads from L2, one after the other, when all blocks are done
    touched: int = 0  # bytes that repeated calls would need in L2; 0: read + written


def seconds(machine: Machine, launch: Launch, mode: str) -> float:
    """Time of one launch: a fixed cost, the largest of three terms, and the tail."""
    touched = launch.touched or launch.read + launch.written
    cached = mode == "graph" and touched <= CACHED * machine.cache
    bandwidth = machine.cache_bandwidth if cached else ACHIEVABLE * machine.bandwidth
    latency = machine.cache_latency if cached else machine.latency
    slots = machine.multiprocessors * launch.resident
    moving = (launch.read + launch.written) / bandwidth
    asked = min(launch.blocks, slots) * launch.in_flight
    little = launch.read * latency / asked
    waves = math.ceil(launch.blocks / slots)
    waiting = waves * (launch.chain * machine.cache_latency + latency)
    fixed = COLD_START if mode == "graph cold" else GAP
    return fixed + max(moving, little, waiting) + launch.tail * machine.cache_latency


# ------------------------------------------------------------------- the kernels' own geometry

# csrc/update_cuda.cu: a block takes a long segment, or eight short ones, a warp each.
LONG, SHORT, SHORT_PER_BLOCK = layout.CUDA_SEGMENT_BYTES, layout.CUDA_SHORT_BYTES, 8
# kernels/update.py: a program takes a segment of so many elements of any type.
PIECE = layout.TRITON_SEGMENT
UPDATE = {
    "cuda": {"resident": 4, "in_flight": 256 * 128, "chain": 4.0},
    "triton": {"resident": 4, "in_flight": 128 * 128, "chain": 8.0},
}
STOCHASTIC = {
    "cuda": {"resident": 4, "in_flight": 256 * 64, "chain": 4.0},
    "triton": {"resident": 3, "in_flight": 128 * 64, "chain": 8.0},
}


def pieces(tensors: Sequence[tuple[int, int]], backend: str) -> tuple[int, int]:
    """How many pieces tensors are cut into, and into how many blocks those go.

    Args:
        tensors: of each, its elements and the bytes of one in the wider type of source and average.
        backend: ``"cuda"`` or ``"triton"``.
    """
    found = short = 0
    for elements, wider in tensors:
        most = LONG // wider if backend == "cuda" else PIECE
        found += _up(elements, most)
        short += elements > 0 and (elements % most or most) * wider <= SHORT
    if backend == "triton":
        return found, found
    return found, found - short + _up(short, SHORT_PER_BLOCK)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def update_launch(
    sizes: Sequence[int], buffers: Sequence[int], source: int, average: int, averages: int,
    backend: str, stochastic: bool = False,
) -> Launch:  # fmt: skip
    """``sizes``: elements of each tensor; ``source`` and ``average``: bytes of an element;
    ``buffers``: bytes of each tensor that is copied."""
    elements = sum(sizes)
    wider = max(source, average)
    tensors = [(n, wider) for n in sizes] + [(n, 1) for n in buffers]
    entries, blocks = pieces(tensors, backend)
    facts = (STOCHASTIC if stochastic else UPDATE)[backend]
    table = (24 + 8 * averages) * entries
    chain = facts["chain"] + 1.0 * (averages - 1)
    return Launch(
        read=elements * (source + average * averages) + sum(buffers) + table,
        written=elements * average * averages + sum(buffers) * averages,
        blocks=blocks, resident=int(facts["resident"]), in_flight=int(facts["in_flight"]),
        chain=chain, touched=elements * (source + average * averages),
    )  # fmt: skip


def nonfinite_launch(sizes: Sequence[int], source: int, backend: str) -> Launch:
    elements = sum(sizes)
    _, blocks = pieces([(n, source) for n in sizes], backend)
    return Launch(elements * source, 0, blocks, resident=8, in_flight=256 * 32, chain=1.0)


# csrc/batch_norm_cuda.cu and kernels/batch_norm.py: bytes of a row that a tile of channels fills,
# blocks of a launch, units a thread below which there are half as many, sums of other blocks that
# are added up without dividing the blocks into groups (loads of a thread, eight at a time).
LINE, BLOCKS, FEW_UNITS, ALONE, AT_ONCE = 128, 1024, 32, 32, 8
TRITON_LINES = {"statistics": 128, "output": 512}
TRITON_BLOCK = {"statistics": 1024, "output": 2048}
TRITON_IN_FLIGHT, TRITON_LEAST, TRITON_SPLITS = 128, 16384, 1024


def _cuda_layer(
    n: int, c: int, s: int, size: int, channels_last: bool, statistics: bool
) -> tuple[int, float, int]:
    """Blocks, loads of the last one that wait for each other, bytes that a block asks for."""
    most_elements = min(4 if channels_last else 8, 16 // size)
    line = c if channels_last else s
    pack = next(p for p in (8, 4, 2, 1) if p <= most_elements and line % p == 0)
    unroll = 4 if pack * size == 16 else 8
    lanes = 1
    if channels_last:
        packs = c // pack
        if statistics:
            largest = min(32, LINE // (pack * size))
            while lanes < largest and lanes < packs:
                lanes *= 2
            if lanes == largest > 1 and 8 * (_up(packs, lanes) * lanes - packs) > packs:
                lanes //= 2
        elif packs <= 64:
            lanes = packs
        else:
            units = LINE // (pack * size)
            lanes = min(64, _up(_up(packs, _up(packs, 64)), units) * units)
        tiles, units, beside = _up(packs, lanes), n * s, 256 // lanes
    else:
        tiles, units, beside = c, n * (s // pack), 256
    few = units * tiles < FEW_UNITS * beside * BLOCKS
    wanted = min(1024, _up(units, beside * unroll), _up(BLOCKS // 2 if few else BLOCKS, tiles))
    each = _up(_up(units, beside * wanted), unroll) * unroll
    splits = _up(units, beside * each)
    channels = lanes * pack if channels_last else 1
    tickets = min(channels, c - (tiles - 1) * channels)
    if splits == 1:
        tail = 0.0
    elif splits * channels <= ALONE * 256 or tickets <= 2:
        tail = 3.0 + _up(_up(splits * channels, 256), AT_ONCE)
    else:
        groups = min(math.isqrt(splits - 1) + 1, tickets - 1)
        of_a_group = _up(splits, groups)
        tail = 5.0 + sum(_up(_up(k * channels, 256), AT_ONCE) for k in (of_a_group, groups))
    return tiles * splits, tail, 256 * unroll * pack * size


def _triton_layer(
    n: int, c: int, s: int, size: int, channels_last: bool, statistics: bool
) -> tuple[int, float, int]:
    which = "statistics" if statistics else "output"
    block = TRITON_BLOCK[which]
    samples, length = (n * s, 1) if channels_last else (n, s)
    if channels_last:
        columns = min(1 << (c - 1).bit_length(), TRITON_LINES[which] // size)
        tiles, width = _up(c, columns), columns
    else:
        columns = min(1 << (s - 1).bit_length(), block // 2)
        tiles, width = c, 1
    unroll = TRITON_IN_FLIGHT * 128 // (block * size) if statistics else 1
    steps = _up(samples, block // columns) * _up(length, columns)
    wanted = min(TRITON_SPLITS, _up(steps, TRITON_LEAST // block), _up(BLOCKS, tiles))
    each = _up(_up(steps, wanted), unroll) * unroll
    splits = _up(steps, each)
    at_once = min(2048 // width, 512)
    tickets = min(width, c - (tiles - 1) * width)
    if splits == 1:
        tail = 0.0
    elif splits <= at_once or tickets <= 2:
        tail = 3.0 + _up(splits, at_once)
    else:
        of_a_group = _up(splits, min(math.isqrt(splits - 1) + 1, tickets - 1))
        tail = 5.0 + _up(of_a_group, at_once) + _up(_up(splits, of_a_group), at_once)
    return tiles * splits, tail, block * size * unroll


# The blocks' geometry, and how many are resident, of 256 threads or 128.
LAYERS = {"cuda": (_cuda_layer, 3), "triton": (_triton_layer, 3)}


def batch_norm_launches(
    shape: Sequence[int], size: int, channels_last: bool, normalise: bool, backend: str
) -> list[Launch]:
    """``size``: bytes of an element."""
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    moved = n * c * s * size
    layer, resident = LAYERS[backend]
    blocks, tail, in_flight = layer(n, c, s, size, channels_last, True)
    found = [Launch(moved, 0, blocks, resident, in_flight, chain=2.0, tail=tail)]
    if normalise:
        blocks, _, in_flight = layer(n, c, s, size, channels_last, False)
        found.append(Launch(moved, moved, blocks, resident, in_flight, chain=2.0))
    return found


def _total(machine: Machine, launches: Sequence[Launch], mode: str) -> float:
    """The time of launches one after the other; a later one may find in L2 what the first read."""
    first = seconds(machine, launches[0], mode)
    rest = 0.0
    for launch in launches[1:]:
        warm = "graph" if launch.read <= CACHED * machine.cache else mode
        rest += seconds(machine, launch, warm) + (GAP if warm == "graph cold" else 0.0)
        if warm == "graph cold":
            rest -= COLD_START
    return first + rest


# ---------------------------------------------------------------------------------- the cases


def _update_launches(op: str, contender: str, shared: Any, dtype: str) -> list[Launch]:
    sizes = [p.numel() for p in shared.parameters()]
    buffers = [b.numel() * b.element_size() for b in shared.buffers()]
    if "no buffers" in contender:
        buffers = []
    source = 2 if dtype == "bfloat16" else 4
    backend = "triton" if contender.endswith("triton") else "cuda"
    average = 2 if op.startswith("bf16 average") else 4
    averages = 3 if "3 averages" in op else 1
    launches = [
        update_launch(
            sizes, buffers, source, average, averages, backend, op.startswith("bf16 average")
        )
    ]
    if "NaN" in op:
        launches.insert(0, nonfinite_launch(sizes, source, backend))
    return launches


# The contenders whose launches the model knows, without the backend.
KNOWN = (
    "Averager SWA", "Averager EMA", "Averager EMA, no buffers", "Averager EMA, warm-up",
    "Averager Power", "AveragedModel", "Averager, 3 averages", "swa_fast",
)  # fmt: skip


def launches_of(case: Any, contender: str, shared: Any) -> list[Launch] | None:
    """What a contender of ours launches in a case of ``bench/harness.py``; None where the model
    does not know."""
    if contender.removesuffix(", triton") not in KNOWN:
        return None
    if case.op in ("BN layer", "BN statistics"):
        size = 2 if case.dtype == "bfloat16" else 4
        shape = [int(part) for part in case.model.split()[0].split("x")]
        return batch_norm_launches(
            shape, size, "channels_last" in case.model, case.op == "BN layer",
            "triton" if contender.endswith("triton") else "cuda",
        )  # fmt: skip
    return _update_launches(case.op, contender, shared, case.dtype)


def expected(
    case: Any, contender: str, shared: Any, machine: str, mode: str = "graph"
) -> float | None:
    """Seconds of a contender of ours; None where the model does not know it."""
    launches = launches_of(case, contender, shared)
    return None if launches is None else _total(MACHINES[machine], launches, mode)


def predictions() -> dict[str, dict[str, float]]:
    """Seconds of our contenders, by machine and by what :func:`key` makes of a row."""
    import gpu_cases
    import torch
    from rows import OURS

    meta = torch.device("meta")
    found: dict[str, dict[str, float]] = {}
    for case in (
        *gpu_cases.update_cases(meta, small=False), *gpu_cases.batch_norm_cases(meta, small=False)
    ):  # fmt: skip
        shared = case.make()
        for name, contender in case.contenders.items():
            if contender.side != OURS:
                continue
            launches = launches_of(case, name, shared)
            if launches is None:
                raise ValueError(f"the model knows no contender {name!r}")
            for mode in MODES:
                row = {
                    "op": case.op, "model": case.model, "dtype": case.dtype, "contender": name,
                    "mode": mode,
                }  # fmt: skip
                found[key(row)] = {
                    machine: float(f"{_total(facts, launches, mode):.3g}")
                    for machine, facts in MACHINES.items()
                }
    return found


# ---------------------------------------------------------------------------------- uncertainty


@dataclasses.dataclass(frozen=True)
class Spread:
    """Measured over predicted: what a tenth, half and nine tenths of the times stayed below."""

    low: float
    median: float
    high: float
    count: int


def _family(what: str, contender: str) -> tuple[str, str]:
    """Kernel and backend of a prediction; ``what`` names operation and model."""
    backend = "Triton" if contender.endswith("triton") else "CUDA"
    if not what.startswith("BN"):
        return "updates", backend
    layout = "channels-last" if "channels_last" in what else "contiguous"
    return f"BatchNorm, {layout}", backend


@functools.cache
def spreads(path: Path = MEASURED) -> dict[tuple[str, str], Spread]:
    """By kernel and backend, from a GPU report that holds measured beside predicted times."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["predictions"]:
        family = _family(entry["what"], entry["contender"])
        ratios.setdefault(family, []).append(entry["measured"] / entry["predicted"])
    found = {}
    for family, values in sorted(ratios.items()):
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        found[family] = Spread(tenths[0], statistics.median(values), tenths[-1], len(values))
    return found


def spread_of(what: str, contender: str) -> Spread:
    return spreads()[_family(what, contender)]


def uncertainty() -> str:
    """The table of :func:`spreads` in Markdown."""
    lines = [
        "| kernels | backend | times | 10 % below | median | 90 % below |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (kernel, backend), s in spreads().items():
        lines.append(
            f"| {kernel} | {backend} | {s.count} | {s.low:.2f} | {s.median:.2f} | {s.high:.2f} |"
        )
    return "\n".join(lines)


def key(row: Mapping[str, Any]) -> str:
    return "|".join(str(row[name]) for name in ("op", "model", "dtype", "contender", "mode"))


def machine_of(device: str) -> str | None:
    """The machine whose name is part of ``device``."""
    return next((name for name in MACHINES if name in device), None)


@functools.cache
def load(path: Path = FILE) -> dict[str, dict[str, float]]:
    """Seconds by machine and key; empty where nothing was written."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="as a table, nothing is written")
    parser.add_argument(
        "--uncertainty", action="store_true",
        help="print measured over predicted times of the committed report; nothing is written",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.uncertainty:
        print(uncertainty())
        return 0
    found = predictions()
    if options.print:
        print(f"{'us by the model; times what it was off by on an H100, 10 to 90 %':110}"
              + "".join(f"{name:>9}" for name in MACHINES))  # fmt: skip
        for name, times in found.items():
            op, model, _, contender, _ = name.split("|")
            off = spread_of(f"{op}: {model}", contender)
            print(f"{name:110}" + "".join(f"{1e6 * t:9.1f}" for t in times.values())
                  + f"   x {off.low:.2f} - {off.high:.2f}")  # fmt: skip
        return 0
    machines = {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()}
    text = json.dumps({"machines": machines, "seconds": found}, indent=1) + "\n"
    part = options.out.with_name(f".{options.out.name}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
