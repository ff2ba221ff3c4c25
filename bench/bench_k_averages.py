"""Several averages of one model updated at once: the weights are read once for all of them.

The competitors update as many averages as they have one after the other: no package has a joint
update.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_average import size_of
from competitors import AVERAGERS, Averaged, Expected, check_averages, lerp_flat
from harness import Case, Contender, Run, Size, Suite, Work, main, pytest_cases
from models import make_model
from rows import OURS
from torch import nn

from swa_fast import EMA, SWA, Averager

__all__ = ["SUITE"]

RULES = {"swa": SWA(), "short": EMA(0.99), "long": EMA(0.999)}
COUNT = len(RULES)
MODELS = ("PreResNet-164", "ResNet-50", "ViT-B/16")


def _together(model: nn.Module, backend: str | None = None) -> Work:
    averager = Averager(model, RULES, backend=backend)

    def check(run: Run, done: int) -> None:
        expected = [
            Expected(
                Averaged(averager.update, functools.partial(averager.averages.__getitem__, name)),
                name == "swa", decay,
            )
            for name, decay in (("swa", 0.0), ("short", 0.99), ("long", 0.999))
        ]  # fmt: skip
        check_averages(model, expected, run, done)

    return Work(averager.update, check)


def _one_by_one(make: Callable[[nn.Module], Averaged], equal: bool, model: nn.Module) -> Work:
    made = [make(model) for _ in range(COUNT)]
    updates = [found.update for found in made]

    def run() -> None:
        for update in updates:
            update()

    def check(run: Run, done: int) -> None:
        check_averages(model, [Expected(found, equal) for found in made], run, done)

    return Work(run, check)


def _size(model: nn.Module) -> Size:
    one = size_of(model)
    moved = sum(p.numel() * (p.element_size() + 8 * COUNT) for p in model.parameters())
    return Size(one.parameters, one.tensors, moved)


def contenders(device: torch.device) -> dict[str, Contender]:
    found = {
        "lerp_flat": Contender("limit", lerp_flat),
        "Averager, 3 averages": Contender(OURS, _together),
    }
    if device.type == "cuda":
        make: Any = functools.partial(_together, backend="triton")
        found["Averager, 3 averages, triton"] = Contender(OURS, make)
    for name in (
        "Averager EMA", "torch AveragedModel", "torch foreach EMA", "timm ModelEmaV3",
        "diffusers EMAModel foreach", "ema-pytorch foreach", "torch-ema",
    ):  # fmt: skip
        side, one, equal = AVERAGERS[name]
        found[f"3 times {name}"] = Contender(side, functools.partial(_one_by_one, one, equal))
    return found


def cases(device: torch.device) -> list[Case]:
    return [
        Case(
            "update of 3 averages", name, "float32",
            functools.partial(make_model, name, torch.float32, device), _size, contenders(device),
            quick=name == "PreResNet-164", copies=1.5 * COUNT,
        )
        for name in MODELS
    ]  # fmt: skip


SUITE = Suite("several averages", cases)
test_update = pytest_cases(SUITE)

if __name__ == "__main__":
    sys.exit(main([SUITE], __doc__))
