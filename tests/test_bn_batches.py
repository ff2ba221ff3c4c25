"""Batches that are no tensors: what torch's pass hands to the model as it is, ours does, too."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.optim import swa_utils

import swa_fast
from swa_fast.batch_norm.batches import move

TABLE = torch.arange(60.0).view(20, 3).sin()


@dataclasses.dataclass
class Sample:
    x: Tensor
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    left_out: Tensor = dataclasses.field(init=False)


class Reads(nn.Module):
    """Makes of a batch what its BatchNorm takes."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, batch: Any) -> Tensor:
        return self.net(self.read(batch))


def packed(lengths: list[int], seed: int) -> rnn.PackedSequence:
    draw = torch.Generator().manual_seed(seed)
    sequences = [torch.randn(n, 3, generator=draw) for n in lengths]
    return rnn.pack_sequence(sequences, enforce_sorted=False)


BATCHES: dict[str, tuple[Callable[[Any], Tensor], list[Any]]] = {
    "dataclass": (lambda b: b.x, [Sample(TABLE[i : i + 5]) for i in range(3)]),
    "frozen dataclass": (lambda b: b.x, [Frozen(TABLE[i : i + 5]) for i in range(3)]),
    "numpy": (torch.from_numpy, [TABLE[i : i + 5].numpy() for i in range(3)]),
    "numpy and labels": (torch.from_numpy, [(TABLE[i : i + 5].numpy(), [1]) for i in range(3)]),
    "strings": (
        lambda b: torch.tensor([[float(len(s))] * 3 for s in b]),
        [(["a", "bb", "ccc"], 0), (["dddd", ""], 1)],
    ),
    "text": (lambda b: torch.tensor([[float(ord(c))] * 3 for c in b]), ["swa", "weights"]),
    "index": (lambda i: TABLE[4 * i : 4 * i + 4], [0, 1, 2, 3]),
    "None": (lambda _: TABLE, [None] * 3),
    "packed sequence": (lambda b: b.data, [packed([2, 5, 3], 0), packed([1, 4], 1)]),
}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("name", BATCHES)
def test_handed_over_as_torch_does(name: str, device: str | None) -> None:
    read, batches = BATCHES[name]
    ours = Reads(read)
    theirs = copy.deepcopy(ours)
    report = swa_fast.update_bn(batches, ours, device)
    swa_utils.update_bn(batches, theirs)  # which moves tensors only
    assert report.batches == len(batches)
    assert report.samples == sum(len(read(b[0] if isinstance(b, tuple) else b)) for b in batches)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_a_packed_sequence_through_a_recurrent_network() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.bn = nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4)

        def forward(self, batch: rnn.PackedSequence) -> Tensor:
            y: Tensor = self.bn(self.rnn(batch)[0].data)
            return y

    ours = Recurrent()
    theirs = copy.deepcopy(ours)
    batches = BATCHES["packed sequence"][1]
    swa_fast.update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_moved_as_what_they_are() -> None:
    meta = torch.device("meta")
    sample = Sample(TABLE, "a")
    moved = move([sample, {"b": packed([2, 1], 0)}, None, "c", 3, Sample], meta, False)
    assert isinstance(moved[0], Sample) and moved[0].x.is_meta and moved[0].name == "a"
    assert not sample.x.is_meta  # the loader's own
    assert isinstance(moved[1]["b"], rnn.PackedSequence) and moved[1]["b"].data.is_meta
    assert moved[2:] == [None, "c", 3, Sample]
    frozen = move(Frozen(TABLE), meta, False)
    assert frozen.x.is_meta and not hasattr(frozen, "left_out")
    untouched = Sample(TABLE)
    assert move(untouched, None, False) is untouched
