"""One BatchNorm layer that hands out its statistics, against torch's layer in training mode.

    python bench/bench_batch_norm.py                  # with malloc as update_bn sets it
    python bench/bench_batch_norm.py --pages fresh    # with malloc as it is
    make bench

``torch_layer`` is aten::native_batch_norm, ``torch_var_mean`` reads the input for the statistics
alone, and ``read`` and ``copy`` are what the machine's memory allows, for as many bytes as the
input has: a sum, and a copy to memory that is there. A layer has to read for the statistics, and to
read and write for the output, so no layer takes less than ``copy``, and one whose input no cache
holds no less than both together, the limit. Every contender's result is checked before it is timed.

Run as a program, contenders take turns, and page faults are counted: for a fresh mapping, which is
what malloc answers a large request with by default, the system clears page by page what the layer
is about to overwrite, and that takes several times as long as the layer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swa_fast import _ops
from swa_fast.batch_norm import _kept_memory

EPS = 1e-5
# The layers of PreResNet-164 at batch size 128, and of ResNet-50 at batch size 16.
SHAPES = (
    (128, 16, 32, 32),
    (128, 64, 32, 32),
    (128, 32, 16, 16),
    (128, 128, 16, 16),
    (128, 64, 8, 8),
    (128, 256, 8, 8),
    (16, 64, 112, 112),
    (16, 256, 56, 56),
    (16, 512, 28, 28),
    (16, 2048, 7, 7),
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def check_output(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, roundings: int = 4) -> None:
    exact = torch.nn.functional.batch_norm(
        x.double(), None, None, weight.double(), bias.double(), training=True, eps=EPS
    )
    tolerance = roundings * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def check_variance(variance: Tensor, x: Tensor) -> None:
    tolerance = 1e-5 if variance.dtype == torch.float64 else torch.finfo(variance.dtype).eps
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=tolerance, atol=0)


def swa_fast_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    batch = torch.empty((4, x.shape[1]), dtype=torch.float64)

    def layer() -> Tensor | None:
        return _ops.batch_norm_collect(x, weight, bias, EPS, batch)

    y = layer()
    assert y is not None
    check_output(y, x, weight, bias)
    check_variance(batch[3] / batch[0], x)
    return layer


def swa_fast_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    batch = torch.empty((4, x.shape[1]), dtype=torch.float64)

    def statistics() -> None:
        _ops.batch_norm_collect(x, weight, bias, EPS, batch, normalise=False)

    statistics()
    check_variance(batch[3] / batch[0], x)
    return statistics


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    mean, variance = torch.zeros(x.shape[1]), torch.ones(x.shape[1])

    def layer() -> Tensor:
        y: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, True, 0.1, EPS)[0]
        return y

    # In channels-last layout it adds up the rows in fp32, one after the other.
    rows = x.numel() // x.shape[1]
    check_output(layer(), x, weight, bias, 4 if x.dtype == torch.bfloat16 else math.isqrt(rows))
    return layer


def torch_var_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    def statistics() -> tuple[Tensor, Tensor]:
        return torch.var_mean(x, (0, 2, 3), correction=0)

    check_variance(statistics()[0], x)
    return statistics


def read(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    return torch.ones(x.numel() * x.element_size() // 4).sum


def copy(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    source = torch.ones(x.numel() * x.element_size() // 4)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


CONTENDERS = {
    "swa_fast": swa_fast_layer,
    "torch_layer": torch_layer,
    "read": read,
    "copy": copy,
    "swa_fast_statistics": swa_fast_statistics,
    "torch_var_mean": torch_var_mean,
}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (1 + 2 * torch.randn(shape, generator=generator)).to(dtype)
    weight, bias = torch.rand((2, shape[1]), generator=generator)
    return x.contiguous(memory_format=LAYOUTS[layout]), weight, bias


@pytest.fixture(autouse=True)
def same_pages() -> Iterator[None]:
    with _kept_memory(True):
        yield


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("contender", CONTENDERS)
def test_layer(
    benchmark, contender: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    benchmark.group = f"{'x'.join(map(str, shape))} {layout} {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(
        CONTENDERS[contender](*make(shape, layout, dtype)),
        rounds=20,
        warmup_rounds=3,
        iterations=1,
    )


# ---------------------------------------------------------------------------- the table of README

TIMED = ("swa_fast", "torch_layer", "read", "copy")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Microseconds, and page faults of a call, of every contender; medians."""
    arguments = make(shape, layout, dtype)
    calls = {name: CONTENDERS[name](*arguments) for name in TIMED}
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    faulted: dict[str, list[int]] = {name: [] for name in TIMED}
    for number in range(rounds + 2):
        for name, call in calls.items():
            before, start = faults(), clock()
            result = call()
            elapsed = clock() - start
            count = faults() - before
            del result
            if number >= 2:
                seconds[name].append(elapsed)
                faulted[name].append(count)
    return {
        "us": {name: 1e6 * statistics.median(values) for name, values in seconds.items()},
        "best us": {name: 1e6 * min(values) for name, values in seconds.items()},
        "faults": {name: statistics.median(values) for name, values in faulted.items()},
    }


def spread(values: list[float]) -> str:
    return f"{min(values):.2f}, {statistics.median(values):.2f}, {max(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--pages", choices=("kept", "fresh"), default="kept")
    parser.add_argument(
        "--best",
        action="store_true",
        help="ratios of the fastest rounds, for a machine that has other work beside",
    )
    parser.add_argument("--threads", type=int, help="torch's default otherwise")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --threads 1: the thread's own time, whatever else the machine does",
    )
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time: expected --threads 1, for it is the time of one thread")
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    which = "best us" if arguments.best else "us"
    figures: dict[str, Any] = {}
    print(f"{torch.get_num_threads()} threads, {arguments.pages} pages, {which} and page faults")
    with _kept_memory(True) if arguments.pages == "kept" else contextlib.nullcontext():
        for dtype_name, dtype in DTYPES.items():
            for layout in LAYOUTS:
                ratios, ours, theirs = [], [], []
                for shape in SHAPES:
                    name = f"{dtype_name} {layout} {'x'.join(map(str, shape))}"
                    row = figures[name] = measure(shape, layout, dtype, arguments.rounds, clock)
                    us = row[which]
                    limit = us["read"] + us["copy"]
                    ratios.append(us["torch_layer"] / us["swa_fast"])
                    ours.append(us["swa_fast"] / limit)
                    theirs.append(us["torch_layer"] / limit)
                    print(
                        f"{name:38}"
                        + "".join(f"{n:>12}{us[n]:8.0f}{row['faults'][n]:7.0f}" for n in TIMED)
                        + f"   torch / ours {ratios[-1]:5.2f}  ours / limit {ours[-1]:5.2f}"
                        + f"  torch / limit {theirs[-1]:5.2f}",
                        flush=True,
                    )
                print(
                    f"{dtype_name} {layout}, least, median, most: torch / ours {spread(ratios)}; "
                    f"ours / limit {spread(ours)}; torch / limit {spread(theirs)}",
                    flush=True,
                )
    if arguments.json:
        figures = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "arguments": vars(arguments),
            "figures": figures,
        }
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
