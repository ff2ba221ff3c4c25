"""The machine that a run is on: its versions and hardware, its speed, and what suits it."""

from __future__ import annotations

import platform
import resource
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import swa_fast

from .config import TrainConfig
from .distributed import World, resolve_device
from .errors import TrainError
from .factories import is_factory
from .models import MODELS, build_model, forward_macs


def environment(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Versions and hardware of a run, as JSON values."""
    device = torch.device(config.device)
    return {
        "swa_fast": swa_fast.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": config.threads,
        "processes": processes,
        "git_commit": _git_commit(),
    }


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory that this process has held so far, in bytes: of the machine, and of a CUDA
    device (None on the CPU)."""
    # Linux counts in KiB.
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cuda = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"host": host, "device": cuda}


def _training_step(
    name: str, width: int, side: int, batch: int, device: torch.device, amp: str
) -> tuple[Callable[[], None], float]:
    """A forward and backward pass over made-up images, and its floating-point operations: six for
    each multiply-add of a forward pass, two forward and four backward."""
    model = build_model(name, in_channels=3, num_classes=10, width=width)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.zeros(batch, 3, side, side, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=amp != "none"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    return step, 6.0 * forward_macs(model, (3, side, side)) * batch


def measure_speed(device: str = "auto", amp: str = "none") -> float:
    """Floating-point operations per second that a device reaches in training, measured with a few
    steps of a WRN-16-4."""
    target = torch.device(resolve_device(device))
    batch = 256 if target.type == "cuda" else 16
    step, work = _training_step("wrn16-4", MODELS["wrn16-4"].width, 32, batch, target, amp)
    # Here, because it loads what builds C++ extensions.
    from torch.utils.benchmark import Timer

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return work / min(timer.timeit(1).mean for _ in range(2))


def choose_threads(config: TrainConfig, seconds: float = 0.5) -> int:
    """The number of CPU threads with which the configuration's network trains fastest at present:
    torch's choice, half of it and so on down to one, tried for ``seconds`` in all.

    On a machine that others use too, threads wait for those that were taken off their cores, and
    small networks train faster with one. Networks of which one image takes too long to be tried
    within that time get torch's choice, and so do a user's own networks and data, every process of
    several, and a run on a GPU.
    torch's number of threads and its random state stay as they are.
    """
    most = torch.get_num_threads()
    candidates = sorted({max(1, most >> shift) for shift in range(most.bit_length())})
    own = is_factory(config.model) or is_factory(config.dataset)
    if len(candidates) == 1 or World.count() > 1 or config.device != "cpu" or own:
        return most
    share = seconds / len(candidates)
    with torch.random.fork_rng():
        cpu, side = torch.device("cpu"), config.image_size or MODELS[config.model].image_size
        _, work = _training_step(config.model, config.width, side, 1, cpu, "none")
        # A few steps at 10 GFLOP/s, about what one core reaches with small convolutions.
        batch = min(config.batch_size, int(share / 4 * 1e10 / work))
        if batch < 1:
            return most
        step, _ = _training_step(config.model, config.width, side, batch, cpu, config.amp)
        rates = {}
        try:
            for threads in candidates:
                torch.set_num_threads(threads)
                step()  # oneDNN prepares its kernels
                begin, steps = time.perf_counter(), 0
                while time.perf_counter() - begin < share:
                    step()
                    steps += 1
                rates[threads] = steps / (time.perf_counter() - begin)
        finally:
            torch.set_num_threads(most)
    return max(candidates, key=lambda threads: rates[threads])


def check_amp(config: TrainConfig) -> None:
    """Refuses bf16 on a CPU that has no instructions for it, where it costs time.

    Raises:
        TrainError: the message tells how many times slower than float32 it was measured to be.
    """
    if config.amp != "bf16" or config.device != "cpu" or _has_bf16():
        return
    factor = measure_speed("cpu", "none") / measure_speed("cpu", "bf16")
    if factor > 1:
        raise TrainError(
            f"--amp: expected none on this CPU, which has no bf16 instructions, found bf16, with "
            f"which training steps of a WRN-16-4 take {factor:.1f} times as long here; "
            f"--force-amp trains with it all the same"
        )


def _has_bf16() -> bool:
    """Whether the CPU has instructions that multiply bf16 numbers."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


def cpu_name() -> str:
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
