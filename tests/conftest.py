"""Fixtures and the rule by which GPU tests run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. The variable has to
# be set before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gpusim
import helpers

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
    """Every test starts from the same random state and leaves the caller's alone."""
    monkeypatch.delenv("SWA_FAST_BACKEND", raising=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def simulator() -> Any:
    """The simulator of GPUs, which counts launches, waits and bytes. A real GPU counts none of
    them by itself, and without counts there is nothing to test."""
    if not gpusim.active():
        pytest.skip("counts need the simulated GPU, and this one is real")
    return gpusim


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if helpers.comparisons:
        terminalreporter.write_line(
            f"differential tests: {helpers.comparisons} tensors compared with torch and float64"
        )
