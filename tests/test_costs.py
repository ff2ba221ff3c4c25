"""What an update costs a GPU, counted by a simulator: launches, waits, allocations, bytes.

Skipped on a real GPU, which counts none of these by itself.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

import swa_fast
from swa_fast import EMA, SWA, Averager
from swa_fast.train.models import PreResNet

pytestmark = pytest.mark.gpu
KERNEL = "update_kernel"
RULES = {"swa": SWA(), "short": EMA(0.99), "long": EMA(0.999, warmup="timm")}


def buffer_bytes(model: nn.Module, averages: int) -> int:
    """Buffers are read once, and written into every average."""
    return sum(b.numel() * b.element_size() * (1 + averages) for b in model.buffers())


def check_steady_state(simulator: Any, update: Any, model: nn.Module, averages: int) -> float:
    """One launch and nothing else, in full sectors; returns bytes a parameter."""
    for _ in range(2):
        update()
    torch.cuda.synchronize()
    simulator.reset()
    update()
    counters = simulator.counters()
    total = {name: count for name, count in counters["total"].items() if count}
    assert total == {"kernel_launches": 1}, (total, dict(counters["aten"]))
    ((name, kernel),) = counters["kernels"].items()
    assert KERNEL in name
    assert kernel["ld_efficiency"] >= 0.98 and kernel["st_efficiency"] >= 0.98
    assert kernel["widest_ld"] == kernel["widest_st"] == 16
    assert kernel["local_bytes"] == 0
    moved = kernel["ld_bytes"] + kernel["st_bytes"] - buffer_bytes(model, averages)
    per_parameter: float = moved / sum(p.numel() for p in model.parameters())
    print(f"\n{per_parameter:.3f} bytes per parameter, {kernel['ld_efficiency']:.4f} and "
          f"{kernel['st_efficiency']:.4f} of the sectors read and written used")  # fmt: skip
    return per_parameter


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 12.1), (torch.bfloat16, 10.1)], ids=str)
def test_one_average(simulator: Any, backend: str, dtype: torch.dtype, limit: float) -> None:
    model = PreResNet(164).to(dtype).to("cuda")
    averager = Averager(model, {"swa": SWA()}, backend=backend)
    assert check_steady_state(simulator, averager.update, model, 1) <= limit


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_three_averages_in_one_pass(simulator: Any, backend: str) -> None:
    model = PreResNet(164).to("cuda")
    averager = Averager(model, RULES, backend=backend)
    moved = check_steady_state(simulator, averager.update, model, 3)
    assert moved <= 1.01 * (4 + 8 * 3)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_averaged_model(simulator: Any, backend: str) -> None:
    model = PreResNet(164).to("cuda")
    averaged = swa_fast.AveragedModel(model, backend=backend)
    moved = check_steady_state(simulator, lambda: averaged.update_parameters(model), model, 1)
    assert moved <= 12.1


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_skipping_waits_for_nothing(simulator: Any, backend: str) -> None:
    model = PreResNet(20).to("cuda")
    averager = Averager(model, {"swa": SWA()}, backend=backend, on_nonfinite="skip")
    averager.update()
    simulator.reset()
    averager.update()
    total = {k: v for k, v in simulator.counters()["total"].items() if v}
    assert total == {"kernel_launches": 2}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_putting_an_average_in_waits_once_at_most(simulator: Any, backend: str) -> None:
    """For whether there is an average, which an update cannot tell that may have been skipped."""
    model = PreResNet(20).to("cuda")
    averager = Averager(model, {"swa": SWA()}, backend=backend)
    averaged = swa_fast.AveragedModel(model, backend=backend)
    averager.update()
    averaged.update_parameters(model)
    with averager.applied("swa"):
        pass
    simulator.reset()
    with averager.applied("swa"), averaged.applied(model):
        pass
    averager.update()
    averaged.update_parameters(model)
    with averager.applied("swa"):
        pass
    assert simulator.counters()["total"]["host_syncs"] == 0
    averager.load_state_dict({**averager.state_dict(), "n_averaged": {"swa": 0}})
    averaged.n_averaged.zero_()
    for applied in (averager.applied("swa"), averaged.applied(model)):
        with pytest.raises(RuntimeError, match="has not been updated yet"), applied:
            pass


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_averages_on_the_cpu_wait_once(simulator: Any, kind: str, backend: str | None) -> None:
    model = PreResNet(20).to("cuda")
    if kind == "Averager":
        averager = Averager(model, {"swa": SWA()}, device="cpu", backend=backend)
        update = averager.update
    else:
        averaged = swa_fast.AveragedModel(model, device="cpu", backend=backend)
        update = functools.partial(averaged.update_parameters, model)
    update()
    simulator.reset()
    update()
    total = {k: v for k, v in simulator.counters()["total"].items() if v}
    moved = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert total.pop("memcpy_DtoH_bytes") == pytest.approx(moved, rel=0.02)
    assert total == {
        "kernel_launches": 1, "memcpy": 1, "memcpy_DtoH": 1, "cudaStreamSynchronize": 1,
        "host_syncs": 1,
    }  # fmt: skip


def test_triton_code_is_vectorised() -> None:
    """128-bit accesses on the aligned path, and no memory for spilled registers."""
    pytest.importorskip("triton")
    from swa_fast.kernels import update as kernels

    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(64, 64).to(dtype).to("cuda")
        averager = Averager(model, {"ema": EMA(0.5)}, dtype=None, backend="triton")
        averager.update()
    compiled = [
        kernel
        for caches in kernels._update_kernel.device_caches.values()
        for kernel in caches[0].values()
    ]
    assert compiled
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        for access in ("ld", "st"):
            assert re.search(rf"{access}\.global\.v(4\.b32|2\.b64)", ptx)
        assert not re.search(r"(ld|st)\.local", ptx)
        assert kernel.n_spills == 0
