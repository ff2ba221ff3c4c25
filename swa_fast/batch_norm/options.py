"""The options of a pass, checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import _backends
from .._layout import ESTIMATORS

Call = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Options:
    """Arguments of :func:`swa_fast.update_bn`, which describes them.

    Raises:
        ValueError: a value is outside its range.
        TypeError: ``call`` is not callable.
    """

    device: torch.device | None = None
    estimator: str = "torch"
    unbiased: bool = True
    max_batches: int | None = None
    tolerance: float | None = None
    call: Call | None = None
    group: dist.ProcessGroup | None = None
    progress: bool = False
    backend: str | None = None
    channels_last: bool | None = None
    graph: bool = False
    keep_memory: bool = True
    # fvcore's conventions: the whole batch is the model's input, and modes are left as they are.
    whole_batch: bool = False
    switch_mode: bool = True

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator: expected one of {', '.join(ESTIMATORS)}, found {self.estimator!r}"
            )
        if not self.unbiased and self.estimator != "pooled":
            raise ValueError(
                "unbiased=False: expected estimator='pooled', whose variance has both "
                f"conventions, found {self.estimator!r}, which averages unbiased variances"
            )
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"max_batches: expected 1 or more, found {self.max_batches}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance: expected a positive number, found {self.tolerance}")
        if self.call is not None and not callable(self.call):
            raise TypeError(f"call: expected a function, found {type(self.call).__name__}")
        if self.backend is not None and self.backend not in _backends.BACKENDS:
            raise ValueError(
                f"backend: expected one of {', '.join(_backends.BACKENDS)}, found {self.backend!r}"
            )

    def completed_for(self, model: nn.Module) -> Options:
        """The options with what was left to the model: where its batches go, and in which memory
        format. ``model`` is the one that the user handed over, with its wrappers."""
        device = self.device
        if device is None and not self.whole_batch and _is_data_parallel(model):
            # The wrapper would have moved the batch; the pass uses the module inside.
            first = next(itertools.chain(model.parameters(), model.buffers()), None)
            if first is not None and first.device.type != "cpu":
                device = first.device
        channels_last = self.channels_last
        if channels_last is None:
            channels_last = any(
                isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()
            )
        return replace(self, device=device, channels_last=channels_last)


def _is_data_parallel(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        for module in model.modules()
    )


def device_of(device: int | str | torch.device | None) -> torch.device | None:
    """A device with its index, as tensors on it tell it."""
    return None if device is None else torch.empty(0, device=device).device


def process_group(group: dist.ProcessGroup | bool | None) -> dist.ProcessGroup | None:
    """
    Raises:
        ValueError: torch.distributed is not initialised, or ``group`` is no group of this process.
    """
    if group is None or group is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: expected an initialised torch.distributed, found none")
    if group is True:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: expected True or a process group of which this process is a member, found "
            f"{group!r}"
        )
    return group
