"""Torch itself on the simulated device: training, graphs, streams, generators, copies."""

import copy

import gpusim
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 10),
    )


def test_device():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    p = torch.cuda.get_device_properties(0)
    assert (p.major, p.minor, p.multi_processor_count) == (9, 0, 132) and "H100" in p.name


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p, 1e-2),
        lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    ],
)
def test_training_step(make):
    a = model()
    b = copy.deepcopy(a).cuda()
    oa, ob = make(a.parameters()), make(b.parameters())
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    for _ in range(2):
        la = F.cross_entropy(a(x), y)
        oa.zero_grad()
        la.backward()
        oa.step()
        lb = F.cross_entropy(b(x.cuda()), y.cuda())
        ob.zero_grad()
        lb.backward()
        ob.step()
        torch.testing.assert_close(lb.cpu(), la, rtol=1e-4, atol=1e-5)
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=False):
        assert q.is_cuda
        torch.testing.assert_close(q.cpu(), p, rtol=1e-3, atol=1e-4)
    assert gpusim.counters()["aten"]["aten::convolution"] == 4


def test_averaged_model_op_count():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    m = model().cuda()
    for kw in ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.99)}):
        avg = AveragedModel(m, **kw)
        avg.update_parameters(m)
        gpusim.reset()
        avg.update_parameters(m)
        c = gpusim.counters()
        assert c["total"]["aten_ops"] + c["total"]["memcpy_DtoD"] > 0


def test_views_and_inplace():
    x = torch.zeros(4, 6, device="cuda")
    x[1:3, ::2] = 5
    x.t()[0].add_(1)
    y = torch.zeros(4, 6)
    y[1:3, ::2] = 5
    y.t()[0].add_(1)
    assert torch.equal(x.cpu(), y)
    assert x[0].data_ptr() == x.data_ptr() and x.view(-1)[3:].data_ptr() == x.data_ptr() + 12
    out = torch.empty(0, device="cuda")
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), y + 1)
    assert torch.equal(x[x > 1].cpu(), y[y > 1]) and torch.equal(x.nonzero().cpu(), y.nonzero())
    _a, b = x.split([2, 4], 1)
    b.mul_(2)
    assert torch.equal(x[:, 2:].cpu(), y[:, 2:] * 2)
    assert torch.equal(
        torch.cat([x, x]).topk(2).values.cpu(), torch.cat([x.cpu()] * 2).topk(2).values
    )
    assert torch.equal(torch.arange(5, device="cuda").cpu(), torch.arange(5))
    assert torch.equal(
        torch.stack([x, x]).permute(2, 0, 1).contiguous().cpu(),
        torch.stack([x.cpu()] * 2).permute(2, 0, 1),
    )


def test_syncs_and_copies():
    x = torch.ones(8, device="cuda")
    gpusim.reset()
    assert x.sum().item() == 8
    t = gpusim.counters()["total"]
    assert t["host_syncs"] == 1 and t["memcpy_DtoH"] == 1
    p = torch.zeros(1024, pin_memory=True)
    assert p.is_pinned()
    gpusim.reset()
    d = p.to("cuda", non_blocking=True)
    p.copy_(d, non_blocking=True)
    t = gpusim.counters()["total"]
    assert (
        t["host_syncs"] == 0 and t["memcpy_HtoD_bytes"] == 4096 and t["memcpy_DtoH_bytes"] == 4096
    )
    x.double().to("cpu")
    assert torch.equal(torch.ones(3, 4).t().to("cuda", torch.half).cpu(), torch.ones(4, 3).half())


def test_generator():
    g = torch.Generator(device="cuda").manual_seed(3)
    a = torch.randn(5, device="cuda", generator=g)
    b = torch.randn(5, device="cuda", generator=g)
    g.manual_seed(3)
    assert torch.equal(
        a.cpu(), torch.randn(5, device="cuda", generator=g).cpu()
    ) and not torch.equal(a.cpu(), b.cpu())
    torch.manual_seed(1)
    cpu = torch.get_rng_state()
    u = F.dropout(torch.ones(100, device="cuda"))
    assert torch.equal(cpu, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(u.cpu(), F.dropout(torch.ones(100, device="cuda")).cpu())


def test_streams_events():
    s = torch.cuda.Stream()
    e0, e1 = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(s):
        e0.record()
        x = torch.ones(10, device="cuda") * 3
        e1.record()
    torch.cuda.current_stream().wait_stream(s)
    e1.synchronize()
    assert e0.elapsed_time(e1) >= 0 and x.cpu().sum() == 30


def test_graph(ops):
    x = torch.ones(1000, device="cuda")
    y = torch.zeros(1000, device="cuda")
    acc = torch.zeros(1000, device="cuda")
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        z = ops.vadd(x, y)
        acc.add_(z * 2)
        ops.axpy4(x, acc, 1.0)
    assert acc.cpu().sum() == 0  # nothing ran yet
    for i in range(3):
        y.fill_(i)
        gpusim.reset()
        g.replay()
        t = gpusim.counters()["total"]
        assert t["graph_launches"] == 1 and t["kernel_launches"] == 2 and t["host_syncs"] == 0
    assert torch.equal(acc.cpu(), torch.full((1000,), sum(2.0 * (1 + i) + 1 for i in range(3))))
    assert torch.equal(z.cpu(), torch.full((1000,), 3.0))


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: torch.cuda.synchronize(),
        lambda x: x.cpu(),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
)
def test_graph_forbids_sync(sync):
    x = torch.ones(10, device="cuda")
    g = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(g):
        x.mul_(2)
        sync(x)
    assert x.cpu().sum() == 10
