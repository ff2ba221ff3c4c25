"""``python -m swa_fast``: versions, build facts, usable backends, and a self-check of each."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import SWA, Averager, __version__, _backends, update_bn


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_averager(backend: str, device: str) -> str | None:
    """Averages 1, 2 and 6, puts the average in and takes it out; None, or what went wrong."""
    weight = torch.zeros(1001, device=device)
    averager = Averager([("weight", weight)], {"swa": SWA()}, backend=backend)
    for value in (1.0, 2.0, 6.0):
        weight.fill_(value)
        averager.update()
    if averager.n_averaged != {"swa": 3}:
        return f"after 3 updates n_averaged is {averager.n_averaged}"
    average = averager.averages["swa"]["weight"]

    def hold(what: str, tensor: Tensor, expected: float) -> str | None:
        error = (tensor - expected).abs().max().item()
        return None if error < 1e-6 else f"{what} came out {expected} with an error of {error:.2g}"

    problem = hold("the mean of 1, 2, 6", average, 3.0)
    with averager.applied("swa"):
        problem = problem or hold("the weight with the average applied", weight, 3.0)
    problem = problem or hold("the weight after that", weight, 6.0)
    return problem or hold("the average after that", average, 3.0)


def _check_batch_norm(backend: str, device: str) -> str | None:
    """Estimates the statistics of one batch; None, or what went wrong."""
    batch = torch.arange(40.0).view(8, 5)
    first, second = (nn.BatchNorm1d(5, device=device) for _ in range(2))
    update_bn([batch], nn.Sequential(first, second), device, backend=backend)
    variance, mean = (s.cpu() for s in torch.var_mean(batch, 0))
    for what, found, expected in (
        ("mean", first.running_mean, mean),
        ("variance", first.running_var, variance),
        ("mean of the output", second.running_mean, torch.zeros(5)),
        ("variance of the output", second.running_var, torch.full((5,), 8 / 7)),
    ):
        assert found is not None
        error = (found.cpu() - expected).abs().max().item()
        if not error < 1e-4 * expected.abs().max().clamp(min=1).item():
            return f"BatchNorm's {what} came out with an error of {error:.2g}"
    return None


def _self_check(backend: str, device: str) -> str:
    """What users run, with one backend; "passed", or what went wrong."""
    try:
        problem = _check_averager(backend, device) or _check_batch_norm(backend, device)
    # A report has to survive whatever a broken installation throws, and shows it.
    except Exception as failure:
        return f"failed: {type(failure).__name__}: {failure}"
    return "passed" if problem is None else f"failed: {problem}"


def _code(device: str) -> dict[str, str]:
    """What tensors on a device will be served by: ``kind`` and, as a sentence, ``text``.

    ``kind`` is "native" (machine code), "ptx" (compiled by the driver at first use), "triton",
    "cpu" (C++), "reference" (plain PyTorch), or "none": SWA_FAST_BACKEND asks for the impossible.
    """
    try:
        backend = _backends.choose_backend(device)
    except (_backends.BackendError, ValueError) as error:
        return {"kind": "none", "text": str(error)}
    if backend == "cuda":
        code = _backends.cuda_code(torch.device(device).index)[0] or ""
        if code.startswith("sm_"):
            return {"kind": "native", "text": f"native code ({code})"}
        text = f"PTX ({code}), compiled by the driver at first use, which takes seconds"
        return {"kind": "ptx", "text": text}
    text = {
        "triton": "Triton, compiled at first use, which takes seconds",
        "cpu": "C++ kernels",
        "reference": "plain PyTorch",
    }[backend]
    preferred = "cuda" if device.startswith("cuda") else "cpu"
    reason = _backends.why_unusable(preferred, device)
    if reason is None:
        because = "" if backend == preferred else ", as SWA_FAST_BACKEND asks"
    else:
        because = f"; the {preferred} backend cannot serve it: {reason}"
    return {"kind": backend, "text": text + because}


def report() -> dict[str, Any]:
    """Everything a bug report needs.

    Returns:
        ``versions`` (str or None each), ``build`` (facts recorded at build time), ``devices``,
        ``code`` (for each device what it will run: ``kind`` and ``text``), and ``backends``: for
        each name ``usable`` (bool), ``device`` (where it was checked), ``reason`` (why not, or
        None) and ``self_check`` ("passed", "failed: ..." or None).
    """
    cuda = torch.cuda.is_available()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if cuda else 0))]
    backends = {}
    for backend in _backends.BACKENDS:
        device = "cuda" if backend in ("cuda", "triton") else "cpu"
        if backend == "triton" and not cuda and _backends.triton_interprets():
            device = "cpu"
        reason = _backends.why_unusable(backend, device)
        backends[backend] = {
            "usable": reason is None,
            "device": device,
            "reason": reason,
            "self_check": _self_check(backend, device) if reason is None else None,
        }
    return {
        "versions": {
            "swa_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "platform": platform.platform(terse=True),
        },
        "build": _backends.build_info(),
        "devices": {
            "cpu_threads": torch.get_num_threads(),
            "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            if cuda
            else [],
        },
        "code": {device: _code(device) for device in devices},
        "backends": backends,
    }


def _print(facts: dict[str, Any]) -> None:
    for section in ("versions", "build", "devices"):
        print(section)
        for key, value in facts[section].items() or [("(none)", "this copy was never built")]:
            print(f"  {key:12} {value if value not in (None, []) else '-'}")
    print("code that tensors are served by")
    for device, code in facts["code"].items():
        print(f"  {device:12} {code['text']}")
    print("backends")
    for name, state in facts["backends"].items():
        if state["usable"]:
            print(f"  {name:12} usable on {state['device']}, self-check {state['self_check']}")
        else:
            print(f"  {name:12} not usable: {state['reason']}")


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 1 if a usable backend fails its self-check, else 0."""
    parser = argparse.ArgumentParser(prog="python -m swa_fast", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    facts = report()
    try:
        if arguments.json:
            print(json.dumps(facts, indent=2))
        else:
            _print(facts)
        if sys.stdout is not None:  # as it is where the process was started without one
            sys.stdout.flush()
    except BrokenPipeError:  # as by head: the checks are done, and nobody reads on
        # Python flushes at its end and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    checks = [state["self_check"] for state in facts["backends"].values()]
    return int(any(check not in (None, "passed") for check in checks))


if __name__ == "__main__":
    sys.exit(main())
