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
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["BACKENDS", "BackendError", "build_info", "choose_backend", "why_unusable"]

BACKENDS = ("cuda", "triton", "cpu", "reference")

# The oldest torch with every function of libtorch that the libraries call (setup.py builds for it).
_OLDEST_TORCH = (2, 10)

# Order of preference for a device type without an explicit choice.
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_log = logging.getLogger("swa_fast")
_package = Path(__file__).resolve().parent


_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant_result(function: _Function) -> _Function:
    """``torch.compiler``'s function of that name, which imports the compiler for a second or two to
    do nothing but this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _why_not_loadable(name: str) -> str | None:
    """What is known before loading: torch is too old, or is for another CUDA than the library."""
    if _release(torch.__version__) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return (
            f"swa_fast.{name} needs torch {oldest} or newer and this is torch {torch.__version__}: "
            f"`pip install --upgrade 'torch>={oldest}'`"
        )
    built_for = build_info().get("cuda")
    return _why_other_cuda(built_for.split(".")[0]) if name == "_C_cuda" and built_for else None


def _why_other_cuda(major: str) -> str | None:
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] == major:
        return None
    theirs = torch.version.cuda.split(".")[0]
    return (
        f"swa_fast._C_cuda is built for CUDA {major} and this torch ({torch.__version__}) for CUDA "
        f"{torch.version.cuda}: install a torch for CUDA {major}, or build swa_fast from source "
        f"with a CUDA {theirs} toolkit (`pip install --no-build-isolation .`)"
    )


def _why_not_loaded(name: str, error: ImportError) -> str:
    message = str(error)
    runtime = re.search(r"libcudart\.so\.(\d+)", message)
    if runtime is not None:
        major = runtime.group(1)
        return _why_other_cuda(major) or (
            f"swa_fast.{name} does not load ({message}): the CUDA runtime that torch "
            f"{torch.__version__} came with is not found; install it with "
            "`pip install nvidia-cuda-runtime`, or put its folder into LD_LIBRARY_PATH"
        )
    built = build_info().get("torch", "unknown")
    what = f"swa_fast.{name} does not load ({message})"
    symbol = re.search(r"undefined symbol: (\w+)", message)
    if symbol is not None:
        what = (
            f"swa_fast.{name} does not load: torch {torch.__version__} has no {symbol.group(1)} "
            f"({message})"
        )
    return (
        f"{what}; it was built with torch {built} and this is torch {torch.__version__}: reinstall "
        "with `pip install --no-build-isolation swa_fast`"
    )


@functools.cache
def _load_library(name: str) -> str | None:
    """Loads ``swa_fast._C`` or ``swa_fast._C_cuda``; None, or the reason why that failed."""
    if importlib.util.find_spec(f"swa_fast.{name}") is None:
        return _missing_library_reason(name)
    if reason := _why_not_loadable(name):
        return reason
    try:
        importlib.import_module(f"swa_fast.{name}")
    except ImportError as error:
        return _why_not_loaded(name, error)
    return None


@functools.cache
def cpu_library() -> Any:
    """The module ``swa_fast._C``, ready to look at tensors, or None where it cannot be had."""
    if _load_library("_C"):
        return None
    library = importlib.import_module("swa_fast._C")
    # The layout of tensors was read in these releases; others are asked through DLPack alone.
    known = (2, 10) <= _release(torch.__version__) < (2, 15)
    sample = torch.empty(3, 5, 7, device="cpu") if known else None
    library.start(torch.Tensor.__dlpack_c_exchange_api__, sample)
    if known:
        library.hear(_listeners(), torch._C._increment_version, sample)
    return library


def _listeners() -> tuple[Callable[[], object], ...]:
    """What returns something true while a call of an operator would be seen: by a profiler, modes,
    a tracer or a transformation of functions."""
    return (
        torch._C._autograd._profiler_enabled,
        torch._C._is_torch_function_mode_enabled,
        torch._C._len_torch_dispatch_stack,
        torch._C._is_tracing,
        torch._C._functorch.peek_interpreter_stack,
    )


def code_for(capability: tuple[int, int], arch_list: str) -> str | None:
    """Which part of a library built for ``arch_list`` a device of this compute capability runs.

    Args:
        capability: (major, minor), as of :func:`torch.cuda.get_device_capability`.
        arch_list: what ``TORCH_CUDA_ARCH_LIST`` was, such as ``"8.0;9.0+PTX"``.

    Returns:
        ``"sm_80"`` (machine code: the device is of the same major version and not older),
        ``"compute_90"`` (PTX, which the driver compiles for any device that is not older), or None.
        Code for ``9.0a`` runs on 9.0 alone, as PTX too.
    """
    native, ptx = [], []
    for major, minor, suffix, with_ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch_list):
        arch = int(major), int(minor)
        exact, same_major = arch == capability, arch[0] == capability[0]
        later = arch <= capability
        if later and same_major and (exact or suffix != "a"):
            native.append((arch, f"sm_{major}{minor}{suffix}"))
        if with_ptx and later and (not suffix or exact or (suffix == "f" and same_major)):
            ptx.append((arch, f"compute_{major}{minor}{suffix}"))
    for candidates in (native, ptx):
        if candidates:
            return max(candidates)[1]
    return None


@functools.cache
def cuda_code(index: int | None) -> tuple[str | None, str | None]:
    """(what device ``index`` runs of ``swa_fast._C_cuda``, None), or (None, why it runs nothing).

    None is the current device. The library has to be loaded.
    """
    arch_list = importlib.import_module("swa_fast._C_cuda").arch_list
    capability = torch.cuda.get_device_capability(index)
    code = code_for(capability, arch_list)
    if code is not None:
        return code, None
    number = f"{capability[0]}.{capability[1]}"
    return None, (
        f"swa_fast._C_cuda holds code for {arch_list} and this device "
        f"({torch.cuda.get_device_name(index)}) is of compute capability {number}: build swa_fast "
        f'from source with TORCH_CUDA_ARCH_LIST="{number}"'
    )


def _why_not_interpreted() -> str | None:
    triton, numpy = (importlib.import_module(name).__version__ for name in ("triton", "numpy"))
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} does not work beside numpy {numpy}: "
            "`pip install 'numpy<2.4'`"
        )
    if _release(triton) == (3, 9):
        return f"the interpreter of Triton {triton} refuses a mask that is the & of two comparisons"
    return None


@functools.cache
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    if triton_interprets() and (reason := _why_not_interpreted()):
        return reason
    try:
        importlib.import_module("swa_fast.kernels.batch_norm")
        importlib.import_module("swa_fast.kernels.update")
    except (ImportError, RuntimeError) as error:  # RuntimeError: triton without a usable driver
        return f"swa_fast.kernels does not load: {error}"
    return None


def check_name(backend: str | None) -> None:
    """Raises ValueError unless ``backend`` is None or a name of :data:`BACKENDS`."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")


def triton_interprets() -> bool:
    """True when Triton runs its kernels in Python, which also serves CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unusable(backend: str, device: str | torch.device) -> str | None:
    """The reason why ``backend`` cannot serve tensors on ``device``, or None if it can.

    Args:
        backend: a name of :data:`BACKENDS`.
        device: a device, or its type; ``"cuda"`` is the current CUDA device.

    Raises:
        ValueError: ``backend`` is not one of :data:`BACKENDS`.
    """
    check_name(backend)
    if backend == "reference":
        return None
    device_type, index = _type_and_index(device)
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
    if backend == "triton":
        return _triton_reason()
    if index is None:
        index = torch.cuda.current_device()
    return _load_library("_C_cuda") or cuda_code(index)[1]


def _type_and_index(device: str | torch.device) -> tuple[str, int | None]:
    if isinstance(device, torch.device):
        return device.type, device.index
    kind, _, index = device.partition(":")
    return kind, int(index) if index else None


@functools.cache
def _log_choice(backend: str, device: str, preferred: str | None, reason: str | None) -> None:
    """Once for each choice. A preferred backend that was meant to be there is worth a warning."""
    if reason is None:
        _log.info("tensors on %s are served by the %s backend", device, backend)
        return
    level = logging.INFO if reason.startswith("it was not built") else logging.WARNING
    message = "tensors on %s are served by the %s backend, because %s cannot: %s"
    _log.log(level, message, device, backend, preferred, reason)


@assume_constant_result
def choose_backend(device: str | torch.device, requested: str | None = None) -> str:
    """The backend for tensors on ``device``.

    Args:
        device: a device, or its type; ``"cuda"`` is the current CUDA device.
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
        reason = why_unusable(requested, device)
        if reason is not None:
            raise BackendError(f"{origin}{requested}: {reason}")
        _log_choice(requested, str(device), None, None)
        return requested
    candidates = _PREFERENCE.get(_type_and_index(device)[0], ("reference",))
    preferred = candidates[0]
    reason = why_unusable(preferred, device)
    # One after the other: Triton is not loaded where it is not needed.
    chosen = preferred
    if reason is not None:
        chosen = next(b for b in candidates[1:] if why_unusable(b, device) is None)
    _log_choice(chosen, str(device), preferred, reason)
    return chosen
