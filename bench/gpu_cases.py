"""What ``bench/gpu_report.py`` times on a GPU: cases and contenders, for the smallest and the full
size.

Ours are named as in the other suites; a name without a backend is the one that the device gets by
itself, CUDA. ``bench/predict.py`` walks the same cases on the meta device for its predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import bench_k_averages
import torch
from bench_average import size_of
from bench_batch_norm import EPS, LAYOUTS, check_output, check_variance
from bench_low_precision import STOCHASTIC, _foreach_over_a_copy, _size, _timm_fp32
from competitors import AVERAGERS, DECAY, averager, averaging, lerp_flat
from harness import Case, Contender, Run, Size, Work, dtype_name
from models import make_model
from rows import OURS
from torch import Tensor, nn

import swa_fast
from swa_fast import EMA, SWA, _ops

__all__ = ["batch_norm_cases", "update_cases"]

ALL_MODELS = (
    "PreResNet-164", "ResNet-50", "10,000 tiny tensors", "ViT-L/16", "10^9 in 300 tensors",
    "WRN-28-10",
)  # fmt: skip
COMPETITORS = (
    "torch AveragedModel", "torch foreach EMA", "foreach_lerp_, cached lists",
    "lerp_ loop, cached lists", "timm ModelEmaV3",
)  # fmt: skip


def _named(name: str, backend: str | None) -> str:
    return name if backend is None else f"{name}, {backend}"


def _backends(device: torch.device) -> tuple[str | None, ...]:
    return (None,) if device.type == "cpu" else (None, "triton")


def _ours(
    device: torch.device, name: str, rule: Any = None, **options: Any
) -> dict[str, Contender]:
    """One contender for each backend."""
    equal = rule is None or isinstance(rule, SWA)
    return {
        _named(name, backend): averaging(
            functools.partial(averager, rule=rule, backend=backend, **options), equal, OURS
        )
        for backend in _backends(device)
    }


def _theirs(*names: str) -> dict[str, Contender]:
    return {n: averaging(AVERAGERS[n][1], AVERAGERS[n][2], AVERAGERS[n][0]) for n in names}


def _limit() -> dict[str, Contender]:
    return {"lerp_flat": Contender("limit", lerp_flat)}


def misaligned(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model's parameters as views of one tensor, one after the other from its second element
    on, as some optimisers keep them."""
    shapes = [p.shape for p in make_model(name, dtype, torch.device("meta")).parameters()]
    flat = torch.empty(1 + sum(s.numel() for s in shapes), dtype=dtype, device=device)
    flat.uniform_(-1, 1)
    found, place = nn.ParameterList(), 1
    for shape in shapes:
        found.append(nn.Parameter(flat[place : place + shape.numel()].view(shape)))
        place += shape.numel()
    return found


def _rules(device: torch.device) -> dict[str, Contender]:
    """The same bytes with another weight in front of them."""
    found = {
        **_ours(device, "Averager SWA"),
        **_ours(device, "Averager EMA", EMA(DECAY)),
    }
    if hasattr(swa_fast, "Power"):  # checked by its own tests: the check here knows no powers
        make = functools.partial(averager, rule=swa_fast.Power(gamma=6.0))
        found["Averager Power"] = Contender(OURS, lambda model: Work(make(model).update))
    warm = functools.partial(averager, rule=EMA(DECAY, warmup="diffusers"))
    found["Averager EMA, warm-up"] = Contender(OURS, lambda model: Work(warm(model).update))
    return found


def update_cases(device: torch.device, small: bool) -> list[Case]:
    """Updates of averages, in the order of their worth."""
    models = ("PreResNet-20", "494 in 494 tensors") if small else ALL_MODELS
    some = ("PreResNet-20",) if small else ("ResNet-50", "ViT-L/16")

    def case(
        op: str, name: str, dtype: torch.dtype, contenders: Mapping[str, Contender],
        size: Callable[[Any], Size] = size_of, make: Callable[..., nn.Module] = make_model,
    ) -> Case:  # fmt: skip
        return Case(
            op, name, dtype_name(dtype), functools.partial(make, name, dtype, device), size,
            contenders, copies=3,
        )  # fmt: skip

    fp32, bf16 = torch.float32, torch.bfloat16
    found = [
        case("update", name, fp32, {
            **_limit(), **_ours(device, "Averager SWA"), "AveragedModel": averaging(
                AVERAGERS["AveragedModel"][1], True, OURS), **_theirs(*COMPETITORS),
        })
        for name in models
    ]  # fmt: skip
    for name in some:
        found += [
            case("fp32 average of bf16 weights", name, bf16, {
                **_limit(), **_ours(device, "Averager EMA", EMA(DECAY)),
                "torch foreach over an fp32 copy": averaging(
                    _foreach_over_a_copy, False, "competitor"),
                "timm ModelEmaV3, fp32": averaging(_timm_fp32, False, "competitor"),
            }, functools.partial(_size, 4)),
            case("bf16 average of bf16 weights", name, bf16, {
                **_limit(), **_ours(device, "Averager EMA", EMA(DECAY), **STOCHASTIC),
                **_theirs("foreach_lerp_, cached lists"),
            }, functools.partial(_size, 2)),
            case("update of 3 averages", name, fp32, {
                **_limit(),
                **{
                    _named("Averager, 3 averages", backend): Contender(
                        OURS, functools.partial(bench_k_averages._together, backend=backend))
                    for backend in _backends(device)
                },
                "3 times foreach_lerp_, cached lists": Contender("competitor", functools.partial(
                    bench_k_averages._one_by_one, AVERAGERS["foreach_lerp_, cached lists"][1],
                    False)),
            }, bench_k_averages._size),
            case("update that skips NaN", name, fp32, {
                **_limit(), **_ours(device, "Averager SWA", on_nonfinite="skip"),
            }, _size_of_checked),
            case("update from misaligned memory", name, fp32, {
                **_limit(), **_ours(device, "Averager SWA"),
                **_theirs("foreach_lerp_, cached lists"),
            }, make=misaligned),
            case("update from misaligned memory", name, bf16, {
                **_limit(), **_ours(device, "Averager EMA", EMA(DECAY)),
            }, functools.partial(_size, 4), make=misaligned),
        ]  # fmt: skip
    found += [
        case("update by rule", name, fp32, {**_limit(), **_rules(device)})
        for name in (models[0], some[0])
    ]
    return found


def _size_of_checked(model: nn.Module) -> Size:
    """Every weight is read once more, to see whether it is finite."""
    one = size_of(model)
    assert one.bytes is not None
    again = sum(p.numel() * p.element_size() for p in model.parameters())
    return Size(one.parameters, one.tensors, one.bytes + again)


# ------------------------------------------------------------------------------------ BatchNorm

# Layers of image networks at the batch size that one GPU trains with.
SHAPES = {
    "ResNet-50": [
        (64, 64, 112, 112), (64, 256, 56, 56), (64, 64, 56, 56), (64, 128, 28, 28),
        (64, 512, 28, 28), (64, 1024, 14, 14), (64, 256, 14, 14), (64, 2048, 7, 7),
    ],
    "PreResNet-164": [
        (128, 16, 32, 32), (128, 64, 32, 32), (128, 32, 16, 16), (128, 128, 16, 16),
        (128, 64, 8, 8), (128, 256, 8, 8),
    ],
    "DenseNet-161": [
        (64, 96, 112, 112), (64, 240, 56, 56), (64, 768, 28, 28), (64, 1056, 14, 14),
        (64, 2208, 7, 7),
    ],
}  # fmt: skip
SMALL_SHAPES = {"small": [(2, 8, 6, 6), (3, 16, 5, 7)]}
Inputs = tuple[Tensor, Tensor, Tensor]
# What a competitor may differ by, which sums in the order and the type that it likes: enough to see
# that it does the same.
COMPETITORS_ERROR = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def _inputs(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device
) -> Inputs:
    # Made where they are used: the host would take longer to draw them than a GPU to run all cases.
    x = torch.randn(shape, device=device).mul_(2).add_(1).to(dtype)
    weight, bias = torch.rand((2, shape[1]), device=device)
    return x.contiguous(memory_format=LAYOUTS[layout]), weight, bias


def _collect(normalise: bool, backend: str | None, shared: Inputs) -> Work:
    x, weight, bias = shared
    batch = torch.empty((4, x.shape[1]), dtype=torch.float64, device=x.device)
    tickets = _ops.batch_norm_tickets(x.device, x.shape[1])

    def run() -> Tensor | None:
        return _ops.batch_norm_collect(
            x, weight, bias, EPS, batch, normalise=normalise, tickets=tickets, backend=backend
        )

    def check(run: Run, done: int) -> None:
        batch.zero_()
        for _ in range(3):
            y: Any = run()
        check_variance(batch[3] / batch[0], x)
        if y is not None:  # a replayed graph returns nothing
            check_output(y, x, weight, bias)

    return Work(run, check)


def _torch_layer(cudnn: bool, shared: Inputs) -> Work:
    x, weight, bias = shared
    if cudnn and x.dtype == torch.bfloat16:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # it takes no other
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    layer = torch.cudnn_batch_norm if cudnn else torch.native_batch_norm

    def run() -> Any:
        return layer(x, weight, bias, mean, variance, True, 0.1, EPS)[0]

    def check(run: Run, done: int) -> None:
        y = None
        for _ in range(3):
            y = run()
        if y is not None:
            exact = nn.functional.batch_norm(
                x.double(), None, None, weight.double(), bias.double(), training=True, eps=EPS
            )
            error = COMPETITORS_ERROR[x.dtype]
            torch.testing.assert_close(y.double(), exact, rtol=error, atol=error)

    return Work(run, check)


def _torch_var_mean(shared: Inputs) -> Work:
    x = shared[0]

    def run() -> Any:
        return torch.var_mean(x, (0, 2, 3), correction=0)

    def check(run: Run, done: int) -> None:
        found: Any = None
        for _ in range(3):
            found = run()
        if found is not None:
            exact = x.double().var((0, 2, 3), correction=0)
            error = COMPETITORS_ERROR[x.dtype]
            torch.testing.assert_close(found[0].double(), exact, rtol=error, atol=0)

    return Work(run, check)


def _torch_statistics(shared: Inputs) -> Work:
    """The kernel that torch's own SyncBatchNorm takes its statistics from."""
    x = shared[0]

    def run() -> Any:
        return torch.batch_norm_stats(x, EPS)

    def check(run: Run, done: int) -> None:
        found: Any = None
        for _ in range(3):
            found = run()
        if found is not None:
            exact = x.double().mean((0, 2, 3))
            error = COMPETITORS_ERROR[x.dtype]
            torch.testing.assert_close(found[0].double(), exact, rtol=error, atol=error)

    return Work(run, check)


def _batch_norm_contenders(normalise: bool, device: torch.device) -> dict[str, Contender]:
    cuda = device.type != "cpu"
    found = {
        _named("swa_fast", backend): Contender(
            OURS, functools.partial(_collect, normalise, backend)
        )
        for backend in _backends(device)
    }
    if normalise:
        found["torch native"] = Contender("competitor", functools.partial(_torch_layer, False))
        if cuda:
            found["cuDNN"] = Contender("competitor", functools.partial(_torch_layer, True))
    else:
        found["torch.var_mean"] = Contender("competitor", _torch_var_mean)
        if cuda:
            found["torch.batch_norm_stats"] = Contender("competitor", _torch_statistics)
    return found


def batch_norm_cases(device: torch.device, small: bool) -> list[Case]:
    """Layers and statistics, the usual layout and type of GPU training first."""

    def size(times: int, shared: Inputs) -> Size:
        x = shared[0]
        return Size(x.numel(), 1, times * x.numel() * x.element_size())

    return [
        Case(
            op, f"{'x'.join(map(str, shape))} {layout}", dtype_name(dtype),
            functools.partial(_inputs, shape, layout, dtype, device),
            functools.partial(size, times),
            _batch_norm_contenders(normalise, device),
        )
        for layout, dtype in (
            ("channels_last", torch.bfloat16), ("contiguous", torch.float32),
            ("contiguous", torch.bfloat16), ("channels_last", torch.float32),
        )
        for shapes in (SMALL_SHAPES if small else SHAPES).values()
        for shape in shapes
        for op, times, normalise in (("BN layer", 3, True), ("BN statistics", 1, False))
    ]  # fmt: skip
