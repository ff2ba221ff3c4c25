"""Updates that are one call of the compiled library: the same as by the operator, which is called
wherever somebody would see it."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Calls, need, snapshot, step
from helpers import Net as Odd
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import swa_fast
from swa_fast import EMA, SWA, AveragedModel, Averager, ByName, Power, Window, _backends


@pytest.fixture(autouse=True)
def library() -> Any:
    need("cpu", "cpu")
    return _backends.cpu_library()


class Net(Odd):
    """Without the tensor that an update copies first; with one of a single element."""

    def __init__(self) -> None:
        super().__init__()
        del self.strided
        self.head = nn.Linear(1, 3)


def storage_of(average: Averager | AveragedModel) -> Any:
    storage = average._storage
    assert storage is not None
    return storage


def counting(average: Averager | AveragedModel) -> list[bool]:
    """What the compiled update returns from now on."""
    storage, answers = storage_of(average), list[bool]()
    update = storage.update_at_once
    storage.update_at_once = lambda s: (answers.append(update(s)), answers[-1])[1]
    return answers


def state(average: Averager | AveragedModel) -> dict[str, Tensor]:
    if isinstance(average, AveragedModel):
        return snapshot(average)
    return {
        **{f"{a}.{k}": v.clone() for a, row in average.averages.items() for k, v in row.items()},
        **{f"n {name}": torch.tensor(n) for name, n in average.n_averaged.items()},
        "skipped": torch.tensor(average.skipped_updates),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def updated(average: Any, model: nn.Module) -> None:
    average.update_parameters(model) if isinstance(average, AveragedModel) else average.update()


FOUR = {"swa": SWA(), "ema": EMA(0.9), "warm": EMA(0.99, warmup="diffusers"), "power": Power(7.0)}
KINDS: dict[str, Callable[[nn.Module], Averager | AveragedModel]] = {
    "several rules": lambda m: Averager(m, FOUR),
    "buffers": lambda m: Averager(m, {"a": EMA(0.9), "b": EMA(0.5)}, buffers="average"),
    "stochastic": lambda m: Averager(
        m, {"ema": EMA(0.9)}, dtype=torch.bfloat16, rounding="stochastic", seed=-3
    ),
    "float64": lambda m: Averager(m, {"swa": SWA()}, dtype=torch.float64),
    "skip": lambda m: Averager(m, {"swa": SWA()}, on_nonfinite="skip"),
    "raise": lambda m: Averager(m, {"swa": SWA()}, on_nonfinite="raise"),
    "every second": lambda m: Averager(m, {"swa": SWA()}, update_every=2, start=1),
    "scheduled": lambda m: Averager(m, {"ema": EMA(lambda n: 0.9 if n > 1 else 0.5)}),
    "AveragedModel": lambda m: AveragedModel(m, rule=EMA(0.9)),
    "AveragedModel, buffers": lambda m: AveragedModel(m, use_buffers=True),
    "AveragedModel of a function": lambda m: AveragedModel(
        m, multi_avg_fn=swa_fast.get_ema_multi_avg_fn(0.9), dtype=torch.float64
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_by_the_operator(kind: str) -> None:
    """Averages, counters and what is skipped, to the last bit."""
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    average, listened = KINDS[kind](model), KINDS[kind](twin)
    answers = counting(average) if isinstance(average, Averager) else []
    for number in range(8):
        for each in (model, twin):
            torch.manual_seed(number)
            step(each)
            if kind == "skip" and number == 3:
                each.head.weight.data[0] = torch.inf
        with Calls() as calls:
            updated(listened, twin)
        assert set(calls.names) <= {"swa_fast.update_.cpu"}
        updated(average, model)
        if number == 0 and isinstance(average, AveragedModel):
            answers = counting(average)
    if kind == "skip":
        assert isinstance(average, Averager) and average.skipped_updates == 5
    assert same(state(average), state(listened))
    # Not the first, which binds.
    assert answers[-3:] == [True] * 3


def storage_of_model(averager: Any) -> nn.Module:
    """The model that an averager's copy has brought along."""
    module = averager._selection.module
    assert isinstance(module, nn.Module)
    return module


@pytest.mark.filterwarnings("ignore::Warning")
def test_a_listener_sees_the_operator() -> None:
    model = Net()
    averager = Averager(model, {"ema": EMA(0.9)})
    averager.update()
    answers = counting(averager)

    names: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Calls() as calls:
        averager.update()
    assert calls.names == ["swa_fast.update_.cpu"]
    with Functions():
        averager.update()
    assert any("update_" in name for name in names)
    with torch.profiler.profile() as profile:
        averager.update()
    assert "swa_fast::update_" in {event.key for event in profile.key_averages()}
    with torch.autograd.profiler.emit_itt():
        averager.update()

    def traced(x: Tensor) -> Tensor:
        averager.update()
        return x + 1

    torch.jit.trace(traced, torch.zeros(2), check_trace=False)
    torch.func.vmap(traced)(torch.zeros(2))
    assert answers and True not in answers
    averager.update()
    assert answers[-1]
    assert averager.n_averaged == {"ema": 8}


def test_what_needs_more_than_one_launch() -> None:
    """Windows, functions, rules by name, tensors with gaps, another backend and given sources."""
    model, gaps = Net(), Net()
    gaps.frozen = nn.Parameter(torch.randn(6, 10)[:, ::2])
    averages: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = [
        (model, {"w": Window(2)}, {}),
        (model, {"f": lambda averages, sources, n: None}, {}),
        (model, {"by": ByName({"conv": SWA()}, EMA(0.5))}, {}),
        (gaps, {"s": SWA()}, {}),
        (model, {"s": SWA()}, {"backend": "reference"}),
    ]
    for module, rules, settings in averages:
        averager = Averager(module, rules, **settings)
        averager.update()
        assert storage_of(averager).at_once is None
        averager.update()
        assert set(averager.n_averaged.values()) <= {2, 3}
    averager = Averager(model, {"ema": EMA(0.9)})
    averager.update()
    answers = counting(averager)
    averager.update(source=Net())
    assert answers == []
    # A decay for one update is one of the rules' own in it.
    averager.update(decay=1.0)
    before = averager.averages["ema"]["conv.weight"].clone()
    with torch.no_grad():
        model.conv.weight.add_(1)
    averager.update(decay=1.0)
    assert torch.equal(averager.averages["ema"]["conv.weight"], before)
    averager.update()
    assert not torch.equal(averager.averages["ema"]["conv.weight"], before)
    assert averager.n_averaged == {"ema": 5}


def test_an_applied_average_is_not_updated() -> None:
    model = Net()
    averager = Averager(model, {"ema": EMA(0.9)})
    averager.update()
    storage = storage_of(averager)
    with averager.applied("ema"):
        assert storage.at_once is not None
        assert storage.update_at_once(storage) is False
        with pytest.raises(RuntimeError, match="is applied"):
            averager.update()
    assert storage.update_at_once(storage) is True
    assert averager.n_averaged == {"ema": 2}


CHANGES: dict[str, Callable[[Averager | AveragedModel, Any], object]] = {
    "live data": lambda a, m: setattr(m.head.weight, "data", m.head.weight.data.clone()),
    "live parameter": lambda a, m: setattr(m.head, "bias", nn.Parameter(torch.ones(3))),
    "live half": lambda a, m: m.bfloat16(),
    "averages": lambda a, m: [
        t.share_memory_() for t in (
            a.module.parameters() if isinstance(a, AveragedModel)
            else next(iter(a.averages.values())).values()
        )
    ],
    "counters": lambda a, m: [
        t.share_memory_() for e in storage_of(a).parts
        for t in (e.engine.n_averaged, e.engine.counters) if t is not None
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["several rules", "AveragedModel"])
def test_changes_are_noticed(kind: str, change: str) -> None:
    """Counters are moved where an averager is sent to another process."""
    torch.manual_seed(0)
    model = Net()
    average = KINDS[kind](model)
    updated(average, model)
    expected = copy.deepcopy(average)
    twin = model if isinstance(average, AveragedModel) else storage_of_model(expected)
    updated(average, model)
    updated(expected, twin)
    step(model)
    if twin is not model:
        twin.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    CHANGES[change](average, model)
    if twin is not model and change.startswith("live"):
        CHANGES[change](expected, twin)
    answers = counting(average)
    updated(average, model)
    assert True not in answers
    with Calls():
        updated(expected, twin)
    assert same(state(average), state(expected))


def test_a_moved_counter_of_skipped_updates() -> None:
    averager = Averager([live := torch.ones(3)], {"swa": SWA()}, on_nonfinite="skip")
    averager.update()
    counters = storage_of(averager).parts[0].engine.counters
    counters.share_memory_()
    live[0] = torch.nan
    averager.update()
    averager.update()
    assert (averager.skipped_updates, averager.n_averaged) == (2, {"swa": 1})


@pytest.mark.parametrize("known", [True, False], ids=["own", "torch's"])
def test_versions(library: Any, known: bool) -> None:
    """Autograd notices an average that was written after it was saved, and each counter goes up by
    one, with torch's own function, too."""
    model = Net()
    average = AveragedModel(model, rule=EMA(0.9))
    averager = Averager(model, {"ema": EMA(0.9)})
    sample = torch.empty(3, 5, 7)
    listeners, increment = _backends._listeners(), torch._C._increment_version
    assert library.hear(listeners, increment, sample) is True
    try:
        if not known:
            # A function that does not count: so counters are not where they are looked for.
            assert library.hear(listeners, lambda tensors: None, sample) is False
            calls: list[int] = []
            library.hear(
                listeners,
                lambda tensors: (calls.append(len(tensors)), increment(tensors))[1]
                if len(tensors) != 1 or tensors[0].shape != (3, 5, 7) else None,
                sample,
            )  # fmt: skip
        for _ in range(2):
            updated(average, model)
            updated(averager, model)
        tensors = [*average.module.parameters(), *average.module.buffers()]
        before = [t._version for t in tensors]
        own = storage_of(averager)._versioned[-1]
        at = own._version
        weight = average.module.head.weight
        y = (weight * weight.detach().requires_grad_()).sum()
        assert counting(average) == []
        answers, others = counting(average), counting(averager)
        updated(average, model)
        updated(averager, model)
        assert answers == others == [True]
        assert [t._version for t in tensors] == [v + 1 for v in before]
        assert own._version == at + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
        if not known:
            assert calls[-2:] == [len(tensors), len(storage_of(averager)._versioned)]
    finally:
        assert library.hear(listeners, increment, sample) is True


@pytest.mark.parametrize("seen", [False, True])
def test_the_version_of_a_single_tensor(seen: bool) -> None:
    averager = Averager([torch.ones(3)], {"ema": EMA(0.5)})
    averager.update()
    if seen:
        tensor = averager.averages["ema"]["0"]
        averager.update()
    answers = counting(averager)
    (memory,) = storage_of(averager)._versioned
    counts, before = averager._counts[0]._version, memory._version
    averager.update()
    assert answers == [True]
    assert (memory._version, averager._counts[0]._version) == (before + 1, counts)
    if seen:
        assert tensor._version == memory._version


def test_averages_without_a_version_counter() -> None:
    """Of which one was made in inference mode: the others' are counted by torch."""
    with torch.inference_mode():
        odd = torch.zeros(3)
    model = Net()
    average = AveragedModel(model, rule=EMA(0.9))
    average.module.head._parameters["bias"] = nn.Parameter(odd, requires_grad=False)
    for _ in range(2):
        updated(average, model)
    answers = counting(average)
    version = average.module.head.weight._version
    updated(average, model)
    assert answers == [True]
    assert average.module.head.weight._version == version + 1


def test_an_update_waits_for_the_lock() -> None:
    model = Net()
    averager = Averager(model, {"ema": EMA(0.9)})
    averager.update()
    storage = storage_of(averager)
    thread = threading.Thread(target=averager.update)
    with storage.lock:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert averager.n_averaged == {"ema": 1}
        averager.update()  # whoever has it may
    thread.join()
    assert averager.n_averaged == {"ema": 3}


@pytest.mark.parametrize("interval", [1e-6, 0.005])
def test_updates_of_several_threads(interval: float) -> None:
    """Each is counted, beside others that look at the averages and so have them watched anew."""
    model = nn.Linear(64, 64)
    averager = Averager(model, {"ema": EMA(0.9), "swa": SWA()})
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        threads = [
            threading.Thread(target=lambda: [averager.update() for _ in range(200)])
            for _ in range(3)
        ] + [threading.Thread(target=lambda: [averager.averages for _ in range(200)])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert averager.n_averaged == {"ema": 600, "swa": 600}
    assert torch.allclose(averager.averages["swa"]["weight"], model.weight, atol=1e-5)


def test_errors_leave_the_lock_and_everything_else() -> None:
    model = Net()
    averager = Averager(model, {"ema": EMA(0.9)})
    averager.update()
    state(averager)  # which has the averages watched
    averager.update()
    storage, before = storage_of(averager), state(averager)
    good = storage.at_once

    def broken() -> bool:
        raise ArithmeticError("found")

    for bad, error in (
        ((good[0], broken, *good[2:]), ArithmeticError),
        (good[:-1], TypeError),
        ((*good[:2], *[object()] * 3, *good[5:]), ValueError),
        (7, TypeError),
    ):
        storage.at_once = bad
        with pytest.raises((error, SystemError)):
            averager.update()
        assert storage.lock.acquire(blocking=False)
        storage.lock.release()
        thread = threading.Thread(target=averager.state_dict)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        assert same(state(averager), before)
    storage.at_once = good
    averager.update()


def test_a_function_that_says_no() -> None:
    """Of what the library does not look at, such as whether values are negated where they lie."""
    model = nn.Linear(1, 1)
    averager = Averager(model, {"ema": EMA(0.5)})
    averager.update()
    storage = storage_of(averager)
    assert storage.at_once[1] is not None
    assert storage.update_at_once(storage) is True
    kept = storage.at_once
    storage.at_once = (kept[0], lambda: False, *kept[2:])
    assert storage.update_at_once(storage) is False
    assert averager.n_averaged == {"ema": 2}


@pytest.mark.parametrize("kind", ["several rules", "AveragedModel"])
def test_nothing_is_kept(kind: str) -> None:
    """By what the compiled library holds: neither model nor averages."""
    model = Net()
    average = KINDS[kind](model)
    for _ in range(3):
        updated(average, model)
    model.__dict__["average"] = average  # a circle, which only the garbage collector ends
    storage = storage_of(average)
    seen = [weakref.ref(each) for each in (model, average, storage, storage._watch)]
    del model, average, storage
    gc.collect()
    assert [each() for each in seen] == 4 * [None]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "cpu_library", lambda: None)
    averager = Averager(Net(), {"ema": EMA(0.9)}, backend="reference")
    for _ in range(2):
        averager.update()
    assert storage_of(averager).at_once is None
    assert averager.n_averaged == {"ema": 2}


@pytest.fixture
def unheard(library: Any) -> Iterator[None]:
    """As with a torch whose functions are not known."""
    library.hear((lambda: True,), torch._C._increment_version, torch.empty(3, 5, 7))
    yield
    library.hear(_backends._listeners(), torch._C._increment_version, torch.empty(3, 5, 7))


def test_somebody_who_always_listens(unheard: None) -> None:
    model = Net()
    for kind in ("several rules", "AveragedModel"):
        average = KINDS[kind](model)
        updated(average, model)
        answers = counting(average)
        for _ in range(2):
            updated(average, model)
        assert answers in (2 * [False], 4 * [False])


def test_rules_change_between_updates() -> None:
    """The rules' memory is read at every update."""
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    averager, other = Averager(model, {"e": EMA(0.9)}), Averager(twin, {"e": EMA(0.9)})
    for number, decay in itertools.product(range(2), (0.5, 0.99)):
        for each in (averager, other):
            each.set_decay(decay)
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                a.fill_(number)
                b.fill_(number)
        averager.update()
        with Calls():
            other.update()
        assert same(state(averager), state(other))
