"""The averaging update of whole models: swa_fast, torch, and one lerp_ over flat memory.

    make bench

``lerp_flat`` is what the machine's memory allows: one in-place lerp_ over one flat tensor with as
many elements as the model has parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import swa_fast

# Parameter shapes of well-known models, as (shape, how many).
SHAPES: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "many_small_494_tensors_1.7M": [((64,), 326), ((64, 16, 3, 3), 168)],
    "resnet50_like_161_tensors_25M": [((512, 512, 3, 3), 9), ((256, 64), 52), ((256,), 100)],
}


class Bag(nn.Module):
    def __init__(self, shapes: list[tuple[tuple[int, ...], int]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(shape) for shape, count in shapes for _ in range(count)
        )


def averager(make: Callable[[nn.Module], nn.Module], model: nn.Module) -> Callable[[], None]:
    averaged = make(model)
    averaged.update_parameters(model)
    return lambda: averaged.update_parameters(model)


def lerp_flat(model: nn.Module) -> Callable[[], None]:
    count = sum(p.numel() for p in model.parameters())
    average, source = torch.randn(count), torch.randn(count)
    return lambda: average.lerp_(source, 0.1)


CONTENDERS: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    "swa_fast": lambda m: averager(swa_fast.AveragedModel, m),
    "swa_fast_reference": lambda m: averager(
        lambda x: swa_fast.AveragedModel(x, backend="reference"), m
    ),
    "torch": lambda m: averager(swa_utils.AveragedModel, m),
    "torch_foreach": lambda m: averager(
        lambda x: swa_utils.AveragedModel(x, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()), m
    ),
    "lerp_flat": lerp_flat,
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_update(benchmark, shapes: str, contender: str) -> None:
    benchmark.group = shapes
    benchmark.pedantic(
        CONTENDERS[contender](Bag(SHAPES[shapes])), rounds=20, warmup_rounds=3, iterations=1
    )
