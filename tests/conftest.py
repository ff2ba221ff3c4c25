"""Fixtures and the rule by which GPU tests run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Where tests run in several processes, these and what they start share the cores: OpenMP with more
# threads than cores waits for itself. The variable has to be set before torch is first imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. The variable has to
# be set before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gpusim
import helpers

if os.environ.get("TRITON_INTERPRET") == "1":
    helpers.hasten_interpreter()

# Fixtures of the trainer's tests.
from train_runs import finished, interrupted, small  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("SWA_FAST_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="no CUDA device (SWA_FAST_REQUIRE_GPU=1 makes this a failure)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same random state and leaves the caller's alone, and whether
    gradients are recorded, too."""
    monkeypatch.delenv("SWA_FAST_BACKEND", raising=False)
    with torch.random.fork_rng():
        if torch.cuda.is_available():
            torch.manual_seed(0)
        else:  # which formats the stack for each kind of device that is not there
            torch.default_generator.manual_seed(0)
        yield
    recorded = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert recorded, "gradients are no longer recorded after this test"


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that torch allocates for others to fill, in Python or C++, holds NaN and the largest
    integers until they do. Not on a GPU: a fill is a launch, and launches are counted."""
    if "gpu" in request.keywords:
        yield
        return
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def simulator() -> Any:
    """The simulator of GPUs, which counts launches, waits and bytes. A real GPU counts none of
    them by itself, and without counts there is nothing to test."""
    if not gpusim.active():
        pytest.skip("counts need the simulated GPU, and this one is real")
    return gpusim


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # of pytest-xdist, in its workers
    if output is not None:
        output["comparisons"] = helpers.comparisons


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    helpers.comparisons += getattr(node, "workeroutput", {}).get("comparisons", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if helpers.comparisons:
        terminalreporter.write_line(
            f"differential tests: {helpers.comparisons} tensors compared with torch and float64"
        )
