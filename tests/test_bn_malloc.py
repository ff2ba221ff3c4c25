"""glibc's malloc during a pass and afterwards."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import swa_fast
from swa_fast.batch_norm import malloc

COLUMNS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


class Libc:
    """Records what malloc is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.trimmed = 0
        self.malloc = Mock(return_value=0)
        self.free = Mock()

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Libc:
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "SWA_FAST_KEEP_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc, "_libc", lambda: "glibc")
    libc = Libc()
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: libc)
    return libc


SET = [(-4, 0), (-1, -1)]
RETURNED = [(-1, 128 << 10)]
RESTORED = [(-4, 65536), (-3, 32 << 20), (-1, 64 << 20)]


@pytest.mark.parametrize("loader", ["fine", "broken"])
def test_memory_is_kept_for_the_time_of_the_pass(loader: str, libc: Libc) -> None:
    during: list[int] = []

    def batches() -> Iterator[Tensor]:
        during.append(len(libc.calls))
        yield COLUMNS
        if loader == "broken":
            raise OSError("disk gone")

    with pytest.raises(OSError) if loader == "broken" else contextlib.nullcontext():
        swa_fast.update_bn(batches(), nn.BatchNorm1d(2))
    assert during == [2]
    assert libc.calls == SET + RETURNED + RESTORED and libc.trimmed >= 1


def test_malloc_is_left_alone_where_that_is_asked_for(
    libc: Libc, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.BatchNorm1d(2)
    swa_fast.update_bn([COLUMNS], model, keep_memory=False)
    for name, value in (
        ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"),
        ("SWA_FAST_KEEP_MEMORY", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            swa_fast.update_bn([COLUMNS], model)
    monkeypatch.setattr(malloc, "_libc", lambda: "")
    swa_fast.update_bn([COLUMNS], model)
    assert libc.calls == [] and libc.trimmed == 0
    monkeypatch.setenv("SWA_FAST_KEEP_MEMORY", "no")
    with pytest.raises(ValueError, match="expected 0 or 1"):
        swa_fast.update_bn([COLUMNS], model)


@pytest.mark.parametrize("fails", [False, True])
def test_passes_that_overlap_in_threads(fails: bool, libc: Libc) -> None:
    """The one that ends first changes nothing for the other."""
    inside, ended = threading.Event(), threading.Event()
    seen: list[list[tuple[int, int]]] = []

    def long() -> Iterator[Tensor]:
        yield COLUMNS
        inside.set()
        assert ended.wait(60)
        seen.append(list(libc.calls))
        yield COLUMNS

    def short() -> Iterator[Tensor]:
        yield COLUMNS
        if fails:
            raise OSError("disk gone")

    thread = threading.Thread(target=swa_fast.update_bn, args=(long(), nn.BatchNorm1d(2)))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        swa_fast.update_bn(short(), nn.BatchNorm1d(2))
    ended.set()
    thread.join()
    assert seen == [[*SET, *RETURNED, (-1, -1)]]
    assert libc.calls == seen[0] + RETURNED + RESTORED
    # One by each pass, and one that kept hold of the first one's heap until the last had ended.
    assert libc.malloc.call_count == libc.free.call_count == 3


_RESIDENT = """
import sys, threading
import torch
from torch import nn
import swa_fast

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

def model():
    return nn.Sequential(*[m for _ in range(6) for m in (
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())])

class Fails(nn.Module):
    def forward(self, x):
        kept = [x + i for i in range(6)]
        raise RuntimeError("no luck")

def work(network):
    try:
        swa_fast.update_bn(batches, network, channels_last=False)
    except RuntimeError as error:
        assert "luck" in str(error)

batches = [torch.randn(64, 16, 48, 48)] * 3
how = sys.argv[1]
networks = [model() for _ in range(2 if how == "threads" else 1)]
if how == "exception":
    networks[0].append(Fails())
small = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
swa_fast.update_bn([batches[0][:2]] * 3, small)  # what is loaded when first used
before = resident()
threads = [threading.Thread(target=work, args=(network,)) for network in networks]
if how == "threads":
    for thread in threads: thread.start()
    for thread in threads: thread.join()
else:
    work(networks[0])
print(before, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
@pytest.mark.parametrize("how", ["plain", "exception", "threads"])
def test_memory_is_returned_afterwards(how: str) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "SWA_FAST_KEEP"))
    }
    answer = subprocess.run(
        [sys.executable, "-c", _RESIDENT, how],
        capture_output=True, text=True, timeout=300, check=True,
        env={**environment, "PYTHONPATH": str(Path(swa_fast.__file__).parents[1])},
    )  # fmt: skip
    before, after = map(int, answer.stdout.split())
    assert after <= 1.05 * before, f"{before} kB before the pass, {after} kB after it"
