"""One BatchNorm layer that hands out its statistics, against torch's layer in training mode.

    python bench/bench_batch_norm.py

``torch_layer`` is aten::native_batch_norm, and ``torch_var_mean`` reads the input for statistics
alone. A layer has to read for the statistics, and to read and write for the output: ``read_copy``,
a sum and a copy of as many bytes, is what the machine allows where no cache holds the input, and
``read`` the same for the statistics. Every contender's result is checked before it is timed.

On the CPU malloc is set as update_bn sets it, for all alike: for a fresh mapping, which is what it
answers a large request with by default, the system clears page by page what the layer is about to
overwrite, and that takes several times as long as the layer.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import torch
from harness import Case, Contender, Size, Suite, Work, dtype_name, main, pytest_cases
from rows import OURS
from torch import Tensor

from swa_fast import _ops
from swa_fast.batch_norm.malloc import KeptMemory

EPS = 1e-5
# The layers of PreResNet-164 at batch size 128, and of ResNet-50 at batch size 16.
SHAPES = (
    (128, 16, 32, 32),
    (128, 64, 32, 32),
    (128, 32, 16, 16),
    (128, 128, 16, 16),
    (128, 64, 8, 8),
    (128, 256, 8, 8),
    (16, 64, 112, 112),
    (16, 256, 56, 56),
    (16, 512, 28, 28),
    (16, 2048, 7, 7),
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def elsewhere(layer: Callable[[], Tensor | None], x: Tensor) -> Callable[[], object]:
    """A layer that, on the CPU, never writes where it wrote last, as in a network, whose other
    layers come in between. Without this malloc's bookkeeping decides whether the run that is not
    timed has fetched the output's memory for the one that is: the same layer took 0.17 or 0.38 ms,
    from one process and contender to the next."""
    if x.device.type != "cpu":
        return layer
    last: list[Tensor | None] = []

    def run() -> None:
        last.append(layer())
        del last[:-1]

    return run


def check_output(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, roundings: int = 4) -> None:
    exact = torch.nn.functional.batch_norm(
        x.double(), None, None, weight.double(), bias.double(), training=True, eps=EPS
    )
    tolerance = roundings * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def check_variance(variance: Tensor, x: Tensor) -> None:
    tolerance = 1e-5 if variance.dtype == torch.float64 else torch.finfo(variance.dtype).eps
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=tolerance, atol=0)


def swa_fast_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    batch = torch.empty((4, x.shape[1]), dtype=torch.float64, device=x.device)

    tickets = _ops.batch_norm_tickets(x.device, x.shape[1])

    def layer() -> Tensor | None:
        return _ops.batch_norm_collect(x, weight, bias, EPS, batch, tickets=tickets)

    y = layer()
    assert y is not None
    check_output(y, x, weight, bias)
    check_variance(batch[3] / batch[0], x)
    return elsewhere(layer, x)


def swa_fast_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    batch = torch.empty((4, x.shape[1]), dtype=torch.float64, device=x.device)

    tickets = _ops.batch_norm_tickets(x.device, x.shape[1])

    def statistics() -> None:
        _ops.batch_norm_collect(x, weight, bias, EPS, batch, normalise=False, tickets=tickets)

    statistics()
    check_variance(batch[3] / batch[0], x)
    return statistics


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)

    def layer() -> Tensor:
        y: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, True, 0.1, EPS)[0]
        return y

    # In channels-last layout it adds up the rows in fp32, one after the other.
    rows = x.numel() // x.shape[1]
    check_output(layer(), x, weight, bias, 4 if x.dtype == torch.bfloat16 else math.isqrt(rows))
    return elsewhere(layer, x)


def torch_var_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    def statistics() -> tuple[Tensor, Tensor]:
        return torch.var_mean(x, (0, 2, 3), correction=0)

    check_variance(statistics()[0], x)
    return statistics


def read(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    # As fp32, whose sum is at the speed of memory in torch.
    return x.new_ones(x.numel() * x.element_size() // 4, dtype=torch.float32).sum


def read_copy(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    source = x.new_ones(x.numel() * x.element_size() // 4, dtype=torch.float32)
    target = torch.zeros_like(source)

    def both() -> None:
        source.sum()
        target.copy_(source)

    return both


CONTENDERS = {
    "swa_fast": swa_fast_layer,
    "torch_layer": torch_layer,
    "read": read,
    "read_copy": read_copy,
    "swa_fast_statistics": swa_fast_statistics,
    "torch_var_mean": torch_var_mean,
}


# op: (times it reads or writes the input, as the limit does, its contenders and their sides).
OPS = {
    "BN layer": (3, {"read_copy": "limit", "swa_fast": OURS, "torch_layer": "competitor"}),
    "BN statistics": (
        1,
        {"read": "limit", "swa_fast_statistics": OURS, "torch_var_mean": "competitor"},
    ),
}
QUICK = ((128, 64, 32, 32), (16, 256, 56, 56))
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = (1 + 2 * torch.randn(shape, generator=generator)).to(device, dtype)
    weight, bias = torch.rand((2, shape[1]), generator=generator).to(device)
    return x.contiguous(memory_format=LAYOUTS[layout]), weight, bias


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _contender(name: str, side: str) -> Contender:
    # The functions above check what they return.
    return Contender(side, lambda shared: Work(CONTENDERS[name](*shared)))


def cases(device: torch.device) -> list[Case]:
    def size(times: int, shared: Inputs) -> Size:
        return Size(shared[0].numel(), 1, times * _bytes(shared[0]))

    return [
        Case(
            op, f"{'x'.join(map(str, shape))} {layout}", dtype_name(dtype),
            functools.partial(inputs, shape, layout, dtype, device),
            functools.partial(size, times),
            {name: _contender(name, side) for name, side in sides.items()},
            quick=shape in QUICK and layout == "channels_last" and dtype == torch.float32,
            modes=("warm", "queued", "graph", "graph cold"),
            around=functools.partial(KeptMemory, device.type == "cpu"),
        )
        for op, (times, sides) in OPS.items()
        for shape in SHAPES
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip


SUITE = Suite("BatchNorm layer and statistics", cases)
test_layer = pytest_cases(SUITE)

if __name__ == "__main__":
    sys.exit(main([SUITE], str(__doc__)))
