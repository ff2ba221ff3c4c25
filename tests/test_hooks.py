"""Averages that follow an optimiser's steps, and the partial blend."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BACKENDS, need, unaligned
from torch import Tensor, nn

import swa_fast
from swa_fast import EMA, SWA, AveragedModel, Averager, Power, Window

backends = pytest.mark.parametrize("backend, device", BACKENDS)


def run_scaled(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, infinite: int
) -> list[Tensor]:
    """Steps under a gradient scaler with an infinity in one of them; the weights after each."""
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    seen = []
    for i in range(1, steps + 1):
        optimizer.zero_grad()
        x = torch.randn(4, 3).to(device)
        scaler.scale(model(x).square().mean()).backward()
        if i == infinite:
            first = next(model.parameters())
            assert first.grad is not None
            first.grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        seen.append(next(model.parameters()).detach().clone())
    return seen


@backends
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["Averager", "AveragedModel", "function"])
def test_a_step_that_the_scaler_skipped_leaves_averages_alone(
    backend: str, device: str, fused: bool, kind: str
) -> None:
    need(backend, device)
    model = nn.Linear(3, 5).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)

    def follow(averages: list[Tensor], sources: list[Tensor], n: Tensor) -> None:
        for average, source in zip(averages, sources, strict=True):
            average.lerp_(source, 1 / (int(n) + 1))

    if kind == "AveragedModel":
        averaged = AveragedModel(model, backend=backend)
        averaged.attach(optimizer)
    else:
        rules: dict[str, Any] = {"a": follow if kind == "function" else SWA()}
        averager = Averager(model, rules, backend=backend)
        averager.attach(optimizer)
    seen = run_scaled(model, optimizer, 3, infinite=2)
    assert torch.equal(seen[0], seen[1])
    if kind == "AveragedModel":
        found, n = averaged.module.weight.detach(), int(averaged.n_averaged)
    else:
        found, n = averager.averages["a"]["weight"], averager.n_averaged["a"]
    assert n == 2
    torch.testing.assert_close(found, (seen[0] + seen[2]) / 2)


@backends
@pytest.mark.parametrize("fused", [False, True])
def test_every_and_start_count_steps_that_were_taken(
    backend: str, device: str, fused: bool
) -> None:
    """Alike where the host knows of the skipped step and where only the device does."""
    need(backend, device)
    model = nn.Linear(3, 5).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    averager = Averager(model, {"last": EMA(0.0), "w": Window(2)}, backend=backend)
    attachment = averager.attach(optimizer, every=2, start=1)
    seen = run_scaled(model, optimizer, 9, infinite=4)
    del seen[3]  # steps that were taken: 8, of which 3, 5 and 7 are averaged
    assert averager.n_averaged == {"last": 3, "w": 3}
    assert attachment.steps == 8
    assert torch.equal(averager.averages["last"]["weight"], seen[6])
    torch.testing.assert_close(averager.averages["w"]["weight"], (seen[4] + seen[6]) / 2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()


def test_attachment_ends() -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.Adam(
        [{"params": [model.weight]}, {"params": [model.bias], "lr": 1.0}], lr=0.1
    )
    averager = Averager(model, {"a": SWA()})
    with averager.attach(optimizer) as attachment:
        train(model, optimizer, 3)
        assert averager.n_averaged == {"a": 3}
        # Neither copies nor pickles of the optimiser know of it.
        copy.deepcopy(optimizer).step()
        pickle.loads(pickle.dumps(optimizer)).step()
        assert averager.n_averaged == {"a": 3}
    train(model, optimizer, 1)
    attachment.remove()
    assert averager.n_averaged == {"a": 3}
    with pytest.raises(ZeroDivisionError), averager.attach(optimizer):
        train(model, optimizer, 1)
        raise ZeroDivisionError
    train(model, optimizer, 1)
    assert averager.n_averaged == {"a": 4}


def test_once_a_step_whatever_the_step_does() -> None:
    model = nn.Linear(3, 5)
    averager = Averager(model, {"a": SWA()})
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    averager.attach(optimizer)
    for _ in range(2):
        optimizer.step(closure)
    assert averager.n_averaged == {"a": 2}


def test_attachment_resumes() -> None:
    def run(cut: int | None) -> Tensor:
        torch.manual_seed(3)
        model = nn.Linear(3, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averager = Averager(model, {"a": SWA()})
        attachment = averager.attach(optimizer, every=3, start=2)
        if cut is None:
            train(model, optimizer, 12)
        else:
            train(model, optimizer, cut)
            state = averager.state_dict(), attachment.state_dict()
            attachment.remove()
            averager = Averager(model, {"a": SWA()})
            averager.load_state_dict(state[0])
            averager.attach(optimizer, every=3, start=2).load_state_dict(state[1])
            train(model, optimizer, 12 - cut)
        assert averager.n_averaged == {"a": 3}
        return averager.averages["a"]["weight"]

    expected = run(None)
    for cut in (1, 4, 6):
        assert torch.equal(run(cut), expected)


def test_attachment_resumes_where_the_device_counts() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    averager = Averager([weight], {"a": SWA()})
    attachment = averager.attach(optimizer, every=3)

    def steps(count: int) -> None:
        for _ in range(count):
            weight.grad, optimizer.found_inf = torch.ones(3), torch.zeros(1)
            optimizer.step()

    steps(4)
    state = attachment.state_dict()
    assert state == {"steps": 4} and averager.n_averaged == {"a": 1}
    attachment.load_state_dict({"steps": 2})
    steps(1)
    assert averager.n_averaged == {"a": 2} and attachment.steps == 3
    attachment.remove()
    again = averager.attach(optimizer, every=3)
    again.load_state_dict(state)
    steps(1)
    assert averager.n_averaged == {"a": 2} and again.steps == 5
    steps(1)
    assert averager.n_averaged == {"a": 3}


def test_what_attach_refuses() -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, {"a": SWA()})
    for arguments, error, message in (
        ({"optimizer": model}, TypeError, "expected a torch.optim.Optimizer, found Linear"),
        ({"every": 0}, ValueError, "every: expected an integer of at least 1, found 0"),
        ({"every": 1.5}, ValueError, "every: expected an integer of at least 1, found 1.5"),
        ({"start": -1}, ValueError, "start: expected an integer of at least 0, found -1"),
    ):
        with pytest.raises(error, match=message):
            averager.attach(**{"optimizer": optimizer, **arguments})
    train(model, optimizer, 1)
    assert averager.n_averaged == {"a": 0}
    with pytest.raises(ValueError, match="expected the number of steps, found 'x'"):
        averager.attach(optimizer).load_state_dict({"steps": "x"})
    optimizer.param_groups[0]["train_mode"] = True
    with pytest.raises(ValueError, match="found the schedule-free SGD"):
        averager.attach(optimizer)
    averaged = AveragedModel(nn.Linear(3, 5))
    with pytest.raises(RuntimeError, match="give the model"):
        averaged.attach(optimizer)


def test_wrapped_optimizers_are_looked_into() -> None:
    """accelerate's is an Optimizer that never ran its constructor."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = nn.Linear(3, 5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, {"a": SWA()})
    averager.attach(Wrapper(inner))
    train(model, inner, 2)
    assert averager.n_averaged == {"a": 2}


def test_step_inside_applied_is_refused() -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, {"a": SWA()})
    averager.attach(optimizer)
    train(model, optimizer, 1)
    with averager.applied("a"), pytest.raises(RuntimeError, match="applied"):
        optimizer.step()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_blend(backend: str, device: str, dtype: torch.dtype) -> None:
    need(backend, device)
    named = {
        "a": torch.randn(17, 3), "embed": torch.randn(9), "odd": unaligned(torch.randn(5)),
        "turned": torch.randn(4, 6).t(), "strided": torch.randn(6, 10)[:, ::2],
        "count": torch.tensor(3),
    }  # fmt: skip
    live = {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in named.items()
    }
    averager = Averager(live.items(), {"swa": SWA(), "p": Power(-0.5)}, backend=backend)
    averager.update()
    for tensor in live.values():
        tensor.add_(1)
    before = {name: tensor.clone() for name, tensor in live.items()}
    for g in (0.0, 0.25, 1.0):
        averager.blend_("swa", g, filter=lambda name, _: name != "embed")
        for name, tensor in live.items():
            average = averager.averages["swa"][name]
            if name in ("embed", "count"):
                assert torch.equal(tensor, before[name])
            else:
                wide = before[name].double() * (1 - g) + average.double() * g
                torch.testing.assert_close(tensor.double(), wide, rtol=2 * torch.finfo(
                    dtype).eps, atol=2 * torch.finfo(dtype).eps)  # fmt: skip
                tensor.copy_(before[name])
    averager.blend_("swa", 1.0, filter="embed")
    assert torch.equal(live["embed"], averager.averages["swa"]["embed"].to(dtype))
    assert torch.equal(live["a"], before["a"])


def test_what_blend_refuses() -> None:
    weight = torch.ones(3)
    averager = Averager([("w", weight)], {"a": SWA()})
    with pytest.raises(KeyError, match="expected one of a, found 'b'"):
        averager.blend_("b", 0.5)
    with pytest.raises(RuntimeError, match="has not been updated yet"):
        averager.blend_("a", 0.5)
    averager.update()
    for g in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="g: expected a number in"):
            averager.blend_("a", g)
    with pytest.raises(ValueError, match="filter: expected at least one"):
        averager.blend_("a", 0.5, filter="nothing")
    with averager.applied("a"), pytest.raises(RuntimeError, match="applied"):
        averager.blend_("a", 0.5)


class Injected(BaseException):
    pass


def at_every_line(
    make: Callable[[], tuple[Callable[[], object], Callable[[], None]]], file: str = ""
) -> int:
    """Runs a call once for every line of this package that it executes, with an exception before
    that line. ``make`` returns the call, and what checks the state after it failed, always of the
    same random numbers; ``file`` leaves out the lines of others."""
    # Not torch's, which may lie below a folder of our name.
    package = str(Path(swa_fast.__file__).parent) + os.sep
    at, finished = 0, False
    while not finished:
        # torch.manual_seed formats the stack for devices that are not there.
        torch.default_generator.manual_seed(0)
        call, check = make()
        left = at

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            where = frame.f_code.co_filename
            if not where.startswith(package) or not where.endswith(file):
                return None
            if event == "line":
                left -= 1
                if left == -1:
                    sys.settrace(None)
                    raise Injected
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
            finished = True
        except Injected:
            check()
        finally:
            sys.settrace(before)
        at += 1
    return at


@pytest.mark.parametrize("dense", [True, False])
def test_a_blend_that_fails_is_whole_or_nothing(dense: bool) -> None:
    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        second = torch.randn(4, 6) if dense else torch.randn(4, 6)[:, ::2]
        live = {"a": torch.randn(5), "b": second, "c": torch.randn(2)}
        averager = Averager(live.items(), {"swa": SWA()})
        averager.update()
        average = {name: tensor.clone() for name, tensor in averager.averages["swa"].items()}
        for tensor in live.values():
            tensor.add_(1)
        before = {name: tensor.clone() for name, tensor in live.items()}

        def check() -> None:
            moved = {name: not torch.equal(live[name], before[name]) for name in live}
            assert len(set(moved.values())) == 1, moved
            for name, tensor in averager.averages["swa"].items():
                assert torch.equal(tensor, average[name])

        return lambda: averager.blend_("swa", 0.5), check

    assert at_every_line(make) > 20


def test_a_hook_that_fails_leaves_averages_right() -> None:
    """Fused, with an update due: whole or nothing, counters included."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        weight = nn.Parameter(torch.randn(5))
        optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
        averager = Averager([("w", weight)], {"swa": SWA(), "lawa": Window(2)})
        averager.attach(optimizer)
        for _ in range(3):
            weight.grad = torch.ones(5)
            optimizer.found_inf = torch.zeros(1)
            optimizer.step()
        before = {name: t["w"].clone() for name, t in averager.averages.items()}
        weight.grad = torch.ones(5)

        def check() -> None:
            n = averager.n_averaged["swa"]
            moved = not torch.equal(averager.averages["swa"]["w"], before["swa"])
            assert n == (4 if moved else 3)
            rows = averager.state_dict()["averages"]
            kept = (rows["lawa[0]"]["w"] + rows["lawa[1]"]["w"]) / 2
            torch.testing.assert_close(averager.averages["lawa"]["w"], kept)
            optimizer.found_inf = torch.zeros(1)
            optimizer.step()
            fresh = Averager([("w", weight)], {"swa": SWA(), "lawa": Window(2)})
            fresh.load_state_dict(averager.state_dict())

        return optimizer.step, check

    assert at_every_line(make) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_an_attached_update_is_a_launch_and_no_wait(
    simulator: Any, backend: str, kind: str
) -> None:
    model = nn.Linear(64, 64).to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    if kind == "Averager":
        attachment = Averager(model, {"swa": SWA()}, backend=backend).attach(optimizer)
    else:
        attachment = AveragedModel(model, backend=backend).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = torch.zeros(1, device="cuda")

    def costs() -> dict[str, int]:
        for _ in range(2):
            optimizer.found_inf = found
            optimizer.step()
        torch.cuda.synchronize()
        simulator.reset()
        optimizer.step()
        return {k: v for k, v in simulator.counters()["total"].items() if v}

    attached = costs()
    attachment.remove()
    alone = costs()
    assert attached.get("host_syncs", 0) == alone.get("host_syncs", 0) == 0
    assert attached.pop("kernel_launches") == alone.pop("kernel_launches", 0) + 1
    assert attached == alone


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_steps_update_at_every_replay(backend: str) -> None:
    weight = torch.zeros(40, device="cuda", requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    averager = Averager([weight], {"last": EMA(0.0)}, backend=backend)
    attachment = averager.attach(optimizer, every=2)
    weight.grad = torch.full_like(weight, -1.0)
    found = torch.zeros(1, device="cuda")
    optimizer.found_inf = found
    for _ in range(2):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for n in range(3, 8):
        found.fill_(float(n == 5))  # which is then neither a step nor counted
        graph.replay()
    steps = 6
    assert float(weight.detach()[0]) == steps
    assert attachment.steps == steps
    assert averager.n_averaged == {"last": 3}
    assert float(averager.averages["last"]["0"][0]) == steps
    attachment.load_state_dict({"steps": 1})
    found.zero_()
    graph.replay()
    assert attachment.steps == 2 and averager.n_averaged == {"last": 4}


def test_averager_saves_windows_as_plain_tensors() -> None:
    weight = torch.randn(3)
    averager = Averager([weight], {"w": Window(2)})
    averager.update()
    file = io.BytesIO()
    torch.save(averager.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state["averages"]) == {"w", "w[0]", "w[1]"} and state["n_averaged"] == {"w": 1}
