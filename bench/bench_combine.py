"""Many points of a plane of weights in one pass: K linear combinations of r weight vectors.

The least is to read r rows and to write K, 4 r + 4 K bytes per fp32 element, which the limit does
by copying half as many.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable

import torch
from harness import (
    CHECKED_RUNS,
    Case,
    Contender,
    Run,
    Size,
    Suite,
    Work,
    close,
    main,
    pytest_cases,
)
from models import make_model
from rows import OURS
from torch import Tensor

from swa_fast import combine_
from swa_fast.analysis import combine

__all__ = ["SUITE", "case_of"]

ROWS, POINTS = 3, 16  # the rows of a plane, and as many of its points as are made at once
MODELS = ("PreResNet-164", "ResNet-50")


@dataclasses.dataclass(frozen=True)
class Points:
    rows: Tensor  # [ROWS, n]
    weights: Tensor  # [POINTS, ROWS], on the CPU
    out: Tensor  # [POINTS, n]


def _points(name: str, device: torch.device) -> Points:
    model = make_model(name, torch.float32, device)
    origin = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(ROWS - 1, len(origin), generator=generator).to(device)
    weights = torch.randn(POINTS, ROWS, dtype=torch.float64, generator=generator)
    out = torch.zeros(POINTS, len(origin), device=device)
    return Points(torch.cat((origin[None], directions)), weights, out)


def _combining(side: str, make: Callable[[Points], Run]) -> Contender:
    def work(points: Points) -> Work:
        def check(run: Run, done: int) -> None:
            points.out.zero_()
            for _ in range(CHECKED_RUNS):
                run()
            weights = points.weights.to(points.rows.device)
            for start in range(0, points.rows.shape[1], 1 << 20):
                part = slice(start, start + (1 << 20))
                exact = weights @ points.rows[:, part].double()
                close(points.out[:, part], exact, 1e-5, f"elements from {start}")

        return Work(make(points), check)

    return Contender(side, work)


def _copies(points: Points) -> Work:
    half = (ROWS + POINTS) // 2
    source, target = torch.zeros_like(points.out[:half]), points.out[:half]
    return Work(lambda: target.copy_(source), lambda run, done: None)


def _ours(points: Points) -> Run:
    return lambda: combine(points.rows, points.weights, points.out)


def _triton(points: Points) -> Run:
    out, rows = list(points.out), list(points.rows)
    return lambda: combine_(out, rows, points.weights, backend="triton")


def _matmul(points: Points) -> Run:
    weights = points.weights.float().to(points.rows.device)
    return lambda: torch.mm(weights, points.rows, out=points.out)


def _loop(points: Points) -> Run:
    weights = points.weights.tolist()

    def run() -> None:
        for out, own in zip(points.out, weights, strict=True):
            torch.mul(points.rows[0], own[0], out=out)
            for row, weight in zip(points.rows[1:], own[1:], strict=True):
                out.add_(row, alpha=weight)

    return run


def _size(points: Points) -> Size:
    n = points.rows.shape[1]
    return Size(n, ROWS, 4 * (ROWS + POINTS) * n)


def case_of(name: str, device: torch.device) -> Case:
    """The points of a plane through one of the benchmarks' models."""
    contenders = {
        "copies": Contender("limit", _copies),
        "swa_fast combine": _combining(OURS, _ours),
    }
    if device.type == "cuda":
        contenders["swa_fast combine, triton"] = _combining(OURS, _triton)
    contenders["torch.mm"] = _combining("competitor", _matmul)
    contenders["torch, a loop of axpy"] = _combining("competitor", _loop)
    return Case(
        "combine", f"{ROWS} rows into {POINTS}, {name}", "float32",
        functools.partial(_points, name, device), _size, contenders, copies=ROWS + 2 * POINTS,
    )  # fmt: skip


def cases(device: torch.device) -> list[Case]:
    return [case_of(name, device) for name in MODELS]


SUITE = Suite("combine", cases)
test_combine = pytest_cases(SUITE)

if __name__ == "__main__":
    sys.exit(main([SUITE], __doc__))
