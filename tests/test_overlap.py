"""Averages on the CPU that are brought up to date while the training goes on."""

from __future__ import annotations

import concurrent.futures
import copy
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast import EMA, SWA, Averager, Power, Window, _overlap
from swa_fast._overlap import Overlap

RULES: dict[str, Any] = {"swa": SWA(), "ema": EMA(0.9), "power": Power(2.0), "window": Window(2)}


class Event:
    def __init__(self) -> None:
        self.copies: list[Callable[[], object]] = []
        self.done = threading.Event()


class Late:
    """A device whose side stream copies as late as it may: when the present stream is held, or when
    the test opens it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open = threading.Event()
        self.log: list[str] = []
        self._copies: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def capturing(self) -> bool:
        return False

    def fork(self) -> None:
        self.log.append("fork")

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.log.append("copy")
        self._copies.append(lambda: target.copy_(source))

    def mark(self) -> Event:
        self.log.append("mark")
        event = Event()
        event.copies, self._copies = self._copies, []
        return event

    def _run(self, event: Event) -> None:
        with self._lock, torch.no_grad():
            for step in event.copies:
                step()
            event.copies = []
            event.done.set()

    def hold(self, event: Event) -> None:
        self.log.append("hold")
        self._run(event)

    def wait(self, event: Event) -> None:
        while not event.done.wait(0.005):
            if self.open.is_set():
                self._run(event)

    def memory(self, size: int, owner: object) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """The devices that were asked. Tensors of the CPU are taken for ones of such a device."""
    made: list[Late] = []

    def make(device: torch.device) -> Late:
        made.append(Late(device))
        return made[-1]

    original = Overlap.__init__
    monkeypatch.setattr(Overlap, "__init__", lambda self, storage: original(self, storage, make))
    monkeypatch.setattr(Overlap, "pays", lambda self: True)
    monkeypatch.setattr(_overlap, "SMALL", 8)
    return made


def make_model() -> nn.Module:
    """With buffers, which a forward changes; tensors that are copied by themselves and together;
    weights that are not contiguous, and a tied one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(5), nn.Flatten(1),
        nn.Linear(5 * 16, 7), nn.Linear(7, 7), nn.Linear(7, 7),
    )  # fmt: skip
    model[5].weight = model[4].weight
    model[4].bias = nn.Parameter(torch.randn(14)[::2])
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, between: Callable[[], object]
) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=generator).to(next(model.parameters()).device)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        between()


def trained(
    overlap: bool, steps: int = 5, device: str = "cpu", every: int = 1, **options: Any
) -> tuple[Averager, dict[str, int]]:
    model = make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    averager = Averager(model, RULES, device="cpu", overlap=overlap, **options)
    handle = averager.attach(optimizer, every=every)
    train(model, optimizer, steps, lambda: None)
    if overlap and averager._storage.overlap is not None:
        for streams in averager._storage.overlap._streams.values():
            if isinstance(streams, Late):
                streams.open.set()
    averager.flush()
    return averager, handle.state_dict()


def expect_same(found: Averager, expected: Averager) -> None:
    assert found.n_averaged == expected.n_averaged
    for name, tensors in expected.averages.items():
        for key, value in tensors.items():
            assert torch.equal(found.averages[name][key], value), (name, key)


@pytest.mark.parametrize(
    "options",
    [{}, {"every": 2}, {"buffers": "average"}, {"buffers": "skip"}, {"on_nonfinite": "skip"},
     {"dtype": torch.bfloat16, "rounding": "stochastic"}, {"backend": "reference"}],
)  # fmt: skip
def test_same_as_waiting(late: list[Late], options: dict[str, Any]) -> None:
    """Although the copies are made as late as they may: after a forward that changed the buffers,
    and just before the step that changes the weights."""
    if "rounding" in options:
        options = {**options}
    rules = {"swa": SWA(), "ema": EMA(0.9)} if "rounding" in options else RULES
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "RULES", {"ema": rules["ema"]} if "rounding" in options else rules)
        found, steps = trained(True, **options)
        expected, others = trained(False, **options)
    expect_same(found, expected)
    assert steps == others
    (device,) = late
    taken = device.log.count("mark")
    assert taken == (2 if "every" in options else 5)
    # Each set of copies begins behind the step, and the next step is held for it.
    kinds = "".join(word[0] for word in device.log)
    assert kinds.startswith("fc") and "mf" not in kinds


def test_readers_wait(late: list[Late]) -> None:
    for read in (
        lambda a: a.averages["swa"], lambda a: a.state_dict(), lambda a: a.n_averaged,
        lambda a: copy.deepcopy(a), lambda a: a.applied("swa").__enter__(),
        lambda a: a.blend_("swa", 0.5), lambda a: a.to(dtype=torch.float64),
        lambda a: a.add("another", SWA()), lambda a: a.load_state_dict(a.state_dict()),
        lambda a: a.update(), lambda a: a.full_averages("swa"),
    ):  # fmt: skip
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        averager = Averager(model, {"swa": SWA()}, device="cpu", overlap=True)
        averager.attach(optimizer)
        train(model, optimizer, 2, lambda: None)
        assert averager._storage.parts[0].engine.n_averaged.tolist() != [2]
        late[-1].open.set()
        storage = averager._storage
        read(averager)
        assert storage.parts[0].engine.n_averaged.tolist()[0] >= 2


def test_steps_that_nobody_announces(late: list[Late]) -> None:
    """A second optimiser writes to weights that are still to be copied."""
    model = make_model()
    first = torch.optim.SGD(model[0].parameters(), 0.3)  # type: ignore[index]
    second = torch.optim.SGD(model[3].parameters(), 0.3)  # type: ignore[index]
    averager = Averager(model, {"swa": SWA()}, device="cpu", overlap=True)
    averager.attach(first)
    train(model, first, 1, lambda: None)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    second.step()
    late[-1].open.set()
    with pytest.raises(RuntimeError, match="weights were written while they were being copied"):
        first.step()
    averager.flush()
    assert averager.n_averaged == {"swa": 1}
    # Said once; both announced, all is well.
    averager.attach(second).remove()
    first.step()
    averager.flush()


def test_an_update_that_fails(late: list[Late], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    averager = Averager(model, {"swa": SWA()}, device="cpu", overlap=True)
    averager.attach(optimizer)
    train(model, optimizer, 1, lambda: None)
    late[-1].open.set()
    averager.flush()
    kept = copy.deepcopy(dict(averager.averages["swa"]))
    storage = averager._storage
    with monkeypatch.context() as patch:
        patch.setattr(storage, "update_by", lambda *_: (_ for _ in ()).throw(OSError("no disk")))
        train(model, optimizer, 1, lambda: None)
        with pytest.raises(OSError, match="no disk"):
            averager.flush()
    for key, value in averager.averages["swa"].items():
        assert torch.equal(value, kept[key])
    train(model, optimizer, 1, lambda: None)
    averager.flush()
    assert averager.n_averaged == {"swa": 2}


@pytest.mark.parametrize("file", ["_overlap.py", "hooks.py"])
def test_an_exception_before_every_line(late: list[Late], file: str) -> None:
    """Of a step while the copies of the last one are on their way: they arrive, this one's update
    takes place or does not, and the next one's does."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        averager = Averager(model, {"last": EMA(0.0)}, device="cpu", overlap=True)
        averager.attach(optimizer)
        train(model, optimizer, 1, lambda: None)
        streams = late[-1]
        model(torch.ones(4, 3, 6, 6)).sum().backward()
        first = {name: p.detach().clone() for name, p in model.named_parameters()}

        def check() -> None:
            streams.open.set()
            averager.flush()
            count = averager.n_averaged["last"]
            assert count in (1, 2)
            weights = first if count == 1 else dict(model.named_parameters())
            for name, value in weights.items():
                assert torch.equal(averager.averages["last"][name], value), name
            optimizer.step()
            averager.flush()
            assert averager.n_averaged["last"] == count + 1
            for name, value in model.named_parameters():
                assert torch.equal(averager.averages["last"][name], value), name

        return optimizer.step, check

    assert at_every_line(make, file) > 10


def test_steps_that_a_scaler_skips(late: list[Late]) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, fused=True)
    averager = Averager(model, {"swa": SWA()}, device="cpu", overlap=True)
    handle = averager.attach(optimizer, every=2)
    for skipped in (0.0, 1.0, 0.0, 0.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(skipped)  # type: ignore[attr-defined]
        train(model, optimizer, 1, lambda: None)
    late[-1].open.set()
    assert averager.n_averaged == {"swa": 2} and handle.steps == 4


def test_tensors_that_move(late: list[Late]) -> None:
    model, other = make_model(), make_model()
    results = []
    for overlap, network in ((True, model), (False, other)):
        optimizer = torch.optim.SGD(network.parameters(), 0.3)
        averager = Averager(network, {"ema": EMA(0.5)}, device="cpu", overlap=overlap)
        averager.attach(optimizer)
        train(network, optimizer, 2, lambda: None)
        if overlap:
            late[-1].open.set()
        network[3].weight.data = network[3].weight.data.clone()  # type: ignore[index]
        train(network, optimizer, 2, lambda: None)
        results.append(averager)
    expect_same(*results)


def test_a_process_that_forks(late: list[Late], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    averager = Averager(model, {"swa": SWA()}, device="cpu", overlap=True)
    averager.attach(optimizer)
    train(model, optimizer, 1, lambda: None)
    late[-1].open.set()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    averager.flush()  # does not wait for a thread that is not here
    with pytest.raises(RuntimeError, match="forked"):
        train(model, optimizer, 1, lambda: None)


def test_a_model_on_the_cpu_has_nothing_to_overlap() -> None:
    expect_same(trained(True)[0], trained(False)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": None}, "expected device='cpu' beside it, found None"),
        ({"averages": {"a": lambda *_: None}}, "expected no function"),
        ({"averages": {"a": EMA(lambda n: 0.5)}}, "expected no function"),
        ({"on_nonfinite": "raise"}, "on_nonfinite=None or 'skip'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    arguments = {"averages": {"swa": SWA()}, "device": "cpu", **options}
    with pytest.raises(ValueError, match=message):
        Averager(nn.Linear(2, 2), overlap=True, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"buffers": "average"}])
def test_same_as_waiting_on_a_gpu(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_overlap, "SMALL", 8)
    found, steps = trained(True, device="cuda", **options)
    expected, others = trained(False, device="cuda", **options)
    expect_same(found, expected)
    assert steps == others
    overlap = found._storage.overlap
    assert overlap is not None and overlap._rounds
    with pytest.raises(ValueError, match="because of overlap"):
        found.to("cuda")


@pytest.mark.gpu
def test_a_step_waits_for_nothing(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the thread, which waits by itself."""
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 300)).to("cuda")
    monkeypatch.setattr(_overlap, "SMALL", 4096)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    averager = Averager(model, {"swa": SWA()}, device="cpu", overlap=True)
    attachment = averager.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    averager.flush()
    overlap = averager._storage.overlap
    assert overlap is not None and overlap._thread is not None
    overlap._thread.shutdown()

    class Nobody:
        def submit(self, *_: object) -> concurrent.futures.Future[None]:
            done: concurrent.futures.Future[None] = concurrent.futures.Future()
            done.set_result(None)
            return done

    monkeypatch.setattr(overlap, "_thread", Nobody())

    def costs() -> dict[str, int]:
        torch.cuda.synchronize()
        simulator.reset()
        optimizer.step()
        return {k: v for k, v in simulator.counters()["total"].items() if v}

    attached = costs()
    attachment.remove()
    alone = costs()
    assert attached.get("host_syncs", 0) == alone.get("host_syncs", 0) == 0
    # The small ones and the buffers are put together by one launch, and are one copy; the two
    # matrices come straight from where they are.
    assert attached.pop("kernel_launches") == alone.pop("kernel_launches", 0) + 1
    assert attached.pop("memcpy") == attached.pop("memcpy_DtoH") == 3
    moved = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert attached.pop("memcpy_DtoH_bytes") == pytest.approx(moved, rel=0.01)
    attached.pop("event_records")
    assert attached == alone
