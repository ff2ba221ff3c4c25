"""The average put into the model and taken out again, as around an evaluation.

The least is to swap both sides twice, 32 bytes per fp32 parameter; the competitors keep a copy
of the weights, copy the average over them and copy the kept ones back. By pointer no byte has to
be moved, so the limit of memory says nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from competitors import AVERAGERS, Averaged, averager, lerp_flat
from harness import (
    CHECKED_RUNS,
    Case,
    Contender,
    NotServed,
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
from torch import nn

from swa_fast import SWA, Averager

__all__ = ["SUITE"]

MODELS = ("PreResNet-164", "ResNet-50", "ViT-B/16")


def _state_dicts(model: nn.Module) -> Averaged:
    """The usual code with torch's AveragedModel."""
    found = AVERAGERS["torch AveragedModel"][1](model)

    @contextlib.contextmanager
    def applied() -> Any:
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(found.averages())
        yield
        model.load_state_dict(kept)

    return Averaged(found.update, found.averages, applied)


def _foreach_copies(model: nn.Module) -> Averaged:
    """The same with foreach functions, for the parameters alone."""
    found = AVERAGERS["torch foreach EMA"][1](model)
    parameters = [p.detach() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    averages = [found.averages()[name] for name in names]

    @contextlib.contextmanager
    def applied() -> Any:
        kept = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(kept, parameters)
        torch._foreach_copy_(parameters, averages)
        yield
        torch._foreach_copy_(parameters, kept)

    return Averaged(found.update, found.averages, applied)


def _by_pointer(model: nn.Module) -> Averaged:
    found = Averager(model, {"average": SWA()})
    return Averaged(
        found.update,
        lambda: found.averages["average"],
        lambda: found.applied("average", by="pointer"),
    )


def _swapping(
    side: str, make: Callable[[nn.Module], Averaged], moved: int | None = None, graph: bool = True
) -> Contender:
    def work(model: nn.Module) -> Work:
        found = make(model)
        if found.applied is None:
            raise NotServed("it cannot put its average into the model")
        applied = found.applied
        with torch.no_grad():
            found.update()
            # Not a multiple of the weights by a power of two that rounding could not tell apart.
            torch._foreach_mul_(list(model.parameters()), 2.0)
            found.update()

        def run() -> None:
            with applied():
                pass

        @torch.no_grad()
        def check(run: Run, done: int) -> None:
            weights = {k: p.detach().clone() for k, p in model.named_parameters()}
            averages = {k: found.averages()[k].double() for k in weights}
            with applied():
                for name, parameter in model.named_parameters():
                    close(parameter, averages[name], 1e-7, f"inside the block {name}")
            for _ in range(CHECKED_RUNS - 1):
                run()
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, weights[name]), f"{name} is not as before the block"

        return Work(run, check, moved, graph)

    return Contender(side, work)


def _size(model: nn.Module) -> Size:
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters)
    return Size(
        elements, len(parameters), 8 * sum(p.numel() * p.element_size() for p in parameters)
    )


def contenders(device: torch.device) -> dict[str, Contender]:
    found = {
        "lerp_flat": Contender("limit", lerp_flat),
        "Averager.applied": _swapping(OURS, averager),
        "Averager.applied by pointer": _swapping(OURS, _by_pointer, moved=0, graph=False),
        "AveragedModel.applied": _swapping(OURS, AVERAGERS["AveragedModel"][1]),
    }
    if device.type == "cuda":
        make = functools.partial(averager, backend="triton")
        found["Averager.applied, triton"] = _swapping(OURS, make)
    found["torch load_state_dict twice"] = _swapping("competitor", _state_dicts)
    found["torch foreach copies"] = _swapping("competitor", _foreach_copies)
    found["diffusers store, copy_to, restore"] = _swapping(
        "competitor", AVERAGERS["diffusers EMAModel foreach"][1]
    )
    found["torch-ema average_parameters"] = _swapping("competitor", AVERAGERS["torch-ema"][1])
    return found


def cases(device: torch.device) -> list[Case]:
    return [
        Case(
            "average in and out", name, "float32",
            functools.partial(make_model, name, torch.float32, device), _size, contenders(device),
            quick=name == "PreResNet-164", copies=3, modes=("warm", "cold"),
        )
        for name in MODELS
    ]  # fmt: skip


SUITE = Suite("swap", cases)
test_swap = pytest_cases(SUITE)

if __name__ == "__main__":
    sys.exit(main([SUITE], __doc__))
