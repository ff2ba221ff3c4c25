"""The operators of the update: random bits, rounding, schemas, checks of arguments."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    BACKENDS,
    DTYPES,
    need,
    raw_arguments,
    step,
)
from torch import Tensor, nn

from swa_fast import EMA, SWA, Averager, Window, reference

backends = pytest.mark.parametrize("backend, device", BACKENDS)


def test_philox_known_answers() -> None:
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):  # fmt: skip
        group = counter[0] | counter[1] << 32
        group -= (group >> 63) << 64
        words = reference.philox(
            key[0] | key[1] << 32, torch.tensor([group]), torch.tensor(counter[2]), counter[3]
        )
        assert words.tolist() == [list(expected)]


def bfloat16_averages(
    backend: str | None, device: str, seed: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(130, 67), nn.Linear(67, 3), nn.Linear(3, 1, bias=False))
    model.to(device, dtype)
    averager = Averager(
        model, {"swa": SWA(), "ema": EMA(0.999)}, dtype=torch.bfloat16, rounding="stochastic",
        seed=seed, backend=backend,
    )  # fmt: skip
    for _ in range(4):
        step(model)
        averager.update()
    return {
        f"{rule} {name}": tensor.cpu()
        for rule, tensors in averager.averages.items()
        for name, tensor in tensors.items()
    }


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_same_everywhere(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    need(backend, device)
    expected = bfloat16_averages("reference", "cpu", dtype=dtype)
    found = bfloat16_averages(backend, device, dtype=dtype)
    for name, tensor in expected.items():
        # Triton's interpreter does not fuse multiply and add: an fp32 unit, rarely a bf16 one.
        if backend == "triton" and device == "cpu":
            different = (found[name] != tensor).float().mean().item()
            assert different < 0.01, name
            torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("backend, device", [p for p in BACKENDS if p.id in ("cpu", "reference")])
def test_stochastic_rounding_depends_on_the_seed_only(backend: str, device: str) -> None:
    need(backend, device)
    threads = torch.get_num_threads()
    one = bfloat16_averages(backend, device)
    try:
        torch.set_num_threads(1)
        again = bfloat16_averages(backend, device)
    finally:
        torch.set_num_threads(threads)
    other = bfloat16_averages(backend, device, seed=4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("backend, device", [p for p in BACKENDS if p.id in ("cpu", "reference")])
def test_stochastic_rounding_is_unbiased(backend: str, device: str) -> None:
    """An EMA whose every step is below bfloat16's resolution reaches its place on average."""
    need(backend, device)
    source = torch.ones(20_000)
    averager = Averager(
        [source], {"ema": EMA(0.999)}, dtype=torch.bfloat16, rounding="stochastic",
        backend=backend,
    )  # fmt: skip
    averager.update()
    source.fill_(1.5)
    for _ in range(200):
        averager.update()
    average = averager.averages["ema"]["0"].double()
    expected = 1.5 - 0.5 * 0.999**200
    # Each of the steps adds a variance of at most a quarter of the squared resolution, 2^-7.
    deviation = math.sqrt(200 * 0.25) * 2**-7
    assert abs(average.mean().item() - expected) < 4 * deviation / math.sqrt(len(source))
    assert average.std().item() < deviation


@backends
def test_stochastic_rounding_of_special_values(backend: str, device: str) -> None:
    need(backend, device)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.5, 2.0**-133, 3.38e38]
    source = torch.tensor(values, device=device)
    averager = Averager(
        [source], {"a": EMA(0.5)}, dtype=torch.bfloat16, rounding="stochastic", backend=backend
    )
    averager.update()
    found = averager.averages["a"]["0"].float().cpu()
    expected = torch.tensor(values)
    exact = expected.bfloat16().float() == expected
    assert torch.equal(found[exact], expected[exact])
    assert found[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sources_that_begin_anywhere(dtype: torch.dtype) -> None:
    """Between two addresses of the dtype, as tensors over another library's memory may: what is
    undefined in C++ is for the sanitizers to see (make test-asan)."""
    need("cpu", "cpu")

    def odd(n: int) -> Tensor:
        return torch.frombuffer(bytearray(n * dtype.itemsize + 1), dtype=dtype, offset=1)

    sources = [odd(n) for n in (1, 7, 33, 4099)]
    plain = [source.clone() for source in sources]
    assert sources[0].data_ptr() % dtype.itemsize == 1
    rules = {"ema": EMA(0.5), "window": Window(2)}
    averages = [Averager(s, rules, backend="cpu", dtype=dtype) for s in (sources, plain)]
    for _ in range(3):
        for source, same in zip(sources, plain, strict=True):
            same.copy_(source.copy_(torch.randn(source.shape, dtype=torch.float64).to(dtype)))
        for averager in averages:
            averager.update()
    found, expected = (averager.averages["ema"] for averager in averages)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with averages[0].applied("ema"):
        assert all(torch.equal(s, expected[str(i)]) for i, s in enumerate(sources))
    assert all(torch.equal(s, p) for s, p in zip(sources, plain, strict=True))


@backends
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("on_nonfinite", [None, "skip"])
def test_opcheck(backend: str, device: str, seed: int | None, on_nonfinite: str | None) -> None:
    need(backend, device)
    sources = [torch.randn(33).bfloat16().to(device), torch.randn(5).to(device)]
    averager = Averager(
        # Equal weights that are rounded to nearest in bfloat16 are refused.
        sources, {"a": EMA(0.5) if seed is None else SWA(), "b": EMA(0.9)}, dtype=torch.bfloat16,
        rounding="nearest" if seed is None else "stochastic", on_nonfinite=on_nonfinite,
        backend=backend,
    )  # fmt: skip
    update, swap = raw_arguments(averager)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        getattr(torch.ops.swa_fast.update_, backend), tuple(update), test_utils=tests
    )
    torch.library.opcheck(
        getattr(torch.ops.swa_fast.swap_, backend), tuple(swap), test_utils=("test_faketensor",)
    )
    torch.library.opcheck(
        torch.ops.swa_fast.update_averager,
        (averager._memory, averager._counts, averager._storage.live, averager._handle),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )


def test_raw_operators_check_their_arguments() -> None:
    need("cpu", "cpu")
    good, good_swap = raw_arguments(Averager([torch.randn(5)], {"a": SWA()}, backend="cpu"))
    for at, bad, message in (
        (2, torch.zeros(17, dtype=torch.int64), "expected 1 to 16 averages, found 17"),
        (2, torch.zeros(1), "n_averaged must be contiguous int64"),
        (3, torch.zeros(2, dtype=torch.int64), "counters must hold 3 int64"),
        (4, torch.zeros(1, 8), "rules must be fp64"),
        (5, torch.zeros(1, 3, dtype=torch.int64), r"table must be int64 of shape \[segments, 4\]"),
        (5, torch.zeros(4, dtype=torch.int64), "table must be int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swa_fast.update_.cpu(*good[:at], bad, *good[at + 1 :])
    for gate, message in (
        ([torch.zeros(2)], "found_inf must hold one fp32"),
        ([torch.zeros(1, dtype=torch.float64)], "found_inf must hold one fp32"),
        ([None, torch.zeros(1)], "steps must hold one int64"),
        ([None, torch.zeros(1, dtype=torch.int64), 0], "every must be 1 or more, found 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swa_fast.update_.cpu(*good, 0, *gate)
    with pytest.raises(RuntimeError, match="found_inf and steps need counters"):
        torch.ops.swa_fast.update_.cpu(*good[:3], None, *good[4:], 0, torch.zeros(1))
    with pytest.raises(RuntimeError, match="skip_nonfinite needs counters"):
        torch.ops.swa_fast.update_.cpu(*good[:3], None, *good[4:8], True)
    for at, wrong, message in (
        (2, torch.zeros(1, 3, dtype=torch.int64), "table must be int64"),
        (3, 1, "expected average 0 to 0, found 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swa_fast.swap_.cpu(*good_swap[:at], wrong, *good_swap[at + 1 :])
