"""What a captured CUDA graph reads at every replay lives as long as the graph."""

from __future__ import annotations

import contextlib
import weakref

import torch

__all__ = ["keep_for_graph"]

# What graphs read whose end cannot be seen: until the process ends.
_kept_for_good: list[object] = []


def keep_for_graph(*objects: object) -> None:
    """Keeps the objects for as long as the CUDA graph that the current stream captures.

    torch 2.11 does not say which graph that is, unlike 2.14: the objects are then kept until the
    process ends, as they are where the graph is none of Python's (``torch.cuda.CUDAGraph``).
    """
    graph = None
    # Neither a torch that cannot tell, nor a capture that torch knows nothing of, has one.
    with contextlib.suppress(AttributeError, RuntimeError):
        graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    if not isinstance(graph, torch.cuda.CUDAGraph):
        _kept_for_good.append(objects)
        return
    kept = [objects]
    # Memory that goes with the graph is used again in the order of the stream that allocated it: as
    # with tensors of one's own, replays on other streams have to be waited for first.
    weakref.finalize(graph, kept.clear).atexit = False
