"""The BatchNorm operators: every backend against extended precision and torch's own layer."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DTYPES, assert_as_accurate, extended, need, unaligned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import batch_norm

from swa_fast import _backends, _ops

EPS = 1e-5
ESTIMATORS = ("torch", "weighted", "pooled")
# Sizes around the vector widths and the tiles; the first two hold several blocks of each kernel.
SHAPES = (
    (40, 3, 33, 5),
    (9, 130, 8, 8),
    (5, 7, 1, 1),
    (4, 64, 3, 5),
    (3, 1, 33, 1),
    (2, 7, 8, 8),
    (6, 96, 2, 6),  # packs of 8 bytes for 16-bit types; half a line of channels
    (3, 14, 3, 2),  # packs of two elements
    (1, 3, 2, 2),
)


def interpreter_rounds_wrongly(backend: str, device: str, dtype: torch.dtype) -> bool:
    # Triton's interpreter truncates to bfloat16 (compiled kernels round to nearest).
    return backend == "triton" and device == "cpu" and dtype == torch.bfloat16


def others(x: Tensor) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != 1)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1, mean: float = 1.0, std: float = 2.0
) -> Tensor:
    """Every channel with its own mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view([1, -1] + [1] * (len(shape) - 2))
    return (mean * (1 + channel % 3) + std * (1 + channel % 5) * x).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    """Channels innermost, in any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {"contiguous": lambda x: x.contiguous(), "channels_last": channels_last}


def wide_batch(channels: int, device: str) -> tuple[Tensor, Tensor]:
    """A flat buffer and the columns of a layer in its middle."""
    flat = torch.full((4, channels + 7), float("nan"), dtype=torch.float64, device=device)
    return flat, flat[:, 3 : 3 + channels]


def check_statistics(batch: Tensor, x: Tensor, what: str) -> None:
    """Against a wider type than the input's. Relative to the variance and to the spread, a channel
    may be off by what a sum of 64 values around a pivot costs in the arithmetic type and a sum of
    all in fp64: that bound does not grow with mean / std (csrc/batch_norm.h)."""
    eps = torch.finfo(math_dtype(x.dtype)).eps
    # The longest type is ten times slower, and eps below hides what fp64 is off by.
    wide = extended(x) if x.dtype == torch.float64 else x.detach().cpu().double().numpy()
    m = x.numel() // x.shape[1]
    long_sum = m * np.finfo(np.float64).eps / 2
    mean = wide.mean(axis=others(x))
    deviation = wide - mean.reshape([1, -1] + [1] * (x.dim() - 2))
    m2 = np.square(deviation).sum(axis=others(x))
    found = extended(batch)
    assert (found[0] == m).all(), what
    assert (found[1] == x.shape[0]).all(), what
    # fp64 holds the mean itself.
    rounding = np.finfo(np.float64).eps * np.abs(mean)
    spread = np.sqrt(m2 / m)
    assert (np.abs(found[2] - mean) <= (16 * eps + long_sum) * spread + rounding).all(), what
    # The last term: deviations in fp64 cannot be finer than the rounding of the mean.
    assert (np.abs(found[3] - m2) <= (32 * eps + long_sum) * m2 + m * rounding**2).all(), (
        f"{what}: M2 off by {(np.abs(found[3] - m2) / np.maximum(m2, 1e-300)).max():.3g}"
    )


def exact_output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool, eps: float = EPS
) -> np.ndarray:
    wide = extended(x)
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = wide.mean(axis=others(x), dtype=np.longdouble).reshape(shape)
    deviation = wide - mean
    variance = np.square(deviation).mean(axis=others(x), dtype=np.longdouble).reshape(shape)
    y = deviation / np.sqrt(variance + np.longdouble(eps))
    if weight is not None:
        y = y * extended(weight).reshape(shape)
    if bias is not None:
        y = y + extended(bias).reshape(shape)
    return np.maximum(y, 0) if relu else y


def torch_output(x: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
    """torch's own result in x's dtype: with one value a channel, and for vectors of another dtype,
    as near to its layer as torch can."""
    x = x.cpu().contiguous()
    if x.numel() == x.shape[1]:
        x = torch.cat([x, x])  # torch refuses a variance over one value
    mixed = x.dtype in (torch.bfloat16, torch.float16)
    parameters = [
        None if p is None else p.cpu().to(torch.float32 if mixed else x.dtype)
        for p in (weight, bias)
    ]
    y = batch_norm(x, None, None, *parameters, training=True, eps=EPS)
    return (y.relu() if relu else y)[: len(x)]


@functools.cache
def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    weight, bias = torch.randn((2, channels), generator=generator, dtype=torch.float64).to(dtype)
    return weight, bias


def run(
    x: Tensor,
    backend: str,
    device: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **options: bool,
) -> tuple[Tensor | None, Tensor]:
    flat, batch = wide_batch(x.shape[1], device)
    y = _ops.batch_norm_collect(
        x,
        None if weight is None else weight.to(device),
        None if bias is None else bias.to(device),
        EPS,
        batch,
        backend=backend,
        **options,
    )
    assert flat.isnan().sum().item() >= 4 * 7  # the neighbours' columns
    return y, batch.cpu()


def check(
    y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool, what: str
) -> None:
    by_torch = torch_output(x, weight, bias, relu)[: x.shape[0]]
    exact = exact_output(x, weight, bias, relu)
    # In the arithmetic type, difference, scale and result are rounded, three times eps / 2, and M2
    # is a sum, half of whose error shows: another two. For fp64 input, for which there is no wider
    # type, mean, root, quotient and product are rounded as well. On a handful of values torch's
    # own error may be zero by luck, so these have to be allowed for; a narrow output hides them.
    roundings = {torch.float32: 5, torch.float64: 16}.get(x.dtype)
    if roundings is None:
        return assert_as_accurate([y.cpu()], [by_torch], [exact], what)
    error, torch_error = (np.abs(extended(t) - exact).max() for t in (y, by_torch))
    allowed = 2 * torch_error + roundings * torch.finfo(x.dtype).eps / 2 * np.abs(exact).max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def enough(shape: tuple[int, ...], layout: str, backend: str, device: str) -> tuple[int, ...]:
    """With few channels where each has programs of its own, which Triton's interpreter runs one
    after the other."""
    if backend == "triton" and device == "cpu" and layout == "contiguous":
        return shape[0], min(shape[1], 9), *shape[2:]
    return shape


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_and_dtype(backend: str, device: str, layout: str, dtype: torch.dtype) -> None:
    need(backend, device)
    for i, every in enumerate(SHAPES):
        shape = enough(every, layout, backend, device)
        x = make(shape, dtype)
        weight, bias = affine(shape[1], dtype)
        relu = i % 2 == 1
        y, batch = run(LAYOUTS[layout](x.to(device)), backend, device, weight, bias, relu=relu)
        assert y is not None
        assert y.shape == x.shape
        assert y.stride() == LAYOUTS[layout](x).stride()
        check_statistics(batch, x, f"{shape} {layout} {dtype}")
        if not interpreter_rounds_wrongly(backend, device, dtype):
            check(y, x, weight, bias, relu, f"{shape} {layout} {dtype}")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(17, 5), (6, 5, 33), (3, 5, 2, 3, 4)], ids=str)
def test_number_of_dimensions(
    backend: str, device: str, layout: str, shape: tuple[int, ...]
) -> None:
    need(backend, device)
    x = make(shape, torch.float32)
    moved = LAYOUTS[layout](x.to(device))
    y, batch = run(moved, backend, device)
    assert y is not None
    assert y.stride() == moved.stride()
    check_statistics(batch, x, str(shape))
    check(y, x, None, None, False, str(shape))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_weights_of_another_dtype(backend: str, device: str) -> None:
    need(backend, device)
    for dtype, other in (
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float16),
    ):
        x = make((4, 7, 3, 5), dtype)
        weight, bias = affine(7, other)
        for w, b in ((weight, bias), (weight, None), (None, bias)):
            y, _ = run(x.to(device), backend, device, w, b)
            assert y is not None
            check(y, x, w, b, False, f"{dtype} {other}")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unaligned_bases(backend: str, device: str, layout: str) -> None:
    need(backend, device)
    for dtype in (torch.float32, torch.float16, torch.float64):
        for shape in ((9, 8, 8, 8), (2, 64, 3, 5)):
            x = make(enough(shape, layout, backend, device), dtype)
            dense = x if layout == "contiguous" else x.movedim(1, -1).contiguous()
            moved = unaligned(dense.to(device))
            moved = moved if layout == "contiguous" else moved.movedim(-1, 1)
            y, batch = run(moved, backend, device)
            assert y is not None
            check_statistics(batch, x, f"{shape} {dtype}")
            check(y, x, None, None, False, f"{shape} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_that_begins_anywhere(layout: str, dtype: torch.dtype) -> None:
    """Between two addresses of the dtype, as tensors over another library's memory may: what is
    undefined in C++ is for the sanitizers to see (make test-asan)."""
    need("cpu", "cpu")

    def odd(values: Tensor) -> Tensor:
        memory = bytearray(values.numel() * values.element_size() + 1)
        flat = torch.frombuffer(memory, dtype=values.dtype, offset=1)
        return flat.as_strided(values.shape, values.stride()).copy_(values)

    x = LAYOUTS[layout](make((3, 14, 5, 2), dtype))
    weight, bias = affine(14, dtype)
    expected, expected_batch = run(x, "cpu", "cpu", weight, bias)
    assert odd(x).data_ptr() % x.element_size() == 1
    y, batch = run(odd(x), "cpu", "cpu", odd(weight), odd(bias))
    assert torch.equal(y, expected) and torch.equal(batch, expected_batch)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_other_strides_go_through_a_copy(backend: str, device: str) -> None:
    need(backend, device)
    x = make((6, 5, 4, 3), torch.float32)
    for moved in (
        x.to(device).transpose(2, 3).contiguous().transpose(2, 3),
        x.to(device).repeat_interleave(2, dim=1)[:, ::2],
        x.to(device)[:1].expand(6, -1, -1, -1),
    ):
        y, batch = run(moved, backend, device)
        assert y is not None and y.is_contiguous()
        check_statistics(batch, moved.cpu(), str(moved.stride()))
        check(y, moved.cpu(), None, None, False, str(moved.stride()))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_above_spread(backend: str, device: str, layout: str) -> None:
    """At mean / std = 1e4, the variance in fp32 is within 1e-5 and the output as good as the input:
    E[x^2] - E[x]^2 would leave nothing."""
    need(backend, device)
    x = make((33, 3, 17, 5), torch.float32, mean=1e4, std=1.0)
    y, batch = run(LAYOUTS[layout](x.to(device)), backend, device)
    assert y is not None
    check_statistics(batch, x, layout)
    exact = exact_output(x, None, None, False)
    assert np.abs(extended(y) - exact).max() <= 1e-5


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outliers_where_sums_start(backend: str, device: str, layout: str) -> None:
    """Values around which sums are shifted are the first ones: these are far from the rest."""
    need(backend, device)
    x = make((40, 3, 33, 5), torch.float32)
    x[0] += 1e3
    x[1:, :, 0] -= 3e2
    _, batch = run(LAYOUTS[layout](x.to(device)), backend, device, normalise=False)
    check_statistics(batch, x, layout)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_constant_channels_and_single_values(backend: str, device: str) -> None:
    need(backend, device)
    weight, bias = affine(4, torch.float32)
    for shape in ((1, 4), (1, 4, 1, 1), (7, 4, 3, 3)):
        x = torch.full(shape, 3.7)
        y, batch = run(x.to(device), backend, device, weight, bias)
        assert y is not None
        assert batch[2].tolist() == [x[0, 0].max().double().item()] * 4
        assert batch[3].tolist() == [0.0] * 4
        assert torch.equal(y.cpu(), bias.view([1, 4] + [1] * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_statistics_only(backend: str, device: str) -> None:
    need(backend, device)
    for layout in LAYOUTS.values():
        x = layout(make((9, 7, 5, 5), torch.float32).to(device))
        y, batch = run(x, backend, device, normalise=False)
        assert y is None
        _, with_output = run(x, backend, device)
        assert torch.equal(batch, with_output)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nonfinite_values_stay_in_their_channel(backend: str, device: str, layout: str) -> None:
    need(backend, device)
    for value in (float("nan"), float("inf")):
        for where in ((0, 1, 0, 0), (3, 1, 4, 4), (2, 1, 2, 1)):
            x = make((4, 3, 5, 5), torch.float32)
            x[where] = value
            y, batch = run(LAYOUTS[layout](x.to(device)), backend, device, relu=True)
            assert y is not None
            assert not batch[2:, 1].isfinite().any()
            assert y[:, 1].isnan().any()
            assert batch[:, [0, 2]].isfinite().all()
            assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_every_time(backend: str, device: str, layout: str) -> None:
    need(backend, device)
    x = LAYOUTS[layout](make((40, 5, 33, 9), torch.float32).to(device))
    tickets = _ops.batch_norm_tickets(device, 5)
    first = None
    for _ in range(3):
        batch = torch.empty((4, 5), dtype=torch.float64, device=device)
        y = _ops.batch_norm_collect(x, None, None, EPS, batch, tickets=tickets, backend=backend)
        assert y is not None
        assert tickets.count_nonzero() == 0
        if first is None:
            first = y, batch
        assert torch.equal(y, first[0])
        assert torch.equal(batch, first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_result_does_not_depend_on_the_number_of_threads(
    layout: str, dtype: torch.dtype
) -> None:
    need("cpu", "cpu")
    threads = torch.get_num_threads()
    # Three channels of several blocks, and many channels of one.
    for shape in ((130, 3, 40, 40), (8, 260, 9, 9)):
        x = LAYOUTS[layout](make(shape, dtype))
        results = []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                y, batch = run(x, "cpu", "cpu")
                assert y is not None
                results.append((y, batch))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0][0], y) for y, _ in results[1:])
        assert all(torch.equal(results[0][1], b) for _, b in results[1:])
        check_statistics(results[0][1], x, f"{shape} {layout} {dtype}")


def rows_of_all_kinds() -> list[Tensor]:
    """Statistics and output of channels-last input: rows that are put together, longer ones, more
    columns than are summed at a time; groups of rows that are not whole, stores past caches, NaN.
    """
    results = []
    for shape in ((9, 64, 5, 5), (3, 256, 7, 9), (2, 1040, 9, 8), (1, 48, 3, 5), (70, 256, 14, 15)):
        for dtype in DTYPES if shape[0] < 70 else (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(sum(shape))
            x = 3 + torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            x[0, 5, 2, 2] = float("nan")
            y, batch = run(channels_last(x), "cpu", "cpu", relu=True)
            assert y is not None
            assert y[:, 5].isnan().all()
            assert not y[:, 6:].isnan().any()
            results += [y, batch]
    return results


def test_rows_have_the_same_bits_with_every_instruction_set(tmp_path: Path) -> None:
    """In channels-last layout every column is a sum of its own, whatever a register holds."""
    need("cpu", "cpu")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("instruction sets of x86-64 beyond the baseline")
    path = tmp_path / "narrow.pt"
    program = (
        "import pathlib, sys, torch\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_batch_norm_op import rows_of_all_kinds\n"
        "torch.save(rows_of_all_kinds(), pathlib.Path(sys.argv[1]))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(path), str(Path(__file__).parent)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, check=True,
    )  # fmt: skip
    narrow = torch.load(path, weights_only=True)
    for i, (found, expected) in enumerate(zip(rows_of_all_kinds(), narrow, strict=True)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=str(i))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_output_larger_than_the_caches(layout: str) -> None:
    """Stores past the caches, and huge pages."""
    need("cpu", "cpu")
    for dtype, shape in ((torch.float32, (70, 17, 84, 85)), (torch.bfloat16, (140, 17, 84, 85))):
        x = LAYOUTS[layout](make(shape, dtype))
        y, batch = run(x, "cpu", "cpu", relu=True)
        assert y is not None
        mean, m2 = batch[2], batch[3]
        scale = (m2 / batch[0] + EPS).rsqrt().float()
        shape1 = (1, -1, 1, 1)
        expected = ((x.float() - mean.float().view(shape1)) * scale.view(shape1)).relu()
        torch.testing.assert_close(y.float(), expected.to(dtype).float())
        check_statistics(batch, x, layout)


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    relu=st.booleans(),
    affine_dtype=st.none() | st.sampled_from(DTYPES),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shapes(
    shape: list[int],
    dtype: torch.dtype,
    layout: str,
    relu: bool,
    affine_dtype: torch.dtype | None,
) -> None:
    need("cpu", "cpu")
    x = LAYOUTS[layout](make(tuple(shape), dtype))
    weight, bias = (None, None) if affine_dtype is None else affine(shape[1], affine_dtype)
    for backend in ("reference", "cpu"):
        y, batch = run(x, backend, "cpu", weight, bias, relu=relu)
        assert y is not None
        check_statistics(batch, x, backend)
        check(y, x, weight, bias, relu, backend)


# Merging.


def merged(
    batches: list[list[float]], estimator: str, backend: str, device: str, channels: int = 1
) -> Tensor:
    accumulators = torch.zeros((9, channels), dtype=torch.float64, device=device)
    for values in batches:
        x = torch.tensor(values, dtype=torch.float64, device=device).view(-1, 1)
        batch = torch.empty((4, 1), dtype=torch.float64, device=device)
        _ops.batch_norm_collect(x, None, None, EPS, batch, normalise=False, backend=backend)
        wide = batch.expand(4, channels).contiguous()
        _ops.batch_norm_merge_(accumulators, wide, estimator, backend=backend)
        assert wide[0].count_nonzero() == 0
    return accumulators.cpu()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_three_batches_by_hand(backend: str, device: str) -> None:
    need(backend, device)
    batches = [[1.0, 2, 3, 4], [2.0, 4, 6, 8], [10.0, 20]]
    mean_of = {"torch": 7.5, "weighted": 6.0, "pooled": 6.0}
    spread_of = {"torch": 175 / 9, "weighted": 40 / 3, "pooled": 290.0}
    means = np.array([2.5, 5.0, 15.0])
    variances = np.array([5 / 3, 20 / 3, 50.0])
    for estimator in ESTIMATORS:
        found = merged(batches, estimator, backend, device, channels=3)
        expected = [
            10, 10, 3, mean_of[estimator], spread_of[estimator],
            means.mean(), 3 * means.var(), variances.mean(), 3 * variances.var(),
        ]  # fmt: skip
        np.testing.assert_allclose(found.numpy(), np.repeat(expected, 3).reshape(9, 3), rtol=1e-14)
    # The pooled row holds the sum of squares of all values around their mean.
    pooled = merged(batches, "pooled", backend, device)
    assert pooled[4].item() / 10 == pytest.approx(29.0, rel=1e-14)
    assert pooled[4].item() / 9 == pytest.approx(np.var(np.concatenate(batches), ddof=1), rel=1e-14)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_pooling_drifting_batches(backend: str, device: str) -> None:
    """Batches whose means drift by far more than their spread, with a mean of 1e4 spreads: pooled
    statistics are those of all values."""
    need(backend, device)
    generator = torch.Generator().manual_seed(3)
    values = [
        1e4 + 50 * k + torch.randn(5 + 3 * k, generator=generator, dtype=torch.float64)
        for k in range(9)
    ]
    found = merged([v.tolist() for v in values], "pooled", backend, device)
    every = extended(torch.cat(values))
    assert found[0].item() == len(every)
    assert found[3].item() == pytest.approx(float(every.mean()), rel=1e-14)
    assert found[4].item() == pytest.approx(float(np.square(every - every.mean()).sum()), rel=1e-13)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_merge_against_extended_precision(backend: str, device: str, estimator: str) -> None:
    """Many channels, of which every batch uses some; batches of one value among them."""
    need(backend, device)
    channels, batches = 300, 12
    generator = torch.Generator().manual_seed(5)
    count = torch.randint(0, 4, (batches, channels), generator=generator).double()
    count[3, :9] = 1
    samples = (count + 1) // 2
    mean = 10 + torch.randn((batches, channels), generator=generator, dtype=torch.float64)
    m2 = torch.rand((batches, channels), generator=generator, dtype=torch.float64) * (count > 1)

    accumulators = torch.zeros((9, channels), dtype=torch.float64, device=device)
    for rows in zip(count, samples, mean, m2, strict=True):
        batch = torch.stack(rows)
        batch[1:, rows[0] == 0] = float("nan")  # what an unused layer left is not looked at
        batch = batch.to(device)
        _ops.batch_norm_merge_(accumulators, batch, estimator, backend=backend)
        assert batch[0].count_nonzero() == 0

    m, b, mu, q = (extended(t) for t in (count, samples, mean, m2))
    used = m > 0
    s2 = q / np.maximum(m - 1, 1)
    k = used.sum(0)
    weight = {"torch": used / k, "weighted": b / b.sum(0), "pooled": m / m.sum(0)}[estimator]
    average = (weight * mu).sum(0)
    spread = (weight * s2).sum(0)
    if estimator == "pooled":
        spread = (q + m * np.square(mu - average)).sum(0)
    expected = [m.sum(0), b.sum(0), k, average, spread]
    for value in (mu, s2):
        center = (used * value).sum(0) / k
        expected += [center, (used * np.square(value - center)).sum(0)]
    np.testing.assert_allclose(
        extended(accumulators), np.stack(expected), rtol=batches * 2e-15, atol=1e-15
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_merge_of_nothing(backend: str, device: str) -> None:
    need(backend, device)
    empty = torch.zeros((9, 0), dtype=torch.float64, device=device)
    _ops.batch_norm_merge_(empty, empty[:4], "pooled", backend=backend)
    accumulators = torch.rand((9, 5), dtype=torch.float64).to(device)
    kept = accumulators.clone()
    _ops.batch_norm_merge_(accumulators, torch.zeros_like(kept[:4]), "torch", backend=backend)
    assert torch.equal(accumulators, kept)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_reaches_the_accumulators(backend: str, device: str) -> None:
    need(backend, device)
    for estimator in ESTIMATORS:
        found = merged([[1.0, 2.0], [float("nan"), 1.0], [3.0, 4.0]], estimator, backend, device)
        assert found[:3].flatten().tolist() == [6.0, 6.0, 3.0]
        assert found[3:].isnan().all()


# The operators as torch sees them.


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend: str, device: str) -> None:
    need(backend, device)
    overload = getattr(torch.ops.swa_fast.batch_norm_collect, backend)
    x = make((3, 5, 4, 2), torch.float32).to(device)
    weight, bias = (p.to(device) for p in affine(5, torch.float32))
    batch = torch.zeros((4, 5), dtype=torch.float64, device=device)
    tickets = _ops.batch_norm_tickets(device, 5)
    for layout in LAYOUTS.values():
        for arguments in ((weight, bias, EPS, True, True), (None, None, EPS, False, False)):
            torch.library.opcheck(overload, (layout(x), *arguments, batch, tickets))
    merge = getattr(torch.ops.swa_fast.batch_norm_merge_, backend)
    accumulators = torch.zeros((9, 5), dtype=torch.float64, device=device)
    for estimator in range(3):
        torch.library.opcheck(merge, (accumulators, torch.ones_like(batch), estimator))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_autograd_notices_the_write(backend: str, device: str) -> None:
    need(backend, device)
    x = make((3, 5, 4), torch.float32).to(device)
    batch = torch.zeros((4, 5), dtype=torch.float64, device=device)
    accumulators = torch.zeros((9, 5), dtype=torch.float64, device=device)
    versions = batch._version, accumulators._version
    _ops.batch_norm_collect(x, None, None, EPS, batch, backend=backend)
    assert batch._version > versions[0]
    _ops.batch_norm_merge_(accumulators, batch, "torch", backend=backend)
    assert batch._version > versions[0] + 1
    assert accumulators._version > versions[1]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_graph(backend: str, layout: str) -> None:
    """A replay reads the input's new values and leaves the tickets ready for the next one."""
    need(backend, "cuda")
    x = LAYOUTS[layout](make((20, 5, 33, 9), torch.float32)).cuda()
    batch = torch.empty((4, 5), dtype=torch.float64, device="cuda")
    accumulators = torch.zeros((9, 5), dtype=torch.float64, device="cuda")
    tickets = _ops.batch_norm_tickets("cuda", 5)

    def step() -> Tensor:
        y = _ops.batch_norm_collect(x, None, None, EPS, batch, tickets=tickets, backend=backend)
        _ops.batch_norm_merge_(accumulators, batch, "pooled", backend=backend)
        assert y is not None
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    accumulators.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    inputs = [make((20, 5, 33, 9), torch.float32, seed) for seed in (7, 8)]
    for values in inputs:
        x.copy_(LAYOUTS[layout](values))
        graph.replay()
        check(y, values, None, None, False, layout)
    every = torch.cat(inputs)
    statistics = accumulators.cpu()[[0, 1, 3, 4]]
    check_statistics(statistics, every, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_layers_on_several_streams_keep_to_their_tickets(backend: str) -> None:
    need(backend, "cuda")
    x = [make((8, c, 9, 9), torch.float32).cuda() for c in (5, 3)]
    flat = torch.empty((4, 8), dtype=torch.float64, device="cuda")
    tickets = _ops.batch_norm_tickets("cuda", 8)
    torch.cuda.synchronize()
    for values, columns in zip(x, (slice(0, 5), slice(5, 8)), strict=True):
        with torch.cuda.stream(torch.cuda.Stream()):
            _ops.batch_norm_collect(
                values, None, None, EPS, flat[:, columns], tickets=tickets[columns],
                backend=backend,
            )  # fmt: skip
    torch.cuda.synchronize()
    assert tickets.count_nonzero() == 0
    check_statistics(flat[:, :5].cpu(), x[0].cpu(), "first")
    check_statistics(flat[:, 5:].cpu(), x[1].cpu(), "second")


# Channels-last shapes with so many blocks that CUDA adds up their sums in groups: of one tile, and
# with a ticket more than the tile has channels to spare for.
GROUPED = [((20, 64, 40, 25), torch.bfloat16), ((66, 32, 32, 32), torch.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), GROUPED, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sums_of_many_blocks(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    need(backend, "cuda")
    values = channels_last(make(shape, dtype))
    x = values.cuda()
    tickets = _ops.batch_norm_tickets("cuda", shape[1])
    found = []
    for _ in range(2):
        batch = torch.empty((4, shape[1]), dtype=torch.float64, device="cuda")
        _ops.batch_norm_collect(
            x, None, None, EPS, batch, normalise=False, tickets=tickets, backend=backend
        )
        assert tickets.count_nonzero() == 0
        found.append(batch)
    assert torch.equal(*found)
    check_statistics(found[0].cpu(), values, f"{backend} {shape}")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [*GROUPED, ((128, 128, 16, 16), torch.float32)], ids=str
)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_block_waits_for_many_loads(
    simulator: Any, backend: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    """Loads that wait for one another take half a microsecond each, whatever the bandwidth; and
    nothing hides those of the block that finishes last."""
    need(backend, "cuda")
    x = LAYOUTS[layout](make(shape, dtype)).cuda()
    batch = torch.empty((4, shape[1]), dtype=torch.float64, device="cuda")
    tickets = _ops.batch_norm_tickets("cuda", shape[1])
    simulator.reset()
    _ops.batch_norm_collect(x, None, None, EPS, batch, tickets=tickets, backend=backend)
    trips = {
        name: counts["load_round_trips"] for name, counts in simulator.counters()["kernels"].items()
    }
    assert any("statistics" in name for name in trips)
    assert max(trips.values()) <= 40, trips


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "tiles"),
    [
        # Blocks of 1024 values: 96, eight of them a turn; 48 of each tile, four a turn; 96 of each
        # channel, eight a turn.
        ((6, 64, 16, 16), torch.bfloat16, "channels_last", 1),
        ((3, 64, 16, 16), torch.float32, "channels_last", 2),
        ((384, 2, 16, 16), torch.bfloat16, "contiguous", 2),
    ],
    ids=str,
)
def test_a_program_of_triton_waits_once_for_several_blocks(
    simulator: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype,
    layout: str, tiles: int,
) -> None:  # fmt: skip
    need("triton", "cuda")
    from swa_fast.kernels import batch_norm as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # all blocks of a tile in one program
    values = LAYOUTS[layout](make(shape, dtype))
    x = values.cuda()
    batch = torch.empty((4, shape[1]), dtype=torch.float64, device="cuda")
    simulator.reset()
    _ops.batch_norm_collect(x, None, None, EPS, batch, normalise=False, backend="triton")
    ((_, counts),) = simulator.counters()["kernels"].items()
    assert counts["blocks"] == tiles
    # One for each of twelve turns, and the pivots before the first.
    assert counts["load_round_trips"] <= 12 + 2
    check_statistics(batch.cpu(), values, f"{shape}, {dtype}")


@pytest.mark.parametrize(
    "offsets",
    [
        # Of a program's blocks: four in its first group, 24 in each of the others.
        lambda block: 3333.3 * (block >= 1),
        lambda block: 3333.3 * (block >= 4),
        lambda block: 3333.3 * (block >= 95),
        lambda block: 333.33 * block,
        lambda block: 3333.3 + 333.33 * (-1.0) ** (block // 12),
    ],
    ids=["after one block", "after a group", "in the last block", "drift", "to and fro"],
)
def test_triton_sums_around_the_mean_of_the_group_before(
    monkeypatch: pytest.MonkeyPatch, offsets: Callable[[Tensor], Tensor]
) -> None:
    """Wherever the values go, the error stays within that of a sum of 64 squares. Without noise all
    roundings go the same way."""
    need("triton", "cpu")
    from swa_fast.kernels import batch_norm as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    block = torch.arange(384) // 4  # of four samples of 256 values
    x = make((384, 2, 16, 16), torch.float32, std=0.0) + offsets(block.double()).float().view(
        -1, 1, 1, 1
    )
    batch = torch.empty((4, 2), dtype=torch.float64)
    _ops.batch_norm_collect(x, None, None, EPS, batch, normalise=False, backend="triton")
    check_statistics(batch, x, "moved")


@pytest.mark.gpu
def test_triton_compiles_once_for_changing_numbers() -> None:
    need("triton", "cuda")
    from swa_fast.kernels import batch_norm as kernels

    batch = torch.empty((4, 5), dtype=torch.float64, device="cuda")
    tickets = _ops.batch_norm_tickets("cuda", 5)

    def step(n: int, eps: float) -> None:
        x = torch.ones((n, 5, 3, 3), device="cuda")
        _ops.batch_norm_collect(x, None, None, eps, batch, tickets=tickets, backend="triton")

    def compiled() -> int:
        return sum(
            len(cache[0])
            for kernel in (kernels._statistics_kernel, kernels._normalise_kernel)
            for cache in kernel.device_caches.values()
        )

    step(3, 1e-5)
    before = compiled()
    for n in (5, 7, 9, 11):
        step(n, 1e-5 * n)
    assert compiled() == before


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3, 4)
    batch = torch.full((4, 3), 7.0, dtype=torch.float64)
    ok = {"x": x, "weight": None, "bias": None, "eps": EPS, "batch": batch}
    cases = [
        (TypeError, "x: expected dtype float32, .* found int64", {"x": x.long()}),
        (TypeError, "x: expected layout torch.strided", {"x": x.to_sparse()}),
        (ValueError, r"x: expected a shape .* found \(3,\)", {"x": torch.zeros(3)}),
        (ValueError, r"x: expected .* found \(0, 3, 4\)", {"x": x[:0]}),
        (ValueError, r"weight: expected shape \(3,\), found \(2,\)", {"weight": torch.ones(2)}),
        (TypeError, "bias: expected dtype .* found int64", {"bias": torch.ones(3).long()}),
        (ValueError, "bias: expected it on cpu", {"bias": torch.ones(3, device="meta")}),
        (TypeError, "batch: expected dtype float64, found float32", {"batch": batch.float()}),
        (ValueError, r"batch: expected shape \(4, 3\)", {"batch": batch[:, :2]}),
        (ValueError, r"batch: .* strides \(1, 4\)", {"batch": torch.zeros(3, 4).double().t()}),
        (TypeError, "tickets: expected dtype int32", {"tickets": torch.zeros(3)}),
        (ValueError, "tickets: expected a contiguous", {"tickets": torch.zeros(2).int()}),
    ]
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            _ops.batch_norm_collect(**{**ok, **changed})
        assert (batch == 7).all()
    accumulators = torch.zeros((9, 3), dtype=torch.float64)
    for error, message, arguments in (
        (ValueError, "estimator: expected one of torch, weighted", (accumulators, batch, "mean")),
        (TypeError, "accumulators: expected dtype", (accumulators.float(), batch, "torch")),
        (ValueError, r"batch: expected .* \[4, channels\]", (accumulators, batch[:3], "torch")),
        (ValueError, "batch: expected 3 channels", (accumulators, batch[:, :2].clone(), "torch")),
    ):
        with pytest.raises(error, match=message):
            _ops.batch_norm_merge_(*arguments)
        assert (batch == 7).all() and accumulators.count_nonzero() == 0
    with pytest.raises(_backends.BackendError, match="backend=cuda"):
        _ops.batch_norm_collect(**ok, backend="cuda")


def test_raw_operator_has_a_backstop() -> None:
    need("cpu", "cpu")
    op = torch.ops.swa_fast.batch_norm_collect.cpu
    x, batch = torch.zeros(2, 3, 4), torch.zeros((4, 3), dtype=torch.float64)
    rest = (EPS, False, True)
    with pytest.raises(RuntimeError, match="contiguous or channels-last"):
        op(torch.zeros(2, 3, 4, 5).transpose(2, 3), None, None, *rest, batch, None)
    with pytest.raises(RuntimeError, match="weight must hold 3"):
        op(x, torch.zeros(2), None, *rest, batch, None)
    with pytest.raises(RuntimeError, match="batch must be fp64"):
        op(x, None, None, *rest, batch.float(), None)
    with pytest.raises(RuntimeError, match="found dtype code"):
        op(x.long(), None, None, *rest, batch, None)
    merge = torch.ops.swa_fast.batch_norm_merge_.cpu
    with pytest.raises(RuntimeError, match="unknown estimator 3"):
        merge(torch.zeros((9, 3), dtype=torch.float64), batch, 3)
    with pytest.raises(RuntimeError, match="must be contiguous fp64"):
        merge(torch.zeros((8, 3), dtype=torch.float64), batch, 0)
