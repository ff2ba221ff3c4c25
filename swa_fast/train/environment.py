"""Versions and hardware that a result depends on."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import swa_fast

from .config import TrainConfig


def environment(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Versions and hardware of a run, as JSON values."""
    device = torch.device(config.device)
    return {
        "swa_fast": swa_fast.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": config.threads,
        "processes": processes,
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that swa_fast runs from; None for an installed copy."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
            return subprocess.check_output(
                command, text=True, timeout=10, stderr=subprocess.DEVNULL
            ).strip()
    return None
