"""The numbers that Python, C++ and Triton have to agree on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import need

from swa_fast import SWA, Averager
from swa_fast import _layout as layout

HEADER = Path(__file__).parents[1] / "csrc" / "layout.h"


def test_csrc_has_the_same_numbers() -> None:
    if not HEADER.exists():
        pytest.skip("the sources are not beside the tests")
    constants = re.findall(r"constexpr \w+ k(\w+) = (\d+);", HEADER.read_text(encoding="utf-8"))
    assert len(constants) > 20
    for name, value in constants:
        python_name = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert getattr(layout, python_name) == int(value), name
    declared = HEADER.read_text(encoding="utf-8").count("constexpr")
    assert declared == len(constants)


def test_numbers_fit_their_fields() -> None:
    assert layout.BYTES < 1 << (layout.SOURCE_TYPE - layout.AVERAGE_TYPE)
    assert layout.BYTES < 1 << (layout.COPIED - layout.SOURCE_TYPE)
    assert layout.CPU_SEGMENT < 1 << layout.AVERAGE_TYPE
    assert layout.CUDA_SEGMENT_BYTES % layout.ROW_ALIGNMENT == 0
    # A Philox group, of eight elements, lies within a segment.
    assert layout.TRITON_SEGMENT % 8 == 0 and layout.CUDA_SHORT_BYTES < layout.CUDA_SEGMENT_BYTES


@pytest.mark.parametrize("size", [1024, 8192])
def test_triton_takes_the_size_of_a_segment_from_here(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that believed another size than the table's would leave elements out."""
    need("triton", "cpu")
    from swa_fast.kernels import update

    assert update.BLOCK == layout.TRITON_SEGMENT
    monkeypatch.setattr(layout, "TRITON_SEGMENT", size)
    monkeypatch.setattr(update, "BLOCK", size)
    source = torch.zeros(10_007)
    averager = Averager([source], {"swa": SWA()}, backend="triton")
    source.fill_(3)
    averager.update()
    assert len(averager._storage.plans[0].update.words) == -(-10_007 // size)
    assert torch.equal(averager.averages["swa"]["0"], source)


def test_memory_that_nothing_was_written_to_is_poisoned() -> None:
    """What tests/conftest.py promises all tests, for tensors made in Python and in C++."""
    x = torch.zeros(3)
    for empty in (
        torch.empty(3),
        torch.empty_like(x),
        x.new_empty(3),
        torch.empty_strided((3,), (1,)),
    ):
        assert empty.isnan().all()
