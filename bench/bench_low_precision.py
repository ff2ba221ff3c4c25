"""Averages of bf16 weights, in fp32 and in bf16.

An EMA of bf16 weights that is kept in bf16 and rounded to nearest does not move where
``1 - decay`` is below the type's resolution: such contenders are found wrong and not timed.
"""

from __future__ import annotations

import functools
import sys

import torch
from competitors import AVERAGERS, DECAY, Averaged, averager, averaging, lerp_flat
from harness import Case, Contender, Size, Suite, main, pytest_cases
from models import make_model
from rows import OURS
from torch import nn

from swa_fast import EMA

__all__ = ["SUITE"]

MODELS = ("PreResNet-164", "ResNet-50", "ViT-B/16")
STOCHASTIC = {"dtype": torch.bfloat16, "rounding": "stochastic"}


def _foreach_over_a_copy(model: nn.Module) -> Averaged:
    """What torch's own functions offer: foreach functions are fast for equal types only."""
    parameters = [p.detach() for p in model.parameters()]
    averages = [p.float() for p in parameters]
    copies = [torch.empty_like(a) for a in averages]
    names = [name for name, _ in model.named_parameters()]

    def update() -> None:
        torch._foreach_copy_(copies, parameters)
        torch._foreach_lerp_(averages, copies, 1 - DECAY)

    return Averaged(update, lambda: dict(zip(names, averages, strict=True)))


def _timm_fp32(model: nn.Module) -> Averaged:
    from timm.utils.model_ema import ModelEmaV3

    found = ModelEmaV3(model, decay=DECAY, dtype=torch.float32)
    return Averaged(lambda: found.update(model), lambda: found.module.state_dict())


def _size(average_bytes: int, model: nn.Module) -> Size:
    parameters = list(model.parameters())
    moved = sum(p.numel() * (p.element_size() + 2 * average_bytes) for p in parameters)
    return Size(sum(p.numel() for p in parameters), len(parameters), moved)


def _ours(device: torch.device, **options: object) -> dict[str, Contender]:
    found = {}
    for backend in (None, "triton") if device.type == "cuda" else (None,):
        make = functools.partial(averager, rule=EMA(DECAY), backend=backend, **options)
        found[f"Averager EMA{'' if backend is None else f', {backend}'}"] = averaging(
            make, False, OURS
        )
    return found


def _theirs(*names: str) -> dict[str, Contender]:
    return {n: averaging(AVERAGERS[n][1], AVERAGERS[n][2], AVERAGERS[n][0]) for n in names}


def cases(device: torch.device) -> list[Case]:
    limit = {"lerp_flat": Contender("limit", lerp_flat)}
    fp32 = {
        **limit,
        **_ours(device),
        "torch foreach over an fp32 copy": averaging(_foreach_over_a_copy, False, "competitor"),
        "timm ModelEmaV3, fp32": averaging(_timm_fp32, False, "competitor"),
    }
    bf16 = {
        **limit,
        **_ours(device, **STOCHASTIC),
        **_theirs(
            "torch foreach EMA", "timm ModelEmaV3", "diffusers EMAModel foreach",
            "ema-pytorch foreach", "torch-ema",
        ),
    }  # fmt: skip
    return [
        Case(
            op, name, "bfloat16", functools.partial(make_model, name, torch.bfloat16, device),
            functools.partial(_size, average_bytes), contenders, name == "PreResNet-164", copies=6,
        )
        for name in MODELS
        for op, average_bytes, contenders in (
            ("fp32 average of bf16 weights", 4, fp32),
            ("bf16 average of bf16 weights", 2, bf16),
        )
    ]  # fmt: skip


SUITE = Suite("low-precision averages", cases)
test_update = pytest_cases(SUITE)

if __name__ == "__main__":
    sys.exit(main([SUITE], __doc__))
