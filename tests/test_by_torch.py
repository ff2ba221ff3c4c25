"""Averages of tensors that no kernel can read: DTensors, wrapper subclasses, lazy and quantised
parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot
from test_hooks import at_every_line
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import swa_fast
from swa_fast import EMA, AveragedModel, Power

stock = torch.optim.swa_utils


class Wrapped(Tensor):
    """A tensor that only says what it does to another one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapped) else value

        result = func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        if func._schema.name.endswith("_"):
            return args[0]
        return tree_map(
            lambda value: Wrapped(value) if isinstance(value, Tensor) else value, result
        )


def wrapped() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.detach().clone()))
    return model


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, Wrapped):
        return tensor.inner.clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: plain(tensor) for name, tensor in model.state_dict().items()}


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
            parameter.mul_(1.5)
        for buffer in model.buffers():
            buffer.add_(2)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("kind", ["wrapped", "dtensor", "tensor parallel"])
def test_as_torch_averages_them(
    kind: str, ema: bool, use_buffers: bool, mesh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "wrapped":
        model = wrapped()
    elif kind == "dtensor":
        from torch.distributed.tensor import distribute_module

        model = distribute_module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), mesh)
    else:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model = parallelize_module(model, mesh, {"0": ColwiseParallel()})
    ours, theirs = (
        module.AveragedModel(
            model,
            # Its function of lists refuses lists where some are DTensors and some are not.
            avg_fn=module.get_ema_avg_fn(0.75) if ema else None,
            use_buffers=use_buffers,
        )
        for module in (swa_fast, stock)
    )
    for _ in range(3):
        ours.update_parameters(model)
        theirs.update_parameters(model)
        change(model)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"AveragedModel: 0.weight is a {'Wrapped' if kind == 'wrapped' else 'DTensor'}, which no "
        "kernel reads: updates are torch's own arithmetic, tensor by tensor"
    ]
    assert ours.n_averaged == theirs.n_averaged == 3
    expected = values(theirs.module)
    for name, tensor in values(ours.module).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], msg=name)
        else:  # which torch averages into a truncated number
            assert tensor == 4, name
    if kind != "wrapped":
        loaded = AveragedModel(model)
        loaded.load_state_dict(theirs.state_dict())
    live, average = values(model), values(ours.module)
    with ours.applied(model):
        for name, tensor in values(model).items():
            assert torch.equal(tensor, average[name])
        for refused in (lambda: ours.update_parameters(model), ours.applied(model).__enter__):
            with pytest.raises(RuntimeError, match="applied"):
                refused()
    for name, tensor in values(model).items():
        assert torch.equal(tensor, live[name])


def test_every_rule_and_attached() -> None:
    for rule in (EMA(0.9, warmup="timm"), Power(1.0), EMA(0.5, start=2)):
        model = wrapped()
        odd, even = AveragedModel(model, rule=rule), AveragedModel(nn.Linear(1, 1), rule=rule)
        even.module = bare = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        live = copy.deepcopy(bare)
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
        odd.attach(optimizer, model, every=2)
        for n in range(8):
            live.load_state_dict(values(model))
            parameter.grad = torch.zeros(1)
            optimizer.found_inf = torch.full((1,), float(n == 4))
            optimizer.step()
            if n in (1, 3, 6):
                even.update_parameters(live)
            change(model)
        assert odd.n_averaged == even.n_averaged == 3
        for name, tensor in values(odd.module).items():
            torch.testing.assert_close(tensor, values(even.module)[name])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_torch_does_not_average_is_named_and_nothing_changes() -> None:
    model = nn.Linear(2, 2)
    quantised = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    model.q = nn.Parameter(quantised, requires_grad=False)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    before = snapshot(averaged.module)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(TypeError, match=r"^q: torch does not average a quantised tensor \(Could"):
        averaged.update_parameters(model)
    assert averaged.n_averaged == 1
    assert torch.equal(averaged.module.weight, before["weight"])
    compiled = torch.compile(averaged.update_parameters, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="q is a quantised tensor, which compiled code cannot"):
        compiled(model)


def test_a_parameter_that_becomes_a_wrapper_is_refused() -> None:
    """Of which value the average would be, nobody can tell."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4))
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    model.w = nn.Parameter(TwoTensor(torch.full((4,), 3.0), torch.full((4,), 9.0)))
    with pytest.raises(TypeError, match=r"w: the average is a Parameter, the model's a TwoTensor"):
        averaged.update_parameters(model)
    assert averaged.module.w.eq(1).all() and averaged.n_averaged == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.ao")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_packed_weights_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    averaged = AveragedModel(quantised)
    averaged.update_parameters(quantised)
    change(quantised)
    averaged.update_parameters(quantised)
    assert torch.equal(averaged.module[1].weight, torch.full((4,), 2.0))
    swa_fast.Averager(quantised, {"s": swa_fast.SWA()}).update()
    message = "0 is a quantised module, whose packed weights are not averaged (2 in all)"
    assert [record.getMessage() for record in caplog.records if record.levelno > 20] == [
        f"{who}: {message}" for who in ("AveragedModel", "Averager")
    ]


def test_lazy_parameters() -> None:
    for use_buffers in (False, True):
        model = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4))
        averaged = AveragedModel(model, use_buffers=use_buffers, dtype=torch.float64)
        with pytest.raises(ValueError, match="weight: not initialised yet; run a forward"):
            averaged.update_parameters(model)
        model(torch.randn(2, 3))
        averaged.update_parameters(model)
        change(model)
        averaged.update_parameters(model)
        assert averaged.n_averaged == 2 and type(averaged.module[0]) is nn.Linear
        assert averaged.module[0].weight.dtype == torch.float64
        averaged(torch.randn(2, 3, dtype=torch.float64))
    averaged = AveragedModel(nn.LazyLinear(4), avg_fn=lambda a, b, n: (a + b) / 2)
    averaged.update_parameters(nn.Linear(3, 4))
    assert averaged.module.weight.shape == (4, 3)


def test_lists_of_dtensors(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def make() -> list[list[Tensor]]:
        return [
            [distribute_tensor(torch.full((4,), value), mesh, [Shard(0)])] for value in (1.0, 3.0)
        ]

    for module in (swa_fast, stock):
        averages, sources = make()
        module.get_ema_multi_avg_fn(0.75)(averages, sources, torch.tensor(1))
        assert plain(averages[0]).tolist() == [1.5] * 4


def test_lists_with_wrapped_tensors() -> None:
    for make in (swa_fast.get_swa_multi_avg_fn, lambda: swa_fast.get_ema_multi_avg_fn(0.75)):
        odd = [Wrapped(torch.ones(3)), torch.full((2,), 4)]
        even = [torch.ones(3), torch.full((2,), 4)]
        make()(odd, [Wrapped(torch.full((3,), 3.0)), torch.full((2,), 9)], torch.tensor(1))
        make()(even, [torch.full((3,), 3.0), torch.full((2,), 9)], torch.tensor(1))
        for a, b in zip(odd, even, strict=True):
            assert torch.equal(plain(a), b)
    with pytest.raises(TypeError, match=r"pair 0: torch does not average a Wrapped \(The size"):
        swa_fast.get_swa_multi_avg_fn()([Wrapped(torch.ones(2))], [Wrapped(torch.ones(3))], 1)


@pytest.mark.parametrize("how", ["update", "applied"])
def test_an_exception_before_every_line(how: str) -> None:
    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        model = wrapped()
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        change(model)
        live, average = values(model), values(averaged.module)

        def call() -> None:
            if how == "update":
                averaged.update_parameters(model)
                return
            with averaged.applied(model):
                pass

        def check() -> None:
            now = values(averaged.module)
            moved = {not torch.equal(now[name], average[name]) for name in now}
            assert moved == {bool(averaged.n_averaged == 2)}
            assert all(torch.equal(tensor, live[name]) for name, tensor in values(model).items())
            averaged.update_parameters(model)

        return call, check

    assert at_every_line(make, "_by_torch.py") > 20
