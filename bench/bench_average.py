"""The averaging update of whole models: swa_fast, its competitors, and what the memory allows."""

from __future__ import annotations

import functools
import sys

import torch
from competitors import AVERAGERS, averager, averaging, lerp_flat
from harness import Case, Contender, Size, Suite, main, pytest_cases
from models import GROWTH, MODELS, make_model
from rows import OURS
from torch import nn

__all__ = ["SUITE"]

QUICK = ("PreResNet-164", "ResNet-50")
# Backends besides the one that a device gets by itself.
BACKENDS = {"cpu": (), "cuda": ("triton",)}


def size_of(model: nn.Module) -> Size:
    """Every weight is read, every fp32 average read and written."""
    elements = sum(p.numel() for p in model.parameters())
    moved = sum(p.numel() * (p.element_size() + 8) for p in model.parameters())
    return Size(elements, sum(1 for _ in model.parameters()), moved)


def contenders(device: torch.device, reference: bool) -> dict[str, Contender]:
    found = {"lerp_flat": Contender("limit", lerp_flat)}
    for name, (side, make, equal) in AVERAGERS.items():
        found[name] = averaging(make, equal, side)
    # Plain PyTorch is the specification and takes hundreds of times longer.
    for backend in BACKENDS[device.type] + (("reference",) if reference else ()):
        make = functools.partial(averager, backend=backend)
        found[f"Averager SWA, {backend}"] = averaging(make, True, OURS)
    return found


def cases(device: torch.device) -> list[Case]:
    def case(op: str, name: str, quick: bool) -> Case:
        return Case(
            op, name, "float32", functools.partial(make_model, name, torch.float32, device),
            size_of, contenders(device, name == "PreResNet-20"), quick,
        )  # fmt: skip

    return [case("update", name, name in QUICK) for name in MODELS] + [
        case("growth", name, False) for name in GROWTH
    ]


SUITE = Suite("averaging update", cases)
test_update = pytest_cases(SUITE)

if __name__ == "__main__":
    sys.exit(main([SUITE], __doc__))
