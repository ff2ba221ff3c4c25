"""The forward of a batch, and the merge of its statistics, as one CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["CapturedForward", "Signature", "signature_of", "waiting_told"]

Signature = tuple[torch.device, torch.dtype, torch.Size, tuple[int, ...]]

_SYNC_WARNING = "called a synchronizing CUDA operation"  # torch's words


@contextlib.contextmanager
def waiting_told() -> Iterator[Callable[[], bool]]:
    """Finds out whether operations in the block wait for the device, which no capture can bear: it
    would fail, and torch does not come out of a failed capture as it was.

    Yields:
        A function that tells it, after the block.
    """
    mode = torch.cuda.get_sync_debug_mode()
    found: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: any(_SYNC_WARNING in str(w.message) for w in found)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            found += told
    for warning in found:
        text = str(warning.message)
        # torch announces that the mode is a prototype.
        if _SYNC_WARNING not in text and "Synchronization debug mode" not in text:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def signature_of(batch: Any) -> Signature | None:
    """All of a batch but its values; None for what no graph can take as its input."""
    if type(batch) is not Tensor or batch.device.type != "cuda" or batch.layout != torch.strided:
        return None
    return batch.device, batch.dtype, batch.shape, batch.stride()


class CapturedForward:
    """Calls ``run(batch)`` by replaying it: one launch, whatever it consists of.

    What Python does in ``run`` happens once, when it is captured; nothing is computed then.

    Args:
        run: launches work that depends on the values of its argument and of tensors that stay where
            they are, and on nothing else.
        batch: on a CUDA device. Other batches have its shape, strides, type and device.

    Raises:
        Exception: what ``run`` raises, or torch where something cannot be captured.
    """

    def __init__(self, run: Callable[[Tensor], None], batch: Tensor) -> None:
        self.signature = signature_of(batch)
        self._input = torch.empty_like(batch).copy_(batch)
        self._graph = torch.cuda.CUDAGraph()
        # Weights that autocast has converted belong to this graph's memory, so it may neither keep
        # them for later nor use older ones.
        cached = torch.is_autocast_cache_enabled()
        problem: Exception | None = None
        with torch.cuda.device(batch.device), warnings.catch_warnings():
            # The graph is empty where ``run`` has raised.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            torch.set_autocast_cache_enabled(False)
            try:
                # Other threads, such as those that pin a loader's batches, may go on as they like.
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    try:
                        run(self._input)
                    except Exception as error:
                        problem = error
            except Exception as error:
                problem = problem or error
            finally:
                torch.set_autocast_cache_enabled(cached)
        if problem is not None:
            raise problem

    def __call__(self, batch: Tensor) -> None:
        self._input.copy_(batch)
        self._graph.replay()
