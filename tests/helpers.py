"""What several test files need: who is tested where, and how close is close enough."""

from __future__ import annotations

import inspect
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swa_fast import Averager, _backends

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (backend, device type); on CPU tensors triton means its interpreter.
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cpu", id="triton-interpreted"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]

comparisons = 0

# What processes of several use, here and in torch, also what torch imports late.
_IMPORTED = (
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor.debug", "torch.distributed.tensor.parallel", "torch.testing",
    "safetensors.torch", "swa_fast.train.cli", "test_sharding",
)  # fmt: skip


def run_processes(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Calls ``work(rank, *arguments)`` in so many new processes, and raises what one of them does.

    They are forks of a process that has imported torch and run nothing: each would import it for
    two seconds. A fork ends without shutting Python down, which may abort in torch 2.14: a gloo
    thread, kept by a device mesh till then, may still have a tensor of the last collective."""
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        # Where that process looks for modules; it leaves out what it does not find.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.forkserver.ensure_running()
    torch.multiprocessing.start_processes(work, arguments, count, start_method="forkserver")


def hasten_interpreter() -> None:
    """Has Triton's interpreter, where there is one, look only once for the functions of its
    language that it replaces. At every call within a kernel it goes through all names of the
    language anew, which takes half of the time."""
    try:
        from triton.language.core import is_builtin
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_patch_builtin") or not hasattr(interpreter, "_patch_attr"):
        return
    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, *arguments: Any) -> None:
        if package not in names:  # and none of them has been replaced yet
            names[package] = [name for name, _ in inspect.getmembers(package, is_builtin)]
        found = names[package]
        # All or none of them are replaced.
        if found and is_builtin(getattr(package, found[0])):
            for name in found:
                interpreter._patch_attr(package, name, getattr(package, name), *arguments)

    interpreter._patch_builtin = patch_builtin


def raw_arguments(averager: Averager) -> tuple[list[object], list[object]]:
    """What the operators ``update_`` and ``swap_`` (of average 0) are called with for an averager
    of tensors on one device, without their optional arguments."""
    (part,), (plan,) = averager._storage.parts, averager._storage.plans
    engine, update, swap = part.engine, plan.update, plan.swap
    return [
        update.averages, update.sources, engine.n_averaged, engine.counters, plan.rules,
        update.words, update.pairs, engine.seed, engine.skip_nonfinite,
    ], [swap.averages, swap.sources, swap.words, 0]  # fmt: skip


def need(backend: str, device: str) -> None:
    """Skips where a backend is legitimately absent, and only there."""
    if device == "cpu" and backend == "triton" and torch.cuda.is_available():
        pytest.skip("with a CUDA device Triton is tested compiled")
    reason = _backends.why_unusable(backend, device)
    if reason is None:
        return
    if backend == "triton" and ("not installed" in reason or "interpreter of Triton" in reason):
        pytest.skip(reason)
    if backend == "cpu" and "SWA_FAST_NO_EXT" in reason:
        pytest.skip(reason)
    pytest.fail(f"backend {backend} on {device}: {reason}")


def extended(tensor: Tensor) -> np.ndarray:
    """As numpy's longest floating type: fp64 results need an oracle finer than fp64."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    values = tensor.detach().cpu().to(wide).numpy()
    return values.astype(np.clongdouble if tensor.is_complex() else np.longdouble)


def assert_as_accurate(
    actual: Sequence[Tensor], by_torch: Sequence[Tensor], exact: Sequence[np.ndarray], what: str
) -> None:
    """The largest error over a list of tensors of one dtype is at most twice torch's own in the
    same dtype, plus one rounding of the largest exact value to that dtype."""
    global comparisons
    comparisons += len(actual)
    error = torch_error = largest = 0.0
    for ours, theirs, true in zip(actual, by_torch, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape == true.shape
        if ours.numel() == 0:
            continue
        error = max(error, float(np.abs(extended(ours) - true).max()))
        torch_error = max(torch_error, float(np.abs(extended(theirs) - true).max()))
        largest = max(largest, float(np.abs(true).max()))
    rounding = torch.finfo(actual[0].dtype).eps / 2 * largest if actual else 0.0
    allowed = 2 * torch_error + rounding
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def unaligned(values: Tensor) -> Tensor:
    """The same values in memory that starts one element past an allocation's base."""
    shifted = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
    shifted = shifted[1:].view(values.shape)
    return shifted.copy_(values)


class Calls(TorchDispatchMode):
    """Lists the operators of ours that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "swa_fast":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Odd sizes, both memory formats, tied, 0-dim, empty, frozen, complex, integers, strided."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.bn = nn.BatchNorm2d(5)
        self.embed = nn.Embedding(7, 13)
        self.out = nn.Linear(13, 7, bias=False)
        self.out.weight = self.embed.weight
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.frozen = nn.Parameter(torch.randn(4097), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(33, 129).t())
        self.strided = nn.Parameter(torch.randn(6, 10)[:, ::2])
        self.phase = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.randn(3), persistent=False)


def step(model: nn.Module) -> None:
    """Pretended training: every floating tensor moves, counters count."""
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.dtype == torch.bool:
                tensor.logical_not_()
            elif tensor.is_floating_point() or tensor.is_complex():
                # Drawn and added on the CPU, so that all devices see the same numbers: a GPU
                # multiplies and adds 16-bit numbers with one rounding less.
                now = tensor.cpu()
                now.add_(torch.randn(tensor.shape, dtype=torch.float64).to(now), alpha=0.1)
                tensor.copy_(now)
            else:
                tensor.add_(1)


def of_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_averaged(name: str, tensor: Tensor, buffers: str) -> bool:
    is_buffer = name.startswith("bn.running") or name in ("bn.num_batches_tracked", "mask")
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return numeric and (not is_buffer or buffers == "average")
