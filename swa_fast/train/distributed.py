"""The processes of a run, one or several started by torchrun, and their devices."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import TrainError


class World:
    """All processes of a run. With one process every method does nothing.

    Started by ``torchrun``, which sets RANK, WORLD_SIZE and LOCAL_RANK, the processes join with
    nccl on CUDA devices and with gloo on the CPU; call :meth:`close` at the end.

    Args:
        cuda: whether the run is on CUDA devices, one per process.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self.size = self.count()
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self._local = int(os.environ.get("LOCAL_RANK", "0")) if self.size > 1 else 0
        if self.size > 1:
            if cuda:
                torch.cuda.set_device(self._local)
            dist.init_process_group("nccl" if cuda else "gloo")

    @staticmethod
    def count() -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def is_main() -> bool:
        """Whether this process is the first, by the environment."""
        return World.count() == 1 or os.environ.get("RANK", "0") == "0"

    @staticmethod
    def command(module: str) -> list[str]:
        """How to start a module with as many processes again."""
        if World.count() == 1:
            return ["python", "-m", module]
        here = os.environ.get("LOCAL_WORLD_SIZE", str(World.count()))
        return ["torchrun", "--nproc-per-node", here, "-m", module]

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process, for the configuration's ``device``."""
        if self.size > 1 and name.startswith("cuda"):
            return torch.device("cuda", self._local)
        return torch.device(name)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of the processes' values. Waits for the device."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """The processes' values in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the buffers of the first, such as BatchNorm's running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the group of processes; networks distributed over it should be gone by then."""
        if self.size > 1 and dist.is_initialized():
            # Also those in reference cycles: in torch 2.13 the last one to hold a gloo group joins
            # the group's threads without giving up the GIL, for which they may be waiting.
            gc.collect()
            # The threads need the GIL for tensors of the last collectives that nobody else holds.
            # Caches of torch keep a device mesh, and so its group, to the end of the process: a
            # thread that asks for the GIL there ends the process by SIGABRT.
            time.sleep(0.2)
            dist.destroy_process_group()


def resolve_device(name: str) -> str:
    """``cpu`` or ``cuda:N`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        TrainError: another name, or a device that torch does not find.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (name == "cuda" or index.isdecimal()):
        raise TrainError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if not torch.cuda.is_available():
        raise TrainError(f"--device: torch finds no CUDA device, found {name!r}; expected cpu here")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise TrainError(
            f"--device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, found {name!r}"
        )
    return f"cuda:{number}"
