"""An average in the model's place: taken out again whatever happens, and what is made meanwhile."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, DTYPES, Calls, need, snapshot, step
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast import EMA, SWA, AveragedModel, Averager, get_ema_multi_avg_fn, update_bn
from swa_fast._kept import put

KINDS = [
    "Averager", "Averager of bf16", "Averager, reference", "AveragedModel",
    "Averager by pointer", "AveragedModel by pointer",
]  # fmt: skip


class Pair:
    """A model, its average, and what both were."""

    def __init__(self, kind: str, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        kind, _, by = kind.partition(" by ")
        self.by = by or "value"
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) if model is None else model
        if kind == "Averager of bf16":
            self.model.bfloat16()
        self.averaged = kind == "AveragedModel"
        self.average: Any
        if self.averaged:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        else:
            backend = "reference" if kind == "Averager, reference" else None
            self.average = Averager(self.model, {"s": SWA(), "e": EMA(0.5)}, backend=backend)
        for _ in range(2):
            step(self.model)
            self.update()
        step(self.model)
        self.live, self.means = snapshot(self.model), self.now()
        with self.applied():  # so that everything has been found
            pass

    def update(self) -> None:
        self.average.update_parameters(self.model) if self.averaged else self.average.update()

    def applied(self) -> Any:
        return self.average.applied(self.model if self.averaged else "e", by=self.by)

    def now(self) -> dict[str, Tensor]:
        if self.averaged:
            return snapshot(self.average.module)
        return {k: v.clone() for k, v in self.average.averages["e"].items()}

    def check(self) -> None:
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self.live[name].to(tensor.dtype)), name
        for name, tensor in self.now().items():
            assert torch.equal(tensor, self.means[name].to(tensor.dtype)), name

    def check_inside(self) -> None:
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self.means[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        *((kind, False) for kind in KINDS),
        *((kind, True) for kind in ("Averager", "AveragedModel", "AveragedModel by pointer")),
    ],
)
def test_an_exception_before_every_line_of_entry_body_and_exit(kind: str, moved: bool) -> None:
    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        pair = Pair(kind)

        def enter_and_leave() -> None:
            with pair.applied():
                if moved:
                    pair.model[0].weight.data = pair.model[0].weight.data.clone()

        def check() -> None:
            pair.check()
            pair.update()
            with pair.applied():
                pass

        return enter_and_leave, check

    assert at_every_line(make) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_every_operator_of_the_entry(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives while an operator is at work, so that Python sees it just after."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Interrupt(TorchDispatchMode):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.at, self.seen = at, 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)
            return result

    at, done = 0, False
    while not done:
        at += 1
        pair = Pair(kind)
        try:
            with Interrupt(at) as mode, pair.applied():
                pass
            done = mode.seen < at
        except KeyboardInterrupt:
            pass
        pair.check()
    assert at > 2 or "pointer" in kind  # which needs no operator at all


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_inside_holds_the_average(kind: str) -> None:
    pair = Pair(kind)
    with pair.applied():
        pair.check_inside()
        state = copy.deepcopy(pair.average.state_dict())
        held = pair.average.state_dict()
        clone = copy.deepcopy(pair.average)
        pickled = pickle.loads(pickle.dumps(pair.average))
        file = io.BytesIO()
        torch.save(pair.average, file)
        seen = pair.now()
    pair.check()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)

    def of(what: Any) -> dict[str, Tensor]:
        if pair.averaged:
            return what.module.state_dict()
        return what.averages["e"]

    def in_state(what: Any) -> dict[str, Tensor]:
        if pair.averaged:
            return {k.removeprefix("module."): v for k, v in what.items() if k != "n_averaged"}
        return what["averages"]["e"]

    for found in (in_state(state), in_state(held), of(clone), of(pickled), of(loaded), seen):
        for name, value in pair.means.items():
            assert torch.equal(found[name], value), name
    for other in (clone, pickled, loaded):
        if pair.averaged:
            other.update_parameters(pair.model)
            assert other.n_averaged == 3
            assert not torch.equal(of(other)["0.weight"], pair.means["0.weight"])
        else:
            other.update()  # from its own copy of the model
            assert other.n_averaged["e"] == 3


@pytest.mark.parametrize("kind", ["Averager", "Averager by pointer"])
def test_refused_inside_from_any_thread(kind: str) -> None:
    pair = Pair(kind)
    problems: list[Exception] = []

    def elsewhere() -> None:
        for refused in (
            pair.average.update,
            lambda: pair.average.load_state_dict({}),
            lambda: pair.average.load_average("e", {}),
            lambda: pair.average.blend_("e", 0.5),
            lambda: pair.average.applied("s").__enter__(),
            lambda: pair.average.applied("s", by="pointer").__enter__(),
        ):
            try:
                refused()
            except RuntimeError as error:
                problems.append(error)

    with pair.applied():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(problems) == 6
    pair.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", ["half", "double", "share_memory", "compile", "deepcopied dictionary", "channels"]
)
def test_changed_inside(kind: str, change: str) -> None:
    """The live weights come back in the type that the model has now, and the average is exact."""
    pair = Pair(kind)
    with pair.applied():
        if change in ("half", "double"):
            getattr(pair.model, change)()
        elif change == "share_memory":
            pair.model.share_memory()
        elif change == "compile":
            torch.compile(pair.model, backend="eager")(torch.randn(5, 3).to(pair.model[0].weight))
            pair.live, pair.means = pair.live, pair.now()
        elif change == "channels":
            pair.model.to(memory_format=torch.channels_last)
        else:
            pair.model[0]._parameters = copy.deepcopy(pair.model[0]._parameters)
    if change == "compile":
        # The forward has counted a batch in the average that was in the model.
        assert torch.equal(pair.model[0].weight, pair.live["0.weight"])
        return
    if change in ("half", "double"):
        assert {p.dtype for p in pair.model.parameters()} == {getattr(torch, change)}
    if change == "share_memory":
        assert pair.model[0].weight.is_shared()
    pair.check()
    pair.update()


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "Averager of bf16"])
def test_blocks_that_end_in_the_order_in_which_they_began(kind: str, third: bool) -> None:
    """The later one keeps the earlier one's average as live values, so that one waits for it."""
    first = Pair(kind)
    others = [Averager(first.model, {"a": EMA(0.5)}) for _ in range(1 + third)]
    means = []
    for other in others:
        other.update()
        means.append({k: v.clone() for k, v in other.averages["a"].items()})
    blocks = [first.applied(), *(other.applied("a") for other in others)]
    for block in blocks:
        block.__enter__()
    for block in blocks[:-1]:
        block.__exit__(None, None, None)
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, means[-1][name]), name
        with pytest.raises(RuntimeError, match="applied"):
            first.update()
    blocks[-1].__exit__(None, None, None)
    first.check()
    for other, mean in zip(others, means, strict=True):
        for name, tensor in other.averages["a"].items():
            assert torch.equal(tensor, mean[name]), name
    first.update()


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory_on_the_way_in(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(1, 8):
        pair = Pair(kind)
        clone, left = Tensor.clone, [at]

        def failing(
            *arguments: Any, clone: Any = clone, left: list[int] = left, **options: Any
        ) -> Tensor:
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("injected")
            result: Tensor = clone(*arguments, **options)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "clone", failing)
            try:
                with pair.applied():
                    pass
            except torch.OutOfMemoryError:
                pass
        pair.check()


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(1, 4).expand(4, 4))


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.arange(6.0))
        self.part = nn.Parameter(self.whole.data[2:4])
        self.register_buffer("view", self.whole.data[3:])


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(4, 6)
        self.left, self.right = nn.Parameter(memory[:, :3]), nn.Parameter(memory[:, 3:])


@pytest.mark.parametrize("make", [Expanded, Sliced, Interleaved])
@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_memory_that_belongs_to_several(kind: str, make: type[nn.Module]) -> None:
    model = make()
    average: Any
    if kind == "Averager":
        average = Averager(model, {"e": EMA(0.5)})
        update, applied = average.update, lambda: average.applied("e")
    else:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        update, applied = lambda: average.update_parameters(model), lambda: average.applied(model)
    start = {name: t.detach().clone() for name, t in model.named_parameters()}
    update()
    with torch.no_grad():
        next(model.parameters()).add_(10)
    update()
    live = snapshot(model)
    with applied():
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(tensor.detach(), (start[name] + live[name]) / 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name])


@pytest.mark.parametrize("by", ["value", "pointer"])
@pytest.mark.parametrize("buffers", ["skip", "copy"])
def test_update_bn_inside(buffers: str, by: str) -> None:
    """Statistics found within the block are the average's, never the live network's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averager = Averager(model, {"s": SWA()}, buffers=buffers)
    averager.update()
    step(model)
    averager.update()
    live = snapshot(model)
    with averager.applied("s", by=by):
        update_bn([torch.randn(8, 3) for _ in range(3)], model)
        inside = snapshot(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name
    if buffers == "copy":
        for name, tensor in averager.averages["s"].items():
            assert torch.equal(tensor, inside[name]), name


class Bits(nn.Module):
    """Parameters of all types, of odd sizes, on unaligned bases, empty and large, of any bits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = (1, 7, 0, 5001)
        for dtype in (*DTYPES, torch.complex64):
            for size in sizes:
                memory = torch.randint(
                    256, (dtype.itemsize * (size + 3),), dtype=torch.uint8, generator=generator
                ).view(dtype)
                name = f"{dtype}_{size}".removeprefix("torch.")
                self.register_parameter(name, nn.Parameter(memory[3:]))
        image = torch.randn(2, 3, 5, 7, generator=generator)
        self.image = nn.Parameter(image.to(memory_format=torch.channels_last))
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.parametrize(
    ("backend", "device", "huge"),
    [
        *(pytest.param(*p.values, False, id=p.id, marks=p.marks) for p in BACKENDS),
        pytest.param("cpu", "cpu", True, id="huge pages"),
    ],
)
def test_every_bit_comes_back(
    backend: str, device: str, huge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(backend, device)
    if huge:
        monkeypatch.setattr("swa_fast._kept._HUGE", 1)
    model = Bits().to(device)
    averaged = AveragedModel(model, backend=backend)
    averaged.update_parameters(model)

    def bits(module: nn.Module) -> dict[str, Tensor]:
        own = {k: t.detach().cpu() for k, t in module.state_dict().items()}
        copies = {k: t.clone(memory_format=torch.contiguous_format) for k, t in own.items()}
        return {k: t.view(-1).view(torch.uint8) for k, t in copies.items()}

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
        model.count += 1
    live, means = bits(model), bits(averaged.module)
    for _ in range(2):
        with averaged.applied(model):
            inside = bits(model)
            versions = {name: tensor._version for name, tensor in model.state_dict().items()}
        assert all(torch.equal(inside[name], means[name]) for name in means)
        for name, now in bits(model).items():
            assert torch.equal(now, live[name]), name
        assert all(torch.equal(now, means[n]) for n, now in bits(averaged.module).items())
    if backend != "reference":  # whose operators tell autograd by themselves
        for name, tensor in model.state_dict().items():
            assert tensor.numel() == 0 or tensor._version > versions[name], name


def test_values_are_set_aside_where_there_is_room_now(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []

    def allocate(size: int, device: torch.device) -> Tensor:
        held.append(torch.full((size,), 255, dtype=torch.uint8, device=device))
        return held[-1]

    monkeypatch.setattr("swa_fast._kept._allocate", allocate)
    monkeypatch.setattr("swa_fast._kept._KEPT", 0)
    pair = Pair("AveragedModel")
    for _ in range(3):
        with pair.applied():
            pair.check_inside()
        pair.check()
    assert len(held) == 4 and len({tensor.data_ptr() for tensor in held}) == 4
    # Not where it was the first time.
    assert not torch.equal(held[-1], torch.full_like(held[-1], 255))


def test_a_sparse_parameter_is_put_back() -> None:
    """A leaf that requires a gradient, which leaving inference mode alone would have recorded."""
    parameter = nn.Parameter(torch.eye(3).to_sparse())
    with torch.no_grad():
        put([parameter], [torch.full((3, 3), 2.0).to_sparse()])
    assert torch.equal(parameter.detach().to_dense(), torch.full((3, 3), 2.0))


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        pair = Pair("Averager", model)
        before = pair.now()
    pair.update()
    with pair.applied():
        pass
    pair.live, pair.means = snapshot(model), pair.now()
    with pair.applied():
        pair.check_inside()
    pair.check()
    assert not torch.equal(pair.means["0.weight"], before["0.weight"])


@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
@pytest.mark.parametrize("listening", [False, True], ids=["at once", "by the operator"])
def test_update_with_an_exception_before_every_line(kind: str, listening: bool) -> None:
    """All of it or nothing."""

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        pair = Pair(kind)
        before = pair.now()
        clone = copy.deepcopy(pair.average)
        if pair.averaged:
            clone.update_parameters(pair.model)
            after = snapshot(clone.module)
        else:
            clone.update()
            after = {k: v.clone() for k, v in clone.averages["e"].items()}

        def check() -> None:
            now = pair.now()
            whole = all(torch.equal(now[name], after[name]) for name in now)
            none = all(torch.equal(now[name], before[name]) for name in now)
            assert whole != none
            count = pair.average.n_averaged
            assert int(count if pair.averaged else count["e"]) == (3 if whole else 2)
            for name, tensor in pair.model.state_dict().items():
                assert torch.equal(tensor, pair.live[name])

        def update() -> None:
            with Calls() if listening else contextlib.nullcontext():
                pair.update()

        return update, check

    assert at_every_line(make) > (8 if listening else 5)


@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_load_state_dict_with_an_exception_before_every_line(kind: str) -> None:
    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        pair, other = Pair(kind), Pair(kind)
        step(other.model)
        other.update()
        state = copy.deepcopy(other.average.state_dict())
        before, after = pair.now(), other.now()

        def check() -> None:
            count = pair.average.n_averaged
            count = int(count if pair.averaged else count["e"])
            now, expected = pair.now(), before if count == 2 else after
            assert count in (2, 3)
            assert all(torch.equal(now[name], expected[name]) for name in now)

        return lambda: pair.average.load_state_dict(state), check

    assert at_every_line(make) > (5 if kind == "AveragedModel" else 40)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Averager", "Averager by pointer"])
def test_on_a_gpu(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("cuda")

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        pair = Pair(kind, copy.deepcopy(model))

        def enter_and_leave() -> None:
            with pair.applied():
                pass

        return enter_and_leave, pair.check

    assert at_every_line(make) > 40
