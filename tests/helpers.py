"""What several test files need: who is tested where, and how close is close enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from swa_fast import _backends

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
