"""Where averages lie, on one device or several, and the swap with the live tensors."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    BACKENDS,
    Net,
    need,
    of_dtype,
    snapshot,
    step,
)
from torch import nn

import swa_fast
from swa_fast import EMA, SWA, Averager

backends = pytest.mark.parametrize("backend, device", BACKENDS)
RULES = {"swa": SWA(), "ema": EMA(0.9), "long": EMA(0.99, warmup="diffusers")}


def test_memory_is_flat_and_aligned_and_each_tensor_has_a_storage_of_its_own() -> None:
    averager = Averager(Net(), RULES, dtype=None)
    views = [v for average in averager.averages.values() for v in average.values() if v.numel()]
    for view in views:
        assert view.data_ptr() % 128 == 0
        assert view.untyped_storage().nbytes() == view.nbytes
    assert len(averager._memory) == len({view.dtype for view in views})
    memory = sum(rows.numel() * rows.element_size() for rows in averager._memory)
    exact = sum(v.numel() * v.element_size() for v in views)
    assert memory <= exact + 128 * len(views)
    averages = averager.averages["ema"]
    assert averages["out.weight"].data_ptr() == averages["embed.weight"].data_ptr()
    Net().load_state_dict(averages)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied(backend: str, device: str, dtype: torch.dtype) -> None:
    need(backend, device)
    model = of_dtype(Net(), dtype).to(device)
    averager = Averager(model, RULES, backend=backend)
    with pytest.raises(RuntimeError, match="'ema' has not been updated yet"):
        averager.applied("ema").__enter__()
    for _ in range(3):
        step(model)
        averager.update()
    live = snapshot(model)
    averages = {k: v.clone() for k, v in averager.averages["ema"].items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.numel()], lr=0.1, momentum=0.9)
    with pytest.raises(KeyError, match="expected one of swa, ema, long, found 'emma'"):
        averager.applied("emma").__enter__()
    with pytest.raises(ArithmeticError), averager.applied("ema"):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name].to(tensor.dtype)), name
        assert model.out.weight is model.embed.weight
        with pytest.raises(RuntimeError, match="'ema' is already applied"):
            averager.applied("swa").__enter__()
        with pytest.raises(RuntimeError, match="the average 'ema' is applied"):
            averager.update()
        with pytest.raises(RuntimeError, match="the average 'ema' is applied"):
            averager.load_state_dict({})
        raise ArithmeticError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name
    for name, tensor in averager.averages["ema"].items():
        assert torch.equal(tensor, averages[name]), name
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert {id(p) for p in model.parameters() if p.numel()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    averager.update()


def test_a_write_while_applied_is_reported() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, {"swa": SWA()})
    averager.update()
    with (
        pytest.raises(RuntimeError, match="an average was written while one was applied"),
        averager.applied("swa"),
    ):
        averager.averages["swa"]["bias"].zero_()
    with averager.applied("swa"):
        pass


def test_the_model_may_be_moved_while_applied() -> None:
    model = Net()
    averager = Averager(model, {"swa": SWA()})
    averager.update()
    step(model)
    live = snapshot(model)
    with averager.applied("swa"):
        model.conv.weight.data = model.conv.weight.data.clone()
        model.conv.to(memory_format=torch.contiguous_format)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name


def test_a_model_that_no_longer_fits_gets_its_weights_back() -> None:
    model = Net()
    averager = Averager(model, {"swa": SWA()})
    averaged = swa_fast.AveragedModel(model)
    for applied in (lambda: averager.applied("swa"), lambda: averaged.applied(model)):
        averager.update()
        averaged.update_parameters(model)
        average = {k: v.clone() for k, v in averager.averages["swa"].items()}
        step(model)
        live = snapshot(model)
        with pytest.raises(ValueError, match="extra: in the model, not in the average"), applied():
            model.extra = nn.Parameter(torch.zeros(2))
            model.frozen = nn.Parameter(torch.ones(4097))
        del model.extra
        for name, tensor in model.state_dict().items():
            if name != "frozen":
                assert torch.equal(tensor, live[name]), name
            torch.testing.assert_close(averager.averages["swa"][name], average[name])
            torch.testing.assert_close(averaged.module.state_dict()[name], average[name])


def test_parameters_over_the_same_memory_are_swapped_once() -> None:
    memory = torch.arange(6.0)
    sources = [memory, memory[:]]
    averager = Averager(sources, {"swa": SWA()})
    averager.update()
    memory.add_(1)
    with averager.applied("swa"):
        assert memory.tolist() == list(range(6))
    assert memory.tolist() == [i + 1 for i in range(6)]
    assert averager.averages["swa"]["0"].tolist() == list(range(6))


@pytest.mark.gpu
def test_model_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(5, 3).to("cuda"), nn.Linear(3, 2))
    averager = Averager(model, RULES)
    averaged = swa_fast.AveragedModel(model)
    history = []
    for _ in range(3):
        step(model)
        averager.update()
        averaged.update_parameters(model)
        history.append({k: v.cpu() for k, v in snapshot(model).items()})
    for name in history[0]:
        mean = torch.stack([h[name] for h in history]).mean(0)
        torch.testing.assert_close(averager.averages["swa"][name].cpu(), mean)
        torch.testing.assert_close(averaged.module.state_dict()[name].cpu(), mean)
    assert averager.averages["swa"]["0.weight"].is_cuda
    assert not averager.averages["swa"]["1.weight"].is_cuda
    model[1].to("cuda")
    with pytest.raises(ValueError, match=r"1\.bias: the average is on cpu, the model on cuda:0"):
        averager.update()
