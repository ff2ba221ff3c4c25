"""Times an update of the averages of sharded parameters (DTensors), in one process.

    python bench/bench_sharding.py                    half a minute
    python bench/bench_sharding.py --out rows.csv

300 parameters, sharded over a mesh of one process (gloo), so that every contender has the same
work and none communicates: what is timed is how each finds the pieces and how often it asks torch.
Contenders take turns in an order drawn anew for each round; all end with the same averages. The
clock is the process' CPU time, of one thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import facts
from rows import write_table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import swa_fast

TENSORS = 300
DECAY = 0.99
COLUMNS = ["contender", "elements", "rounds", "median, us", "q1, us", "q3, us", "against ours",
           "device", "threads", "torch", "commit", "date"]  # fmt: skip


def contenders(parameters: Sequence[Any]) -> dict[str, tuple[Callable[[], object], list[Tensor]]]:
    """By name an update, and the pieces of its averages."""
    averager = swa_fast.Averager(
        [(str(i), p) for i, p in enumerate(parameters)], {"ema": swa_fast.EMA(DECAY)}
    )
    averager.update()

    def copies() -> list[Any]:
        return [p.detach().clone() for p in parameters]

    loop, listed, pieces, local = copies(), copies(), copies(), copies()
    weights = [p._local_tensor for p in parameters]

    def by_loop() -> None:
        for average, p in zip(loop, parameters, strict=True):
            average.lerp_(p, 1 - DECAY)

    def by_pieces() -> None:
        for average, p in zip(pieces, parameters, strict=True):
            average.to_local().lerp_(p.to_local(), 1 - DECAY)

    cached = [a._local_tensor for a in local]
    return {
        "swa_fast": (averager.update, [a._local_tensor for a in averager.averages["ema"].values()]),
        "lerp_ of DTensors, a loop": (by_loop, [a._local_tensor for a in loop]),
        "lerp_ of to_local(), a loop": (by_pieces, [a._local_tensor for a in pieces]),
        "_foreach_lerp_ of DTensors": (
            lambda: torch._foreach_lerp_(listed, list(parameters), 1 - DECAY),
            [a._local_tensor for a in listed],
        ),
        "_foreach_lerp_ of cached pieces": (
            lambda: torch._foreach_lerp_(cached, weights, 1 - DECAY), cached,
        ),
    }  # fmt: skip


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 256], help="of the matrices")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="rows, as CSV")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/x", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            for side in options.sides:
                torch.manual_seed(0)
                parameters = [
                    nn.Parameter(distribute_tensor(torch.randn(side, side), mesh, [Shard(0)]))
                    for _ in range(TENSORS)
                ]
                rows += _compare(parameters, side, options.rounds)
        finally:
            dist.destroy_process_group()
    machine = {key: value for key, value in facts(torch.device("cpu")).items() if key in COLUMNS}
    rows = [{**row, **machine} for row in rows]
    for row in rows:
        print(f"{row['contender']:32} {row['elements']:>11,} elements {row['median, us']:>10} us  "
              f"{row['against ours']} x ours")  # fmt: skip
    if options.out is not None:
        write_table(options.out, COLUMNS, rows)
    return 0


def _compare(parameters: Sequence[Any], side: int, rounds: int) -> list[dict[str, Any]]:
    found = contenders(parameters)
    for update, _ in found.values():
        update()
    expected = found["swa_fast"][1]
    for name, (_, averages) in found.items():
        for average, right in zip(averages, expected, strict=True):
            torch.testing.assert_close(average, right, msg=lambda m, name=name: f"{name}: {m}")
    times: dict[str, list[float]] = {name: [] for name in found}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(sorted(found), len(found)):
            start = time.process_time()
            found[name][0]()
            times[name].append(1e6 * (time.process_time() - start))
    ours = statistics.median(times["swa_fast"])
    return [
        {
            "contender": name,
            "elements": TENSORS * side * side,
            "rounds": rounds,
            "median, us": f"{statistics.median(taken):.0f}",
            "q1, us": f"{statistics.quantiles(taken, n=4)[0]:.0f}",
            "q3, us": f"{statistics.quantiles(taken, n=4)[2]:.0f}",
            "against ours": f"{statistics.median(taken) / ours:.3g}",
        }
        for name, taken in times.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
