"""The averaging operator: every backend against fp64 and against torch's own lerp."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DTYPES, assert_as_accurate, extended, need, unaligned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from swa_fast import _backends, _ops, reference

# Around the vector widths, the CPU's and Triton's blocks, and the CUDA kernel's chunk (4096 fp32).
SIZES = (0, 1, 3, 7, 8, 9, 129, 4095, 4096, 4097, 9001)
RULES = (None, 0.999, 0.9, 0.3, 0.0, 1.0)
PAIRS = list(itertools.product(DTYPES, DTYPES))


def interpreter_rounds_wrongly(backend: str, device: str, dtype: torch.dtype) -> bool:
    # Triton's interpreter truncates to bfloat16 (compiled kernels round to nearest).
    return backend == "triton" and device == "cpu" and dtype == torch.bfloat16


def make(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def torch_lerp(average: Tensor, source: Tensor, n: int, decay: float | None) -> Tensor:
    """torch's own result, in the dtype the average has."""
    if n == 0:
        return source.to(average.dtype)
    weight = 1 / (n + 1) if decay is None else 1 - decay
    return torch.lerp(average, source.to(average.dtype), weight)


def exact(average: Tensor, source: Tensor, n: int, decay: float | None) -> np.ndarray:
    a, b = extended(average), extended(source)
    if n == 0:
        return b
    weight = np.longdouble(1) / (n + 1) if decay is None else 1 - np.longdouble(decay)
    return a + weight * (b - a)


def check(
    updated: list[Tensor],
    averages: list[Tensor],
    sources: list[Tensor],
    n: int,
    decay: float | None,
) -> None:
    arguments = [(a, s, n, decay) for a, s in zip(averages, sources, strict=True)]
    assert_as_accurate(
        updated,
        [torch_lerp(*x) for x in arguments],
        [exact(*x) for x in arguments],
        f"n={n} decay={decay}",
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("average_dtype", "source_dtype"), PAIRS, ids=str)
def test_every_dtype_pair(
    backend: str, device: str, average_dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    need(backend, device)
    if interpreter_rounds_wrongly(backend, device, average_dtype):
        pytest.skip("Triton's interpreter truncates to bfloat16")
    slow = device == "cuda" or backend == "triton"
    for n, decay in (
        ((0, None), (1, None), (6, None), (6, 0.9))
        if slow
        else itertools.product((0, 1, 2, 6, 999), RULES)
    ):
        averages = make(SIZES, average_dtype, 1)
        sources = make(SIZES, source_dtype, 2)
        updated = [a.to(device, copy=True) for a in averages]
        counter = torch.tensor(n, device=device)
        _ops.average_(updated, [s.to(device) for s in sources], counter, decay, backend=backend)
        assert counter.item() == n
        check(updated, averages, sources, n, decay)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_unaligned_bases(backend: str, device: str) -> None:
    need(backend, device)
    for dtype, which in itertools.product((torch.float32, torch.float16), ((0, 1), (1, 0), (1, 1))):
        averages, sources = make(SIZES, dtype, 1), make(SIZES, dtype, 2)
        updated = [a.to(device, copy=True) for a in averages]
        moved = [s.to(device) for s in sources]
        if which[0]:
            updated = [unaligned(a) for a in updated]
        if which[1]:
            moved = [unaligned(s) for s in moved]
        _ops.average_(updated, moved, torch.tensor(4, device=device), backend=backend)
        check(updated, averages, sources, 4, None)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_neighbouring_memory_is_untouched(backend: str, device: str) -> None:
    need(backend, device)
    for size in (1, 5, 129, 4097):
        memory = torch.zeros(size + 64, device=device)
        average = memory[32 : 32 + size]
        _ops.average_(
            [average], [torch.ones(size, device=device)], torch.tensor(1), backend=backend
        )
        assert torch.equal(average, torch.full_like(average, 0.5))
        assert memory.count_nonzero() == size


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_strides(backend: str, device: str) -> None:
    """Dense layouts go through the kernels, everything else through the reference."""
    need(backend, device)
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    layouts = {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "every second": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    }
    for (_, average_layout), (_, source_layout) in itertools.product(
        layouts.items(), layouts.items()
    ):
        average = average_layout(base.to(device, copy=True))
        source = source_layout(base.to(device) + 1)
        strides = average.stride()
        _ops.average_([average], [source], torch.tensor(3), backend=backend)
        assert average.stride() == strides
        assert torch.equal(average.cpu(), base + 0.25)


def test_dense_layouts_are_recognised() -> None:
    contiguous = torch.empty(4, 3, 5, 6)
    last = contiguous.contiguous(memory_format=torch.channels_last)
    pointwise = torch.empty(4, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    assert _ops.same_dense_layout(contiguous, contiguous.clone())
    assert _ops.same_dense_layout(last, last.clone())
    assert _ops.same_dense_layout(pointwise, torch.empty(4, 3, 1, 1))
    assert _ops.same_dense_layout(torch.empty(()), torch.empty(()))
    assert not _ops.same_dense_layout(contiguous, last)
    assert not _ops.same_dense_layout(contiguous[:, :2], contiguous[:, :2])
    assert not _ops.same_dense_layout(torch.empty(3).expand(4, 3), torch.empty(3).expand(4, 3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nonfinite_values(backend: str, device: str) -> None:
    """The first update is a copy whatever the average held; later ones follow torch.lerp."""
    need(backend, device)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 5)
    source = torch.arange(20.0)
    average = special.to(device, copy=True)
    _ops.average_([average], [source.to(device)], torch.tensor(0, device=device), backend=backend)
    assert torch.equal(average.cpu(), source)
    average = source.to(device, copy=True)
    _ops.average_([average], [special.to(device)], torch.tensor(1, device=device), backend=backend)
    torch.testing.assert_close(average.cpu(), torch.lerp(source, special, 0.5), equal_nan=True)
    for dtype in (torch.bfloat16, torch.float16):
        average = torch.zeros(20, dtype=dtype, device=device)
        _ops.average_([average], [special.to(device)], torch.tensor(0), backend=backend)
        assert torch.equal(average.isnan().cpu(), special.isnan())


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_many_tensors_and_deterministic(backend: str, device: str) -> None:
    """More tensors than one table of the CUDA kernel holds, the same bits every time."""
    need(backend, device)
    count = 1500 if backend in ("cuda", "cpu") else 40
    sizes = tuple(1 + i % 11 for i in range(count))
    results = []
    for _ in range(2):
        averages = [t.to(device) for t in make(sizes, torch.float32, 1)]
        sources = [t.to(device) for t in make(sizes, torch.float32, 2)]
        _ops.average_(averages, sources, torch.tensor(2, device=device), backend=backend)
        results.append(torch.cat([a.cpu() for a in averages]))
    assert torch.equal(*results)
    a, s = torch.cat(make(sizes, torch.float32, 1)), torch.cat(make(sizes, torch.float32, 2))
    check([results[0]], [a], [s], 2, None)


def test_cpu_result_does_not_depend_on_the_number_of_threads() -> None:
    need("cpu", "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            averages, sources = (make((200_003, 5, 70_001), torch.float16, i) for i in (1, 2))
            _ops.average_(averages, sources, torch.tensor(2), backend="cpu")
            results.append(torch.cat(averages))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_more_than_2_31_elements() -> None:
    need("cpu", "cpu")
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    count = 2**31 + 9
    # numpy leaves zeroed pages to the system until they are touched; torch.zeros writes them.
    average, source = (torch.from_numpy(np.zeros(count, dtype=np.float16)) for _ in range(2))
    where = [0, 2**31 - 1, 2**31, count - 1]
    source[where] = 1.0
    _ops.average_([average], [source], torch.tensor(1), backend="cpu")
    assert average[where].tolist() == [0.5] * 4
    assert average[-64:].count_nonzero() == 3


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5),
    n=st.integers(0, 1000),
    decay=st.none() | st.floats(0.0, 1.0),
    average_dtype=st.sampled_from(DTYPES),
    source_dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shapes(
    shapes: list[list[int]],
    n: int,
    decay: float | None,
    average_dtype: torch.dtype,
    source_dtype: torch.dtype,
) -> None:
    need("cpu", "cpu")
    averages = [torch.randn(s).to(average_dtype) for s in shapes]
    sources = [torch.randn(s).to(source_dtype) for s in shapes]
    for backend in ("reference", "cpu"):
        updated = [a.clone() for a in averages]
        _ops.average_(updated, sources, torch.tensor(n), decay, backend=backend)
        check(updated, averages, sources, n, decay)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend: str, device: str) -> None:
    need(backend, device)
    overload = getattr(torch.ops.swa_fast.average_, backend)
    averages = [torch.randn(5, device=device), torch.randn(2, 3, device=device).half()]
    sources = [torch.randn(5, device=device), torch.randn(2, 3, device=device)]
    for decay in (None, 0.9):
        for counter in (torch.tensor(2), torch.tensor(2, device=device)):
            torch.library.opcheck(overload, (averages, sources, counter, decay))
    torch.library.opcheck(overload, ([], [], torch.tensor(2, device=device), None))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_torch_compile_holds_the_update(backend: str) -> None:
    need(backend, "cpu")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(average: Tensor, source: Tensor, n: Tensor) -> Tensor:
        _ops.average_([average], [source], n, backend=backend)
        return average * 2

    average, source = torch.zeros(9), torch.ones(9)
    assert torch.equal(step(average, source, torch.tensor(3)), torch.full((9,), 0.5))
    assert torch.equal(average, torch.full((9,), 0.25))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_autograd_notices_the_write(backend: str, device: str) -> None:
    need(backend, device)
    average = torch.ones(3, device=device)
    x = torch.ones(3, device=device, requires_grad=True)
    loss = (average * x).sum()
    version = average._version
    _ops.average_([average], [torch.zeros(3, device=device)], torch.tensor(1), backend=backend)
    assert average._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_graph_reads_the_counter_at_replay(backend: str) -> None:
    need(backend, "cuda")
    average, source = torch.zeros(4099, device="cuda"), torch.zeros(4099, device="cuda")
    n = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: compiles, fills Triton's tables
        _ops.average_([average], [source], n, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _ops.average_([average], [source], n, backend=backend)
        n += 1
    for value in (3.0, 5.0, 10.0):
        source.fill_(value)
        graph.replay()
    torch.testing.assert_close(average.cpu(), torch.full((4099,), 6.0))
    assert n.item() == 3


@pytest.mark.gpu
def test_triton_compiles_once_for_changing_weights() -> None:
    need("triton", "cuda")
    from swa_fast.kernels import average as kernel

    a, s = torch.zeros(33, device="cuda"), torch.ones(33, device="cuda")
    n = torch.zeros((), dtype=torch.int64, device="cuda")
    _ops.average_([a], [s], n, 0.9, backend="triton")

    def compiled() -> int:
        return sum(len(cache[0]) for cache in kernel._average_kernel.device_caches.values())

    before = compiled()
    for step in range(20):
        n += 1
        _ops.average_([a], [s], n, 1 - 1 / (step + 2), backend="triton")
    assert compiled() == before


def test_bad_arguments_change_nothing() -> None:
    good, source = torch.zeros(3), torch.ones(3)
    n = torch.tensor(1)
    cases = [
        (ValueError, "equal length", [good], [source, source], n, None),
        (ValueError, r"pair 1: the average has shape \(2,\), the source \(3,\)",
         [good, torch.zeros(2)], [source, source], n, None),
        (ValueError, "pair 1: the average is on cpu, the source on meta",
         [good, torch.zeros(3)], [source, torch.ones(3, device="meta")], n, None),
        (TypeError, "pair 1: the average has dtype int64, expected one of float32, float64",
         [good, torch.zeros(3, dtype=torch.int64)], [source, source], n, None),
        (TypeError, "pair 1: the source has dtype float8_e4m3fn",
         [good, torch.zeros(3)], [source, source.to(torch.float8_e4m3fn)], n, None),
        (TypeError, "pair 0: the source has layout torch.sparse_coo, expected torch.strided",
         [good], [source.to_sparse()], n, None),
        (TypeError, "n_averaged: expected one int64, found", [good], [source], n.float(), None),
        (ValueError, r"decay: expected a number in \[0, 1\], found 1.5", [good], [source], n, 1.5),
    ]  # fmt: skip
    for error, message, averages, sources, counter, decay in cases:
        with pytest.raises(error, match=message):
            _ops.average_(averages, sources, counter, decay)
        assert good.count_nonzero() == 0


def test_raw_operator_has_a_backstop() -> None:
    need("cpu", "cpu")
    op = torch.ops.swa_fast.average_.cpu
    with pytest.raises(RuntimeError, match="1 averages but 0 sources"):
        op([torch.zeros(2)], [], torch.tensor(0), None)
    with pytest.raises(RuntimeError, match="pair 0 has 2 and 3 elements"):
        op([torch.zeros(2)], [torch.zeros(3)], torch.tensor(0), None)
    with pytest.raises(RuntimeError, match="expected float32, float64, bfloat16 or float16"):
        op([torch.zeros(2)], [torch.zeros(2, dtype=torch.int32)], torch.tensor(0), None)
    with pytest.raises(RuntimeError, match="n_averaged must hold one int64"):
        op([torch.zeros(2)], [torch.zeros(2)], torch.tensor(0.0), None)


def test_reference_is_exact_in_fp64() -> None:
    average = torch.tensor([1.0, 2.0], dtype=torch.float64)
    reference.average_([average], [torch.tensor([4.0, 8.0]).double()], torch.tensor(2), None)
    assert average.tolist() == [2.0, 4.0]


def test_requested_backend_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    average = torch.zeros(2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(_backends.BackendError, match="backend=cuda: it serves CUDA tensors"):
        _ops.average_([average], [average + 1], torch.tensor(1), backend="cuda")
    monkeypatch.setenv("SWA_FAST_BACKEND", "triton")
    with pytest.raises(_backends.BackendError, match="SWA_FAST_BACKEND=triton"):
        _ops.average_([average], [average + 1], torch.tensor(1))
    monkeypatch.setenv("SWA_FAST_BACKEND", "quick")
    with pytest.raises(ValueError, match="expected one of cuda, triton, cpu, reference"):
        _ops.average_([average], [average + 1], torch.tensor(1))
    assert average.count_nonzero() == 0
