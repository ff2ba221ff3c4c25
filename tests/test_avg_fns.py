"""The averaging functions for lists of tensors: every backend against fp64 and torch's own lerp."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DTYPES, assert_as_accurate, extended, need, unaligned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast import _backends, _ops, avg_fns
from swa_fast import _layout as layout

# Around the vector widths, what a warp holds, Triton's segments and CUDA's (4096 in fp32).
SIZES = (0, 1, 3, 7, 8, 9, 129, 4095, 4096, 4097, 9001)
DECAYS = (None, 0.999, 0.9, 0.3, 0.0, 1.0)
PAIRS = list(itertools.product(DTYPES, DTYPES))


@pytest.fixture(params=[pytest.param(b.values, id=b.id, marks=b.marks) for b in BACKENDS])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a backend is tested, which serves all calls of the test."""
    backend, where = request.param
    need(backend, where)
    monkeypatch.setenv("SWA_FAST_BACKEND", backend)
    return str(where)


@pytest.fixture
def cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu", "cpu")
    monkeypatch.setenv("SWA_FAST_BACKEND", "cpu")


def average(
    averages: list[Tensor], sources: list[Tensor], n: Tensor | int, decay: float | None = None
) -> None:
    function = (
        swa_fast.get_swa_multi_avg_fn() if decay is None else swa_fast.get_ema_multi_avg_fn(decay)
    )
    function(averages, sources, n)


def make(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def check(
    updated: list[Tensor],
    averages: list[Tensor],
    sources: list[Tensor],
    n: int,
    decay: float | None,
) -> None:
    """Against torch's own result in the dtype of the average, and the exact one."""
    weight = np.longdouble(1) / (n + 1) if decay is None else 1 - np.longdouble(decay)
    by_torch, exact = [], []
    for a, s in zip(averages, sources, strict=True):
        by_torch.append(torch.lerp(a, s.to(a.dtype), float(weight)))
        exact.append(extended(a) + weight * (extended(s) - extended(a)))
    assert_as_accurate(updated, by_torch, exact, f"n={n} decay={decay}")


@pytest.mark.parametrize(("average_dtype", "source_dtype"), PAIRS, ids=str)
def test_every_dtype_pair(
    device: str, average_dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    interpreted = os.environ["SWA_FAST_BACKEND"] == "triton" and device == "cpu"
    if interpreted and average_dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    slow = device == "cuda" or interpreted
    for n, decay in (
        ((0, None), (6, None), (6, 0.9)) if slow else itertools.product((0, 1, 2, 6, 999), DECAYS)
    ):
        averages = make(SIZES, average_dtype, 1)
        sources = make(SIZES, source_dtype, 2)
        updated = [a.to(device, copy=True) for a in averages]
        counter = torch.tensor(n, device=device)
        average(updated, [s.to(device) for s in sources], counter, decay)
        assert counter.item() == n
        check(updated, averages, sources, n, decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", [(0, 1), (1, 0), (1, 1)])
def test_unaligned_bases(device: str, dtype: torch.dtype, which: tuple[int, int]) -> None:
    averages, sources = make(SIZES, dtype, 1), make(SIZES, dtype, 2)
    updated = [a.to(device, copy=True) for a in averages]
    moved = [s.to(device) for s in sources]
    if which[0]:
        updated = [unaligned(a) for a in updated]
    if which[1]:
        moved = [unaligned(s) for s in moved]
    average(updated, moved, torch.tensor(4, device=device))
    check(updated, averages, sources, 4, None)


def test_neighbouring_memory_is_untouched(device: str) -> None:
    for size in (1, 5, 129, 4097):
        memory = torch.zeros(size + 64, device=device)
        target = memory[32 : 32 + size]
        average([target], [torch.ones(size, device=device)], torch.tensor(1, device=device))
        assert torch.equal(target, torch.full_like(target, 0.5))
        assert memory.count_nonzero() == size


def test_strides(device: str) -> None:
    """Gapless memory of one order is read where it is, everything else through a copy."""
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    layouts = (
        lambda t: t.contiguous(),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    )
    for average_layout, source_layout in itertools.product(layouts, layouts):
        target = average_layout(base.to(device, copy=True))
        source = source_layout(base.to(device) + 1)
        strides = target.stride()
        average([target], [source], torch.tensor(3, device=device))
        assert target.stride() == strides
        assert torch.equal(target.cpu(), base + 0.25)


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
def test_nonfinite_values(device: str) -> None:
    """Equal weights copy at n = 0 whatever the average held; later updates follow torch.lerp."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 5)
    source = torch.arange(20.0)
    target = special.to(device, copy=True)
    average([target], [source.to(device)], torch.tensor(0, device=device))
    assert torch.equal(target.cpu(), source)
    target = source.to(device, copy=True)
    average([target], [special.to(device)], torch.tensor(1, device=device))
    torch.testing.assert_close(target.cpu(), torch.lerp(source, special, 0.5), equal_nan=True)
    for dtype in (torch.bfloat16, torch.float16):
        target = torch.zeros(20, dtype=dtype, device=device)
        average([target], [special.to(device)], torch.tensor(0, device=device))
        assert torch.equal(target.isnan().cpu(), special.isnan())


def test_many_tensors_and_deterministic(device: str) -> None:
    count = 1500 if os.environ["SWA_FAST_BACKEND"] in ("cuda", "cpu") else 40
    sizes = tuple(1 + i % 11 for i in range(count))
    results = []
    for _ in range(2):
        averages = [t.to(device) for t in make(sizes, torch.float32, 1)]
        sources = [t.to(device) for t in make(sizes, torch.float32, 2)]
        average(averages, sources, torch.tensor(2, device=device))
        results.append(torch.cat([a.cpu() for a in averages]))
    assert torch.equal(*results)
    a, s = torch.cat(make(sizes, torch.float32, 1)), torch.cat(make(sizes, torch.float32, 2))
    check([results[0]], [a], [s], 2, None)


def test_the_result_does_not_depend_on_the_number_of_threads(cpu_backend: None) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            averages, sources = (make((200_003, 5, 70_001), torch.float16, i) for i in (1, 2))
            average(averages, sources, torch.tensor(2))
            results.append(torch.cat(averages))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_more_than_2_31_elements(cpu_backend: None) -> None:
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    count = 2**31 + 9
    # numpy leaves zeroed pages to the system until they are touched; torch.zeros writes them.
    target, source = (torch.from_numpy(np.zeros(count, dtype=np.float16)) for _ in range(2))
    where = [0, layout.CPU_SEGMENT, 2**31 - 1, 2**31, count - 1]
    source[where] = 1.0
    average([target], [source], torch.tensor(1))
    assert target[where].tolist() == [0.5] * 5
    assert target[-64:].count_nonzero() == 3


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
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SWA_FAST_BACKEND", backend)
            updated = [a.clone() for a in averages]
            average(updated, sources, n, decay)
        check(updated, averages, sources, n, decay)


def test_torch_compile_holds_the_update(device: str) -> None:
    if device == "cuda":
        pytest.skip("the same on the CPU")

    function = swa_fast.get_swa_multi_avg_fn()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(target: Tensor, source: Tensor, n: Tensor) -> Tensor:
        function([target], [source], n)
        return target * 2

    target, source = torch.zeros(9), torch.ones(9)
    assert torch.equal(step(target, source, torch.tensor(3)), torch.full((9,), 0.5))
    assert torch.equal(target, torch.full((9,), 0.25))


def test_opcheck() -> None:
    targets = [torch.randn(5), torch.randn(2, 3).half()]
    sources = [torch.randn(5), torch.randn(2, 3)]
    for decay in (None, 0.9):
        torch.library.opcheck(
            torch.ops.swa_fast.multi_average_, (targets, sources, torch.tensor(2), decay)
        )


def test_autograd_notices_the_write(device: str) -> None:
    target = torch.ones(3, device=device)
    x = torch.ones(3, device=device, requires_grad=True)
    loss = (target * x).sum()
    average([target], [torch.zeros(3, device=device)], torch.tensor(1, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_graph_reads_the_counter_at_replay(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWA_FAST_BACKEND", backend)
    target, source = torch.zeros(4099, device="cuda"), torch.zeros(4099, device="cuda")
    n = torch.zeros((), dtype=torch.int64, device="cuda")
    average([target], [source], n)  # compiles, and makes the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average([target], [source], n)
        n += 1
    avg_fns._bound.clear()
    for value in (3.0, 5.0, 10.0):
        source.fill_(value)
        graph.replay()
    torch.testing.assert_close(target.cpu(), torch.full((4099,), 6.0))
    assert n.item() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_one_launch_and_no_wait(
    simulator: Any, backend: str, decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWA_FAST_BACKEND", backend)
    averages = [t.cuda() for t in make((5, 4097, 33) * 20, torch.float32, 1)]
    sources = [t.cuda() for t in make((5, 4097, 33) * 20, torch.float32, 2)]
    n = torch.tensor(3, device="cuda")
    average(averages, sources, n, decay)
    torch.cuda.synchronize()
    simulator.reset()
    # Other tensors over the same memory, as torch's AveragedModel hands them over at every update.
    average([t.detach() for t in averages], [t.detach() for t in sources], n, decay)
    total = {name: count for name, count in simulator.counters()["total"].items() if count}
    assert total == {"kernel_launches": 1}


def test_tables_follow_what_lies_where(cpu_backend: None) -> None:
    """A table serves as long as every tensor is what it was, and no longer."""
    function = swa_fast.get_swa_multi_avg_fn()
    targets, sources = [torch.zeros(3), torch.zeros(2, 3)], [torch.ones(3), torch.ones(2, 3)]

    def moved() -> None:
        sources[0] = sources[0].clone()

    def retyped() -> None:
        sources[0] = sources[0].double()

    def reread() -> None:
        sources[1].data = sources[1].view(torch.int32).clone().view(torch.float32)

    def transposed() -> None:
        targets[1], sources[1] = targets[1].t(), sources[1].t()

    for change in (moved, retyped, reread, transposed):
        function(targets, sources, 0)
        (*_, before) = avg_fns._bound.values()
        function([t.detach() for t in targets], [s.detach() for s in sources], 0)
        assert list(avg_fns._bound.values())[-1] is before
        change()
        function(targets, sources, 0)
        assert list(avg_fns._bound.values())[-1] is not before
        for target, source in zip(targets, sources, strict=True):
            assert torch.equal(target, source.to(target.dtype))


def test_tables_keep_no_tensor_alive_and_are_few(cpu_backend: None) -> None:
    targets, sources = [torch.zeros(3)], [torch.ones(3)]
    average(targets, sources, 1)
    alive = [weakref.ref(t.untyped_storage()) for t in targets + sources]
    del targets, sources
    gc.collect()
    assert all(one() is None for one in alive)
    kept = [torch.zeros(3) for _ in range(avg_fns._MOST_BOUND + 9)]
    for target in kept:
        average([target], [torch.ones(3)], 1)
    assert len(avg_fns._bound) == avg_fns._MOST_BOUND


def test_bad_arguments_change_nothing() -> None:
    good, source = torch.zeros(3), torch.ones(3)
    n = torch.tensor(1)
    cases = [
        (ValueError, "equal length, found 1 and 2", [good], [source, source], n),
        (ValueError, r"pair 1: the average has shape \(2,\), the source has shape \(3,\)",
         [good, torch.zeros(2)], [source, source], n),
        (ValueError, "pair 1: the average has device cpu, the source has device meta",
         [good, torch.zeros(3)], [source, torch.ones(3, device="meta")], n),
        (TypeError, "pair 1: the source has dtype float8_e4m3fn",
         [good, torch.zeros(3)], [source, source.to(torch.float8_e4m3fn)], n),
        (TypeError, "pair 1: torch.complex64 in the average, torch.float32 in the model",
         [good, torch.zeros(3, dtype=torch.complex64)], [source, source], n),
        (TypeError, "pair 0: the source has layout torch.sparse_coo, expected torch.strided",
         [good], [source.to_sparse()], n),
        (TypeError, "pair 1: the average has layout torch.sparse_coo",
         [good, source.to_sparse()], [source, source], n),
        (TypeError, "num_averaged: expected one int64, found", [good], [source], n.float()),
    ]  # fmt: skip
    for error, message, averages, sources, counter in cases:
        with pytest.raises(error, match=message):
            average(averages, sources, counter)
        assert good.count_nonzero() == 0


def test_requested_backend_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.zeros(2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, error in (
        ("triton", _backends.BackendError),
        ("cuda", _backends.BackendError),
        ("quick", ValueError),
    ):
        monkeypatch.setenv("SWA_FAST_BACKEND", name)
        with pytest.raises(error, match=name):
            average([target], [target + 1], 1)
    assert target.count_nonzero() == 0


def test_functions_as_torchs() -> None:
    a, b = torch.randn(7), torch.randn(7)
    for ours, theirs in (
        (swa_fast.get_swa_avg_fn(), swa_utils.get_swa_avg_fn()),
        (swa_fast.get_ema_avg_fn(0.7), swa_utils.get_ema_avg_fn(0.7)),
    ):
        assert torch.equal(ours(a, b, 4), theirs(a, b, 4))
        assert torch.equal(ours(a, b, torch.tensor(4)), theirs(a, b, torch.tensor(4)))
    for dtype in (*DTYPES, torch.complex64):
        for ours, theirs in (
            (swa_fast.get_swa_multi_avg_fn(), swa_utils.get_swa_multi_avg_fn()),
            (swa_fast.get_ema_multi_avg_fn(0.7), swa_utils.get_ema_multi_avg_fn(0.7)),
        ):
            for n in (0, 4, torch.tensor(4)):
                left, right = [a.to(dtype)], [a.to(dtype)]
                left[0], right[0] = left[0].clone(), right[0].clone()
                ours(left, [b.to(dtype)], n)
                theirs(right, [b.to(dtype)], n)
                torch.testing.assert_close(left, right)
    counters = [torch.tensor([3])]
    swa_fast.get_ema_multi_avg_fn(0.7)(counters, [torch.tensor([10])], 1)
    assert counters[0].item() == 10
    for make_function in (swa_fast.get_ema_avg_fn, swa_fast.get_ema_multi_avg_fn):
        with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], found -0.1"):
            make_function(-0.1)


def test_our_functions_in_torchs_class(device: str) -> None:
    """As Lightning and others use them."""
    model = nn.Sequential(nn.Linear(11, 129), nn.BatchNorm1d(129), nn.Linear(129, 3)).to(device)
    theirs = swa_utils.AveragedModel(model, multi_avg_fn=swa_fast.get_swa_multi_avg_fn())
    ours = swa_fast.AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        theirs.update_parameters(model)
        ours.update_parameters(model)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right)
