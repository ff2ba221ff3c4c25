"""Which implementation of an operator serves a tensor, and why another one cannot.

Four backends: ``cuda`` (C++/CUDA), ``triton``, ``cpu`` (C++) and ``reference`` (plain PyTorch).
Nothing is loaded before it is first asked for, and a failure is kept and explained, never raised
at import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["BACKENDS", "BackendError", "build_info", "choose_backend", "why_unusable"]

BACKENDS = ("cuda", "triton", "cpu", "reference")

# Order of preference for a device type without an explicit choice.
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_log = logging.getLogger("swa_fast")
_package = Path(__file__).resolve().parent


class BackendError(RuntimeError):
    """An explicitly requested backend cannot serve a tensor; the message says why."""


@functools.cache
def build_info() -> dict[str, Any]:
    """Facts recorded when the package was built; empty when it was never built."""
    try:
        info = json.loads((_package / "_build_info.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    assert isinstance(info, dict)
    return info


def _missing_library_reason(name: str) -> str:
    info = build_info()
    if not info:
        reason = f"this copy of swa_fast ({_package}) was never built"
        if (_package.parent / "setup.py").exists():
            reason += (
                "; it is a source checkout: run `pip install -e .` in it, "
                "or start Python in another folder to use an installed copy"
            )
        return reason
    skipped = info.get("skipped", {}).get(name)
    if skipped:
        return f"it was not built: {skipped}"
    return f"swa_fast.{name} is missing from {_package}; install swa_fast again"


@functools.cache
def _load_library(name: str) -> str | None:
    """Loads ``swa_fast._C`` or ``swa_fast._C_cuda``; None, or the reason why that failed."""
    if importlib.util.find_spec(f"swa_fast.{name}") is None:
        return _missing_library_reason(name)
    try:
        importlib.import_module(f"swa_fast.{name}")
    except ImportError as error:
        built = build_info().get("torch", "unknown")
        return (
            f"swa_fast.{name} does not load ({error}); it was built with torch {built} and this is "
            f"torch {torch.__version__}: reinstall with `pip install --no-build-isolation swa_fast`"
        )
    return None


def cpu_library() -> Any:
    """The module ``swa_fast._C``, or None where it cannot be had."""
    return None if _load_library("_C") else importlib.import_module("swa_fast._C")


@functools.cache
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    try:
        importlib.import_module("swa_fast.kernels.average")
        importlib.import_module("swa_fast.kernels.batch_norm")
        importlib.import_module("swa_fast.kernels.update")
    except (ImportError, RuntimeError) as error:  # RuntimeError: triton without a usable driver
        return f"swa_fast.kernels does not load: {error}"
    return None


def triton_interprets() -> bool:
    """True when Triton runs its kernels in Python, which also serves CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unusable(backend: str, device_type: str) -> str | None:
    """The reason why ``backend`` cannot serve tensors on ``device_type``, or None if it can.

    Raises:
        ValueError: ``backend`` is not one of :data:`BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "reference":
        return None
    if backend == "cpu":
        if device_type != "cpu":
            return f"it serves CPU tensors, not {device_type} tensors"
        return _load_library("_C")
    if backend == "triton" and triton_interprets() and device_type == "cpu":
        return _triton_reason()
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type} tensors"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _load_library("_C_cuda") if backend == "cuda" else _triton_reason()


@functools.cache
def _log_choice(backend: str, device_type: str) -> None:
    _log.info("tensors on %s are served by the %s backend", device_type, backend)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(device_type: str, requested: str | None = None) -> str:
    """The backend for tensors on ``device_type``.

    Args:
        device_type: as ``torch.device.type``.
        requested: a name of :data:`BACKENDS`; None takes the environment variable
            ``SWA_FAST_BACKEND``, and without it the first usable of cuda, triton, reference (CUDA
            tensors), of cpu, reference (CPU tensors), or reference (elsewhere).

    Raises:
        BackendError: the requested backend cannot serve such tensors.
        ValueError: there is no backend of that name.
    """
    origin = "backend="
    if requested is None:
        requested = os.environ.get("SWA_FAST_BACKEND") or None
        origin = "SWA_FAST_BACKEND="
    if requested is not None:
        reason = why_unusable(requested, device_type)
        if reason is not None:
            raise BackendError(f"{origin}{requested}: {reason}")
        chosen = requested
    else:
        candidates = _PREFERENCE.get(device_type, ("reference",))
        chosen = next(b for b in candidates if why_unusable(b, device_type) is None)
    _log_choice(chosen, device_type)
    return chosen
