"""An average in the model's place by pointer: what it shows, what it refuses, and back to the bit.

What holds for both ways of putting an average in place is in test_applied.py.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Net, snapshot, step
from test_applied import Expanded, Interleaved, Pair, Sliced
from test_hooks import Injected
from torch import Tensor, nn

from swa_fast import EMA, SWA, AveragedModel, Averager, ByName, Window, sharding


def net(dtype: torch.dtype = torch.float32) -> Net:
    model = Net()
    # With gaps it could not be set to the memory of its average.
    model.strided = nn.Parameter(model.strided.detach().clone())
    return model.to(dtype) if dtype != torch.float32 else model


def make() -> tuple[nn.Sequential, Averager]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averager = Averager(model, {"s": SWA(), "e": EMA(0.5)})
    for _ in range(2):
        step(model)
        averager.update()
    step(model)
    return model, averager


def test_who_sees_what() -> None:
    model, averager = make()
    live, weight = snapshot(model), model[0].weight
    taken, own = averager.averages["e"]["0.weight"], weight.detach()
    mean, address, version = taken.clone(), weight.data_ptr(), taken._version
    with averager.applied("e", by="pointer"):
        assert model[0].weight is weight
        assert weight.data_ptr() == taken.data_ptr()
        assert taken.data_ptr() == averager.averages["e"]["0.weight"].data_ptr()
        assert torch.equal(weight, mean) and torch.equal(taken, mean)
        assert torch.equal(own, live["0.weight"])
        inside = weight.detach()
        with torch.no_grad():
            weight.add_(1)  # is a write to the average, by whichever name
        assert taken._version == version
        taken.add_(1)
        own.mul_(2)  # and this one to the live weights
    assert weight.data_ptr() == address
    assert taken._version > version + 1
    assert torch.equal(weight, 2 * live["0.weight"])
    for tensor in (taken, inside, averager.averages["e"]["0.weight"]):
        assert torch.equal(tensor, mean + 1 + 1)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_updates_go_on_without_another_table(
    kind: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = net()
    average: Any
    rules = {"s": SWA(), "w": Window(2), "n": ByName({"bn": EMA(0.5)}, default=SWA())}
    if kind == "Averager":
        average = Averager(model, rules, backend=backend)
        update, names = average.update, list(rules)
        _ = average.averages  # which are watched from now on
    else:
        average = AveragedModel(model, backend=backend)
        update, names = lambda: average.update_parameters(model), [model]
    update()
    plans: list[Any] = []
    plan = type(average._storage.parts[0].engine).plan
    monkeypatch.setattr("swa_fast.engine.Engine.plan", lambda *a: plans.append(a) or plan(*a))
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        step(model)
        for name in names:
            with average.applied(name, by="pointer"):
                assert model.embed.weight is model.out.weight
                assert model.scalar.data_ptr() != places["scalar"]
        update()
    assert not plans
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_every_bit_as_without_a_block() -> None:
    results = []
    for block in (False, True):
        torch.manual_seed(0)
        model = net()
        averager = Averager(model, {"s": SWA(), "e": EMA(0.75, warmup="timm")})
        for _ in range(3):
            step(model)
            averager.update()
            if block:
                for name in ("s", "e"):
                    with averager.applied(name, by="pointer"):
                        for key, tensor in model.state_dict().items():
                            assert torch.equal(tensor, averager.averages[name][key]), key
        results.append({**snapshot(model), **averager.averages["s"], **{
            f"e.{name}": tensor for name, tensor in averager.averages["e"].items()
        }})  # fmt: skip
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def quarter(model: nn.Module) -> nn.Module:
    """Parameters that follow one another in one block of memory, as flattening optimisers do."""
    flat = torch.cat([p.detach().view(-1) for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return model


class Tied(nn.Module):
    """Two parameters with one memory, of which a filter chooses the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3))
        self.second = nn.Parameter(self.first.data)


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("mask", torch.eye(3).to_sparse())


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Linear(2, 2).bfloat16(), {}, "weight: torch.float32 on cpu in the average, "
         "torch.bfloat16"),
        (lambda: nn.Linear(2, 2), {"dtype": torch.float64}, "weight: torch.float64 on cpu in"),
        (Expanded, {}, "mask: it shares memory with others, or with itself"),
        (Sliced, {}, "part: it shares memory"),
        (Interleaved, {}, "right: it shares memory"),
        (lambda: quarter(nn.Linear(2, 2)), {}, "bias: it is a part of a storage of 24 bytes"),
        (Tied, {}, "second: it shares memory"),
        (Tied, {"filter": "first"}, "second: it is not averaged and shares memory with what is"),
        (Net, {}, r"strided: strides \(5, 1\) in the average, \(10, 2\) in the model"),
        (Loose, {}, "1 sparse, quantised or nested"),
        (lambda: nn.Linear(2, 2).share_memory(), {}, "bias: it is in shared memory"),
        (inferred, {}, "weight: it was made in inference mode"),
        (lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(4))).half(), {}, "and 3 more"),
    ],
)  # fmt: skip
def test_refused_by_name(
    model: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    module = model()
    averager = Averager(module, {"s": SWA()}, **options)
    averager.update()
    live = {n: p.detach().clone() for n, p in module.named_parameters()}
    places = {n: p.data_ptr() for n, p in module.named_parameters()}
    for _ in range(2):
        with pytest.raises(ValueError, match=message), averager.applied("s", by="pointer"):
            pass
    assert {n: p.data_ptr() for n, p in module.named_parameters()} == places
    assert all(torch.equal(p, live[n]) for n, p in module.named_parameters())
    averager.update()
    with averager.applied("s"):
        pass


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, averager = make()
    with pytest.raises(ValueError, match="by: expected 'value' or 'pointer', found 'name'"):
        averager.applied("e", by="name")
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    with pytest.raises(ValueError, match="by: expected 'value' or 'pointer', found None"):
        averaged.applied(model, by=None)  # type: ignore[arg-type]
    pieces = Averager(sharding.Front([("w", torch.ones(3))], lambda: None), {"s": SWA()})
    pieces.update()
    with pytest.raises(TypeError, match="expected whole parameters, found sharded ones"), \
            pieces.applied("s", by="pointer"):  # fmt: skip
        pass
    monkeypatch.setattr(averaged, "_odd", "weight is a Float8Tensor")
    with pytest.raises(TypeError, match="expected plain tensors, found that weight is a Float8"):
        averaged.applied(model, by="pointer")
    # What is left out moves into an averaged tensor's memory after the first time.
    tied = Tied()
    tied.second.data = torch.zeros(3)
    averager = Averager(tied, {"s": SWA()}, filter="first")
    averager.update()
    with averager.applied("s", by="pointer"):
        pass
    tied.second.data = tied.first.data
    with pytest.raises(ValueError, match="second: it is not averaged"), \
            averager.applied("s", by="pointer"):  # fmt: skip
        pass


@pytest.mark.parametrize("kind", ["Averager by pointer", "AveragedModel by pointer"])
def test_no_backward_across_the_border(kind: str) -> None:
    """A graph refers to a parameter, whose memory is another one behind the border."""
    pair = Pair(kind)
    weight = pair.model[0].weight
    outside = weight.square().sum()
    with pair.applied():
        inside, whole = weight.square().sum(), weight.square().sum()
        whole.backward()
        torch.testing.assert_close(weight.grad, 2 * pair.means["0.weight"])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outside.backward()
    for graph in (inside, outside):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()
    pair.check()


def exchanged(model: nn.Sequential) -> None:
    first, second = model[1].weight, model[1].bias
    first.data, second.data = second.data, first.data


def replaced(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.data)


def turned(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.t()


def cut(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data[1:]


def sparse(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())


@pytest.mark.parametrize("change", [exchanged, replaced, turned, cut, sparse])
@pytest.mark.parametrize("kind", ["Averager by pointer", "AveragedModel by pointer"])
def test_pointers_that_are_changed_inside(
    kind: str, change: Callable[[nn.Sequential], None]
) -> None:
    """Nothing is ever written to the average's memory, wherever in it a tensor lies by then."""
    pair = Pair(kind)
    before = pair.model[0].weight
    try:
        with pair.applied():
            change(pair.model)
    except (RuntimeError, TypeError, ValueError):
        assert change in (sparse, turned, cut)  # which do not fit the average
    assert torch.equal(before, pair.live["0.weight"])
    if change is sparse:
        pair.model[0].weight = before
    pair.check()
    pair.update()


def test_buffers_that_are_renewed_inside_are_the_averages() -> None:
    model, averager = make()
    live = snapshot(model)
    with averager.applied("e", by="pointer"):
        model[1].running_mean = torch.full((4,), 7.0)
        model[0].weight.data = model[0].weight.data + 1  # what is averaged is not for the block
        mean = averager.averages["e"]["0.weight"].clone()
    assert torch.equal(averager.averages["e"]["1.running_mean"], torch.full((4,), 7.0))
    assert torch.equal(averager.averages["e"]["0.weight"], mean)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name


@pytest.mark.parametrize("moved", [False, True])
def test_an_interrupt_between_any_two_instructions(moved: bool) -> None:
    """Python looks for signals between bytecodes, within a line, too."""
    ours = ("_put_in", "_take_out", "_back_to_what_moved")
    at, finished = 0, False
    while not finished:
        pair = Pair("Averager by pointer")
        _ = pair.average.averages  # whose first use alone needs another table
        with pair.applied():
            pass
        left = at

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_name not in ours:
                return trace
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == -1:
                    sys.settrace(None)
                    raise Injected
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with pair.applied():
                if moved:
                    pair.model[0].weight.data = pair.model[0].weight.data.clone()
                    pair.means["1.running_mean"] = torch.full((4,), 7.0)
                    pair.model[1].running_mean = torch.full((4,), 7.0)
            finished = True
        except Injected:
            pass
        finally:
            sys.settrace(before)
        pair.check()
        at += 1
    assert at > 200


def test_files_and_copies_do_not_take_both_for_one() -> None:
    model, averager = make()
    file = io.BytesIO()
    with averager.applied("e", by="pointer"):
        held = {"model": model.state_dict(), "average": averager.averages["e"]}
        torch.save(held, file)
        copied = copy.deepcopy(held)
    file.seek(0)
    for found in (copied, torch.load(file, weights_only=True)):
        mine, other = found["model"]["1.running_mean"], found["average"]["1.running_mean"]
        assert torch.equal(mine, other)
        assert mine.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("outer", ["value", "pointer"])
@pytest.mark.parametrize("inner", ["value", "pointer"])
def test_two_averagers_of_one_model(outer: str, inner: str) -> None:
    model, first = make()
    second = Averager(model, {"s": SWA()})
    second.update()
    step(model)
    live = snapshot(model)
    means = [{k: t.clone() for k, t in a.averages[n].items()} for a, n in ((first, "e"),
             (second, "s"))]  # fmt: skip
    with first.applied("e", by=outer):
        with second.applied("s", by=inner):
            assert torch.equal(model[0].weight, means[1]["0.weight"])
        assert torch.equal(model[0].weight, means[0]["0.weight"])
    for averager, name, mean in ((first, "e", means[0]), (second, "s", means[1])):
        for key, tensor in averager.averages[name].items():
            assert torch.equal(tensor, mean[key]), key
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[key]), key
    second.update()
    assert torch.equal(second.averages["s"]["1.num_batches_tracked"], model[1].num_batches_tracked)


@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_averages_that_moved_since(kind: str) -> None:
    pair = Pair(f"{kind} by pointer")
    own: dict[str, Tensor] = (
        dict(pair.average.module.named_parameters()) if pair.averaged
        else pair.average.averages["e"]
    )  # fmt: skip
    own["0.weight"].data = own["0.weight"].detach() + 1
    pair.means["0.weight"] += 1
    with pair.applied():
        pair.check_inside()
        assert pair.model[0].weight.data_ptr() == own["0.weight"].data_ptr()
    pair.check()


def test_what_was_kept_of_a_block_may_be_moved() -> None:
    model, averager = make()
    _ = averager.averages  # whose first use alone needs another table
    with averager.applied("e", by="pointer"):
        kept = model.state_dict()
    for tensor in kept.values():
        tensor.share_memory_()
    averager.update()
    mean = averager.averages["e"]["0.weight"].clone()
    with averager.applied("e", by="pointer"):
        assert torch.equal(model[0].weight, mean)
    assert not torch.equal(kept["0.weight"], mean)


def test_in_inference_mode() -> None:
    model, averager = make()
    live, place = snapshot(model), model[0].weight.data_ptr()
    with torch.inference_mode():
        for _ in range(2):
            with averager.applied("e", by="pointer"):
                assert torch.equal(model[0].weight, averager.averages["e"]["0.weight"])
    assert model[0].weight.data_ptr() == place
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]) and not tensor.is_inference(), name
    with averager.applied("e", by="pointer"):
        model(torch.randn(5, 3)).sum().backward()
    averager.update()


def test_nothing_is_compiled_again() -> None:
    model, averager = make()
    model.eval()
    compiled: list[Any] = []
    runs = torch.compile(model, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    inputs = torch.randn(5, 3)
    runs(inputs)
    with averager.applied("e", by="pointer"):
        torch.testing.assert_close(runs(inputs), averager.module("e")(inputs))
    runs(inputs)
    assert len(compiled) == 1


@pytest.mark.gpu
def test_nothing_is_asked_of_a_gpu(simulator: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("cuda")
    pair = Pair("Averager by pointer", model)
    with pair.applied():
        pair.check_inside()
    pair.update()
    pair.live, pair.means = snapshot(model), pair.now()
    with pair.applied():
        pass
    torch.cuda.synchronize()
    simulator.reset()
    with pair.applied():
        pass
    counted = simulator.counters()
    assert not any(counted["total"].values()), counted["total"]
    assert not counted["kernels"]
    pair.check()


@pytest.mark.gpu
def test_refused_while_a_graph_is_captured() -> None:
    model = nn.Linear(2, 2).to("cuda")
    averager = Averager(model, {"s": SWA()})
    averager.update()
    place = model.weight.data_ptr()
    with averager.applied("s", by="pointer"):
        pass
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        averager.update()
        with (
            pytest.raises(RuntimeError, match="during the capture of a CUDA graph"),
            averager.applied("s", by="pointer"),
        ):
            pass
    assert model.weight.data_ptr() == place
    averager.update()


@pytest.mark.gpu
def test_averages_beside_a_model_on_a_gpu_are_refused() -> None:
    model = nn.Linear(2, 2).to("cuda")
    averager = Averager(model, {"s": SWA()}, device="cpu")
    averager.update()
    with (
        pytest.raises(ValueError, match=r"weight: torch\.float32 on cpu"),
        averager.applied("s", by="pointer"),
    ):
        pass
