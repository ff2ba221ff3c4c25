"""The GPU's ways through memory, which the bits of the result must not show: sources at any offset,
segments that share a block and segments that have one, the ticket, skipped updates, the swap."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, raw_arguments
from torch import Tensor, nn

from swa_fast import EMA, SWA, Averager
from swa_fast import _layout as layout

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["cuda", "triton"])
# Equal weights of 16 bits are refused, unless they are rounded stochastically.
RULES = {"half": EMA(0.5), "ema": EMA(0.3), "long": EMA(0.99, warmup="diffusers")}
# Around packs, what a warp holds, what a block holds, and all of them with a rest.
SIZES = (1, 7, 8, 129, 256, 257, 512, 1021, 1024, 2049, 5003)


def at_offset(size: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Zeros on the GPU, ``offset`` bytes behind a multiple of 16."""
    memory = torch.zeros(size + 16, dtype=dtype, device="cuda")
    first = (offset - memory.data_ptr()) % 16 // dtype.itemsize
    tensor = memory[first : first + size]
    assert tensor.data_ptr() % 16 == offset
    return tensor


def fill(sources: list[Tensor]) -> None:
    for source in sources:
        source.copy_(torch.randn(source.shape, dtype=torch.float64).to(source.dtype))


def offsets(dtype: torch.dtype) -> range:
    return range(0, 16, dtype.itemsize)


def assert_same(left: Averager, right: Averager) -> None:
    for rule in left.averages:
        for name, average in left.averages[rule].items():
            assert torch.equal(average, right.averages[rule][name]), (rule, name)
    assert left.n_averaged == right.n_averaged


@backends
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize(
    "dtype, rounding",
    [*((dtype, "nearest") for dtype in DTYPES), (torch.bfloat16, "stochastic")],
    ids=str,
)
def test_sources_at_any_offset(
    backend: str, dtype: torch.dtype, rounding: str, source_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    every = list(itertools.product(offsets(source_dtype), SIZES))
    # Triton's ways are fewer and its simulation slower.
    every = every if backend == "cuda" else every[1::3]
    sources = [at_offset(size, source_dtype, offset) for offset, size in every]
    kwargs = {"dtype": dtype, "rounding": rounding}
    averager = Averager(sources, RULES, backend=backend, **kwargs)
    plain = Averager(sources, RULES, backend="reference", **kwargs)
    for _ in range(3):
        fill(sources)
        averager.update()
        plain.update()
        assert_same(averager, plain)


class Bytes(nn.Module):
    """Buffers that are copied, at every offset."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, device="cuda"))
        for offset, size in itertools.product(range(16), sizes):
            self.register_buffer(f"b{offset}_{size}", at_offset(size, torch.uint8, offset))


@backends
def test_buffers_at_any_offset(backend: str) -> None:
    torch.manual_seed(2)
    model = Bytes((1, 8, 30, 2048, 5000))
    averager = Averager(model, {"a": SWA(), "b": EMA(0.5)}, backend=backend)
    for _ in range(2):
        for buffer in model.buffers():
            buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8))
        averager.update()
        for rule, (name, buffer) in itertools.product("ab", model.named_buffers()):
            assert torch.equal(averager.averages[rule][name], buffer), (rule, name)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_at_any_offset(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    every = list(itertools.product(offsets(dtype), SIZES))
    sources = [at_offset(size, dtype, offset) for offset, size in every]
    fill(sources)
    averager = Averager(sources, {"a": EMA(0.3), "b": EMA(0.5)}, dtype=dtype, backend=backend)
    averager.update()
    fill(sources)
    averager.update()
    live = [source.clone() for source in sources]
    average = [averager.averages["b"][str(i)].clone() for i in range(len(sources))]
    untouched = [averager.averages["a"][str(i)].clone() for i in range(len(sources))]
    with averager.applied("b"):
        assert all(torch.equal(s, a) for s, a in zip(sources, average, strict=True))
    assert all(torch.equal(s, a) for s, a in zip(sources, live, strict=True))
    for i in range(len(sources)):
        assert torch.equal(averager.averages["b"][str(i)], average[i])
        assert torch.equal(averager.averages["a"][str(i)], untouched[i])


def mixed() -> list[Tensor]:
    """Short segments, by number no multiple of a block's warps, between long ones, of all types."""
    sources = []
    for i in range(21):
        sources.append(at_offset(1 + 11 * i, DTYPES[i % 4], 0))
        if i % 5 == 0:
            sources.append(at_offset(3001 + 1700 * i, DTYPES[(i // 5) % 4], 0))
    fill(sources)
    return sources


def test_the_table_has_short_segments_last() -> None:
    sources = mixed()
    averager = Averager(sources, RULES, dtype=None, backend="cuda")
    averager.update()
    table = averager._storage.plans[0].update
    size = {code: dtype.itemsize for dtype, code in layout.TYPE_CODES.items()}
    packed = table.words.cpu()[:, layout.PACKED].tolist()
    lengths = [(p & 0xFFFFFFFF) * size[(p >> layout.AVERAGE_TYPE) & 0xFF] for p in packed]
    short = table.short
    assert short > 16 and short % 8 != 0 and len(lengths) - short > 8
    assert all(length <= layout.CUDA_SHORT_BYTES for length in lengths[-short:])
    assert all(
        layout.CUDA_SHORT_BYTES < length <= layout.CUDA_SEGMENT_BYTES for length in lengths[:-short]
    )
    assert sum(lengths) == sum(s.numel() * s.element_size() for s in sources)


@backends
@pytest.mark.parametrize("captured", [False, True])
def test_mixed_segments_tickets_and_skips_over_many_updates(backend: str, captured: bool) -> None:
    torch.manual_seed(4)
    sources = mixed()
    kwargs = {"dtype": None, "on_nonfinite": "skip"}
    averager = Averager(sources, RULES, backend=backend, **kwargs)
    plain = Averager(sources, RULES, backend="reference", **kwargs)
    averager.update()
    plain.update()
    update = averager.update
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            averager.update()
        update = graph.replay
    engine = averager._storage.parts[0].engine
    assert engine.counters is not None
    for turn in range(8):
        fill(sources)
        if turn in (2, 5):  # in a short segment and in a long one
            sources[turn // 4][-1] = float("nan")
        update()
        plain.update()
        assert engine.counters[: layout.SKIPPED].tolist() == [0, 0]  # ticket and flag
        assert_same(averager, plain)
    assert engine.skipped.item() == 2


@pytest.mark.parametrize("on_nonfinite", [None, "skip"])
def test_the_result_does_not_depend_on_how_segments_share_blocks(on_nonfinite: str | None) -> None:
    torch.manual_seed(5)
    sources = mixed()
    results = []
    for short in (0, 5, None):
        averager = Averager(sources, RULES, dtype=None, backend="cuda", on_nonfinite=on_nonfinite)
        averager.update()
        table = averager._storage.plans[0].update
        if short is not None:
            table.short = short
        averager.update()
        assert averager._storage.plans[0].update is table
        results.append(averager)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_sees_every_element(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    for offset, size in itertools.product((0, dtype.itemsize), (1, 37, 1030, 2100)):
        source = at_offset(size, dtype, offset)
        averager = Averager([source], {"a": SWA()}, backend=backend, on_nonfinite="skip")
        fill([source])
        averager.update()
        kept = averager.averages["a"]["0"].clone()
        for place in {0, size // 2, size - 1}:
            fill([source])
            source[place] = float("inf")
            averager.update()
            assert torch.equal(averager.averages["a"]["0"], kept)
        assert averager.n_averaged["a"] == 1


def test_raw_operators_check_short_segments() -> None:
    update, swap = raw_arguments(Averager([torch.randn(5).cuda()], {"a": SWA()}, backend="cuda"))
    # The swap's second one holds its marks.
    for short in (-1, 2):
        with pytest.raises(RuntimeError, match="expected 0 to 1 short segments"):
            torch.ops.swa_fast.update_.cuda(*update, short)
        with pytest.raises(RuntimeError, match="expected 0 to 2 short segments"):
            torch.ops.swa_fast.swap_.cuda(*swap, short if short < 0 else short + 1)
