"""Averages on the CPU of a model on a GPU."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers import (
    Net,
    of_dtype,
    snapshot,
    step,
)
from torch import Tensor, nn

from swa_fast import EMA, SWA, Averager, _gather

RULES = {"swa": SWA(), "ema": EMA(0.9), "long": EMA(0.99, warmup="diffusers")}


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1 << 28, 4096, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_averages_on_the_cpu_of_a_model_on_a_gpu(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered in one piece or in many, from tensors of every kind, moved ones too."""
    monkeypatch.setattr(_gather, "CHUNK", chunk)
    model = of_dtype(Net(), dtype)
    there = copy.deepcopy(model).cuda()
    # In the model's own types the CPU's averages are the reference: same arithmetic, same bits.
    ours = Averager(there, RULES, device="cpu", buffers="average")
    theirs = Averager(model, RULES, buffers="average")
    for n in range(4):
        if n == 2:
            there.embed.weight.data = there.embed.weight.data.clone()
        step(model)
        there.load_state_dict(model.state_dict())
        ours.update()
        theirs.update()
    for rule, name in itertools.product(RULES, theirs.averages["swa"]):
        found = ours.averages[rule][name]
        assert found.device.type == "cpu"
        assert torch.equal(found, theirs.averages[rule][name]), name


@pytest.mark.gpu
def test_without_pinned_memory_the_copies_are_right_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty

    def unpinned(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("the limit of locked memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    model = nn.Linear(3, 4).cuda()
    averager = Averager(model, {"swa": SWA()}, device="cpu")
    averager.update()
    assert torch.equal(averager.averages["swa"]["weight"], model.weight.cpu())


@pytest.mark.gpu
def test_without_room_for_a_buffer_tensors_come_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tensors: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(_gather, "Gather", full)
    model = nn.Linear(3, 4).cuda()
    averager = Averager(model, {"swa": SWA()}, device="cpu")
    averager.update()
    assert torch.equal(averager.averages["swa"]["bias"], model.bias.cpu())


@pytest.mark.gpu
def test_averages_kept_on_the_cpu() -> None:
    model = of_dtype(Net(), torch.bfloat16).to("cuda")
    averager = Averager(model, {"swa": SWA()}, device="cpu")
    for _ in range(2):
        averager.update()
    for name, average in averager.averages["swa"].items():
        assert not average.is_cuda
        assert torch.equal(average, model.state_dict()[name].cpu().to(average.dtype)), name
    live = snapshot(model)
    with averager.applied("swa"):
        pass
    assert all(torch.equal(v, live[k]) for k, v in model.state_dict().items())
