"""A CUDA extension, built with torch.utils.cpp_extension, against CPU references."""

import math

import gpusim
import pytest
import torch

dev = "cuda"


def kernel(part):
    k = [v for n, v in gpusim.counters()["kernels"].items() if part in n]
    assert len(k) == 1
    return k[0]


def rnd(*s, seed=0):
    return torch.randn(*s, generator=torch.Generator().manual_seed(seed))


def test_vadd_and_counters(ops):
    a, b = rnd(1000), rnd(1000, seed=1)
    o = ops.vadd(a.to(dev), b.to(dev))
    assert o.is_cuda and torch.equal(o.cpu(), a + b)
    k = kernel("k_vadd")
    assert k["launches"] == 1 and k["grid"] == [4, 1, 1] and k["block"] == [256, 1, 1]
    assert (
        k["ld_bytes"] == 8000
        and k["st_bytes"] == 4000
        and k["ld_efficiency"] == 1.0
        and k["widest_ld"] == 4
    )


@pytest.mark.parametrize("n", [1, 3, 4, 7, 1023, 1024, 5001])
def test_axpy4(ops, n):
    x, y = rnd(n), rnd(n, seed=1)
    yd = y.to(dev)
    ops.axpy4(x.to(dev), yd, 0.3)
    ref = torch.tensor(
        [float(v) for v in (x.double() * torch.tensor(0.3).double() + y.double()).float()]
    )
    assert torch.equal(yd.cpu(), ref)  # fma: one rounding
    if n >= 4:
        assert kernel("k_axpy4")["widest_ld"] == 16


def test_multi_tensor_lerp(ops):
    sizes = [1, 5, 1024, 4096, 3333, 10, 2048, 7] * 4
    d = [rnd(s, seed=i) for i, s in enumerate(sizes)]
    s = [rnd(n, seed=100 + i) for i, n in enumerate(sizes)]
    dd, ss = [t.to(dev) for t in d], [t.to(dev) for t in s]
    ops.lerp(dd, ss, 0.1)
    w = torch.tensor(0.1)
    for a, b, o in zip(d, s, dd, strict=False):
        torch.testing.assert_close(o.cpu(), a + w * (b - a), rtol=1e-6, atol=1e-7)
    assert (
        gpusim.counters()["total"]["host_syncs"] == len(sizes) * 3
    )  # the copies to and from the device
    table = torch.tensor(
        [[x.data_ptr(), y.data_ptr(), x.numel()] for x, y in zip(dd, ss, strict=False)], device=dev
    )
    before = [t.cpu() for t in dd]
    ops.lerp_table(table, 0.1)
    for a, b, o in zip(before, s, dd, strict=False):
        torch.testing.assert_close(o.cpu(), a + w * (b - a), rtol=1e-6, atol=1e-7)


def test_welford(ops):
    x = rnd(5, 7, 33) * 3 + 2
    m, v = ops.welford(x.to(dev))
    r = x.double().transpose(0, 1).reshape(7, -1)
    torch.testing.assert_close(m.cpu().double(), r.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v.cpu().double(), r.var(1, unbiased=False), rtol=1e-5, atol=1e-5)
    assert (
        gpusim.counters()["aten"]["aten::zero_"] + gpusim.counters()["aten"]["aten::fill_.Scalar"]
        == 1
    )  # at::zeros in C++


def test_reductions(ops):
    x = rnd(10007)
    for _ in range(2):
        torch.testing.assert_close(ops.norm(x.to(dev), 9).cpu(), x.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ops.sumsq(x.to(dev)).cpu(), (x * x).sum(), rtol=1e-5, atol=0)
    assert kernel("k_sumsq")["atomics"] == 64


def test_half_types(ops):
    x = torch.cat(
        [
            rnd(500) * 100,
            torch.tensor([0.0, -0.0, 1e-8, 65504.0, 65520.0, 1e30, float("inf"), 6e-5, 5.9e-8]),
        ]
    )
    b, h, k = ops.halfs(x.to(dev))
    assert torch.equal(b.cpu(), x.bfloat16()) and torch.equal(h.cpu(), x.half())
    ref = (x.bfloat16() * x.bfloat16()).float() + (
        x.half().double() ** 2 + x.half().double()
    ).half().float()
    assert torch.equal(k.cpu(), ref)


def test_math(ops):
    x = rnd(300) * 3
    o, d, i = [t.cpu() for t in ops.math(x.to(dev))]
    r = x.double()
    ref = torch.stack(
        [
            r.exp(),
            (r.abs() + 1e-3).log(),
            r.tanh(),
            r.sin(),
            r.sigmoid(),
            r.abs() ** 1.5,
            r / 3,
            (r * r + 1).rsqrt(),
        ],
        1,
    )
    torch.testing.assert_close(o.double(), ref, rtol=3e-6, atol=1e-6)
    assert torch.equal(o[:, 6], x / 3)
    torch.testing.assert_close(d, r.exp() / 3, rtol=1e-15, atol=0)
    k = (x * 1000).round().int()
    for j in range(300):
        v = int(k[j])
        q = int(v / 7)
        u = v & 0xFFFFFFFF
        assert i[j].tolist() == [
            q,
            v - q * 7,
            bin(u).count("1") + 32 - u.bit_length(),
            (v * 123456789) >> 32,
        ]


def test_local_memory_switch_call(ops):
    x = rnd(6)
    o = ops.local(x.to(dev), 2, 5).cpu()
    for i in range(64):
        c = [0.0] * 6
        for j in range(6):
            c[(j + 2) % 6] = float(x[j]) + i
        s = 0.0
        for j in reversed(range(5)):
            s = s * 0.5 + c[j]
        s = [s + 1, s * 2, s - 3, -s, s * s, 0.0][i % 6]
        assert math.isclose(float(o[i]), s, rel_tol=2e-5, abs_tol=1e-4)


def test_out_of_bounds_is_reported(ops):
    x = torch.zeros(10, device=dev)
    ops.oob(x)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.cuda.synchronize()
    f = gpusim.take_faults()
    assert (
        len(f) == 1
        and "out-of-bounds global write of 4 bytes" in f[0]
        and "k_oob" in f[0]
        and "thread (1,0,0)" in f[0]
        and "st.global" in f[0]
    )


def test_race_is_reported(ops):
    x = torch.zeros(1, device=dev)
    ops.race(x)
    with pytest.raises(RuntimeError):
        torch.cuda.synchronize()
    f = gpusim.take_faults()
    assert f and "data race between blocks" in f[0] and "k_race" in f[0]


def test_divergent_barrier_is_reported(ops):
    ops.divergent(torch.zeros(32, device=dev))
    f = gpusim.take_faults()
    assert len(f) == 1 and "divergent barrier" in f[0]


def test_uninitialized_read_is_reported(ops):
    ops.vadd(torch.empty(10, device=dev), torch.zeros(10, device=dev))
    f = gpusim.take_faults()
    assert f and "never-written" in f[0]


def test_use_after_free_is_reported(ops):
    x = torch.zeros(10, device=dev)
    table = torch.tensor([[x.data_ptr(), x.data_ptr(), 10]], device=dev)
    del x
    ops.lerp_table(table, 0.5)
    f = gpusim.take_faults()
    assert f and "use after free" in f[0]
