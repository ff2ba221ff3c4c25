"""Triton kernels: compiled by Triton, executed by the interpreter."""

import gpusim
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def lerp_table_kernel(table, tensors, w, B: tl.constexpr):
    t = tl.program_id(1)
    d = tl.load(table + 3 * t).to(tl.pointer_type(tl.float32))
    s = tl.load(table + 3 * t + 1).to(tl.pointer_type(tl.float32))
    n = tl.load(table + 3 * t + 2)
    for start in range(tl.program_id(0) * B, n, tl.num_programs(0) * B):
        i = start + tl.arange(0, B)
        m = i < n
        a = tl.load(d + i, mask=m)
        tl.store(d + i, a + w * (tl.load(s + i, mask=m) - a), mask=m)


@triton.jit
def stats_kernel(x, mean, var, L, B: tl.constexpr):
    c = tl.program_id(0)
    s = tl.zeros([B], tl.float32)
    q = tl.zeros([B], tl.float32)
    for k in range(0, L, B):
        i = k + tl.arange(0, B)
        v = tl.load(x + c * L + i, mask=i < L, other=0.0)
        s += v
        q += v * v
    m = tl.sum(s) / L
    tl.store(mean + c, m)
    tl.store(var + c, tl.sum(q) / L - m * m)


@triton.jit
def sumsq_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.atomic_add(o, tl.sum(v * v))


@triton.jit
def half_kernel(x, b, h, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n)
    tl.store(b + i, v.to(tl.bfloat16), mask=i < n)
    tl.store(h + i, tl.exp(v).to(tl.float16), mask=i < n)


@triton.jit
def oob_kernel(x, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(x + i, i.to(tl.float32))


@triton.jit
def race_kernel(x):
    tl.store(x, tl.load(x) + 1.0)


@triton.autotune(
    configs=[triton.Config({"B": 128}, num_warps=4), triton.Config({"B": 256}, num_warps=8)],
    key=["n"],
)
@triton.jit
def tuned_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def rnd(*s):
    return torch.randn(*s, generator=torch.Generator().manual_seed(1))


def test_add():
    n = 5008
    x, y = rnd(n), rnd(n) + 1
    o = torch.empty(n, device="cuda")
    add_kernel[(triton.cdiv(n, 1024),)](x.cuda(), y.cuda(), o, n, B=1024)
    assert torch.equal(o.cpu(), x + y)
    k = gpusim.counters()["kernels"]["add_kernel"]
    assert k["launches"] == 1 and k["widest_ld"] == 16 and k["ld_bytes"] == n * 8


def test_lerp_table():
    d, s = [rnd(n) for n in (3, 1000, 4097)], [rnd(n) + 1 for n in (3, 1000, 4097)]
    dd, ss = [t.cuda() for t in d], [t.cuda() for t in s]
    t = torch.tensor(
        [[a.data_ptr(), b.data_ptr(), a.numel()] for a, b in zip(dd, ss, strict=False)],
        device="cuda",
    )
    lerp_table_kernel[(2, 3)](t, 3, 0.25, B=512)
    for a, b, o in zip(d, s, dd, strict=False):
        torch.testing.assert_close(o.cpu(), a + 0.25 * (b - a))


def test_reduction():
    x = rnd(6, 1500) * 2 + 1
    m, v = torch.empty(6, device="cuda"), torch.empty(6, device="cuda")
    stats_kernel[(6,)](x.cuda(), m, v, 1500, B=512)
    torch.testing.assert_close(m.cpu(), x.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v.cpu(), x.var(1, unbiased=False), rtol=1e-4, atol=1e-5)
    o = torch.zeros(1, device="cuda")
    sumsq_kernel[(9,)](x.half().cuda(), o, x.numel(), B=1024)
    torch.testing.assert_close(o.cpu()[0], (x.half().float() ** 2).sum(), rtol=1e-5, atol=0)


def test_half():
    x = rnd(700)
    b, h = (
        torch.empty(700, device="cuda", dtype=torch.bfloat16),
        torch.empty(700, device="cuda", dtype=torch.half),
    )
    half_kernel[(3,)](x.cuda(), b, h, 700, B=256)
    assert torch.equal(b.cpu(), x.bfloat16())
    torch.testing.assert_close(h.cpu(), x.exp().half())


def test_faults():
    oob_kernel[(1,)](torch.zeros(100, device="cuda"), B=128)
    f = gpusim.take_faults()
    assert f and "out-of-bounds global write" in f[0] and "oob_kernel" in f[0]
    race_kernel[(4,)](torch.zeros(1, device="cuda"))
    f = gpusim.take_faults()
    assert f and "data race" in f[0]


def test_autotune():
    x = rnd(1000).cuda()
    o = torch.empty(1000, device="cuda")
    tuned_kernel[lambda m: (triton.cdiv(1000, m["B"]),)](x, o, 1000)
    assert torch.equal(o.cpu(), x.cpu() * 2)


def test_graph():
    x = torch.ones(512, device="cuda")
    o = torch.zeros(512, device="cuda")
    add_kernel[(1,)](x, x, o, 512, B=512)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        add_kernel[(1,)](x, o, o, 512, B=512)
    assert o.cpu()[0] == 2
    g.replay()
    g.replay()
    assert o.cpu()[0] == 4
