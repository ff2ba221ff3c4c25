"""What captured graphs read is kept as long as they, or for good. (On a GPU: test_averager.py.)"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from swa_fast import _graphs


class Something:
    """Can be referred to weakly."""


class Graph(Something):
    capturing: Any = None

    @classmethod
    def get_currently_capturing_graph(cls) -> Any:
        if cls.capturing is None:
            raise RuntimeError("The current stream is not currently capturing.")
        return cls.capturing


@pytest.mark.parametrize("told", ["torch's", "another's", "none", "no such question"])
def test_kept_as_long_as_the_graph_that_torch_tells(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph: Something | None = {"torch's": Graph, "another's": Something}.get(told, type(None))()
    monkeypatch.setattr(Graph, "capturing", graph)
    known = Something if told == "no such question" else Graph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", known)
    monkeypatch.setattr(_graphs, "_kept_for_good", [])
    read = Something()
    _graphs.keep_for_graph(read, None)
    kept = weakref.ref(read)
    del read
    gc.collect()
    assert kept() is not None
    Graph.capturing = graph = None  # monkeypatch would keep what it replaces
    gc.collect()
    assert (kept() is None) == (told == "torch's")
