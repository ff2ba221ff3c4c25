"""The watch: what moved, changed type or was replaced is noticed before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    Net,
    is_averaged,
    need,
    snapshot,
    step,
)
from torch import Tensor, nn

import swa_fast
from swa_fast import EMA, SWA, Averager, _backends
from swa_fast._watch import Watch


@pytest.fixture(params=["bytes", "DLPack", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How tensors are looked at: by the bytes of their objects first, by DLPack alone, or without
    the compiled library."""
    if request.param == "Python":
        monkeypatch.setattr(_backends, "cpu_library", lambda: None)
        yield request.param
        return
    need("cpu", "cpu")
    exchange = torch.Tensor.__dlpack_c_exchange_api__
    library = _backends.cpu_library()
    sample = torch.empty(3, 5, 7) if request.param == "bytes" else None
    assert library.start(exchange, sample) == (request.param == "bytes")
    yield request.param
    library.start(exchange, torch.empty(3, 5, 7))


def test_changes_of_the_model_are_noticed(way: str) -> None:
    model = Net()
    averager = Averager(model, {"swa": SWA()})

    def data(m: Net) -> None:
        m.frozen.data = torch.randn(4097)

    def replaced(m: Net) -> None:
        m.conv.weight = nn.Parameter(torch.randn(5, 3, 3, 3))

    def module_replaced(m: Net) -> None:
        m.bn = nn.BatchNorm2d(5)

    def memory_format(m: Net) -> None:
        m.conv.to(memory_format=torch.contiguous_format)

    def retyped(m: Net) -> None:
        m.turned.data = m.turned.data.to(torch.bfloat16)

    def same_memory_other_strides(m: Net) -> None:
        m.turned.data = m.turned.data.as_strided((129, 33), (33, 1))

    def assigned(m: Net) -> None:
        moved = {k: (v + 1).to(v.dtype) for k, v in m.state_dict().items()}
        m.load_state_dict(moved, assign=True)
        m.out.weight = m.embed.weight

    def nothing(m: Net) -> None:
        pass

    history = []
    for change in (
        nothing, data, memory_format, replaced, module_replaced, retyped,
        same_memory_other_strides, assigned, nothing,
    ):  # fmt: skip
        step(model)
        change(model)
        watch = averager._storage._watch
        assert watch is not None
        assert watch.holds() == (change is nothing), change
        averager.update()
        assert (averager._storage._watch is watch) == (change is nothing)
        history.append({k: v.double() for k, v in snapshot(model).items() if v.is_floating_point()})
    for name in history[0]:
        if is_averaged(name, model.state_dict()[name], "copy"):
            values = torch.stack([h[name] for h in history])
            # One fp32 rounding of weight, difference and result at each update.
            allowed = len(history) * 2**-23 * values.abs().max().item() if values.numel() else 0
            found = averager.averages["swa"][name].double()
            torch.testing.assert_close(found, values.mean(0), rtol=0, atol=allowed)


class Subclass(torch.Tensor):
    pass


def changes() -> dict[str, Callable[[Tensor], object]]:
    def swapped(t: Tensor) -> None:
        other = torch.randn_like(t)
        torch.utils.swap_tensors(t, other)

    def subclass(t: Tensor) -> None:
        t.__class__ = Subclass

    def data(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        def change(t: Tensor) -> None:
            t.data = value(t)

        return change

    return {
        "data": data(torch.clone),
        "retyped": data(lambda t: t.view(torch.int32)),
        "same memory, other sizes": data(lambda t: t[:2]),
        "same memory, other strides": data(lambda t: t.as_strided((3, 4), (1, 3))),
        "same memory, other place": data(lambda t: t[1:]),
        "sparse": lambda t: torch.utils.swap_tensors(t, t.to_sparse()),
        "resize_": lambda t: t.resize_(2),
        "resize_ to larger": lambda t: t.resize_(1000, 7),
        "one more dimension": lambda t: t.unsqueeze_(-1),
        "transposed": lambda t: t.t_(),
        "set_": lambda t: t.set_(torch.randn(3, 4)),
        "storage resized": lambda t: t.untyped_storage().resize_(1 << 16),
        "shared memory": lambda t: t.share_memory_(),
        "swapped": swapped,
        "subclass": subclass,
    }


@pytest.mark.parametrize("change", list(changes()))
def test_every_change_of_a_tensor_is_noticed(way: str, change: str) -> None:
    for at in (0, 17, 40):
        tensors = [torch.randn(3, 4) for _ in range(41)]
        watch = Watch(tensors, [])
        assert watch.holds()
        changes()[change](tensors[at])
        assert not watch.holds()
        if change != "sparse":
            assert Watch(tensors, []).holds()


def test_values_that_are_conjugated_where_they_lie(way: str) -> None:
    """Address, dtype and strides stay; the values are others."""
    model = nn.Module()
    model.w = nn.Parameter(torch.complex(torch.ones(4), torch.full((4,), 3.0)))
    model.real = nn.Parameter(torch.ones(4))
    averager, averaged = Averager(model, {"last": EMA(0.0)}), swa_fast.AveragedModel(model)
    turned = torch.complex(torch.ones(4), torch.full((4,), 2.0))
    for change in ("nothing", "conjugated", "back", "negated"):
        if change in ("conjugated", "back"):
            model.w.data = model.w.data.conj()
        elif change == "negated":
            model.real.data = turned.conj().imag  # the memory of 2, read as -2
            assert model.real.is_neg()
        averager.update()
        averaged.update_parameters(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(averager.averages["last"][name], parameter), (change, name)
    expected = torch.complex(torch.ones(4), torch.full((4,), 1.5))  # the mean of 3, -3, 3 and 3
    torch.testing.assert_close(averaged.module.w.detach(), expected)
    torch.testing.assert_close(averaged.module.real.detach(), torch.full((4,), 0.25))


def test_what_is_not_a_change(way: str) -> None:
    """Other values, gradients, versions, names and references are not."""
    tensors = [
        nn.Parameter(torch.randn(3, 4)),
        torch.randn(2, 3, 4, 5, 6, 7),
        torch.randn(8, 4)[1:, ::2],
        torch.randn(0, 3),
        torch.randn(()),
        torch.randn(3, dtype=torch.complex64),
        torch.arange(3),
        torch.zeros(3, dtype=torch.bool),
    ]
    watch = Watch(tensors, [])
    kept = []
    for _ in range(3):
        for tensor in tensors:
            with torch.no_grad():
                tensor.zero_()
            kept += [tensor.detach(), tensor.view(-1) if tensor.is_contiguous() else tensor]
        tensors[0].sum().backward()
        assert tensors[0].grad is not None
        tensors[0].register_hook(lambda grad: grad)
        tensors[1].requires_grad_(True).requires_grad_(False)
        assert watch.holds()


def test_values_negated_where_they_lie(way: str) -> None:
    """Same address, sizes and type: the dispatch keys alone tell, which a look does not."""
    if way != "bytes":
        pytest.skip("DLPack does not tell, nor does torch offer a public way to do it")
    tensor = torch.randn(8)
    watch = Watch([tensor], [])
    assert watch.holds()
    tensor.data = torch._neg_view(tensor.data)
    assert not watch.holds()


def test_memory_shared_until_it_is_written(way: str) -> None:
    """``torch._lazy_clone`` leaves two tensors at one address until one is written. A kernel writes
    to the address that a look told, so a look must not tell the shared one."""
    tensor = torch.randn(64)
    watch = Watch([tensor], [])
    clone = torch._lazy_clone(tensor)
    before = clone.clone()
    address = tensor.data_ptr() if watch.holds() else 0
    del watch
    Watch([tensor], [])
    assert torch._C._is_cow_tensor(tensor) is False
    assert address in (0, tensor.data_ptr())
    tensor.zero_()
    assert torch.equal(clone, before)


def test_watch_of_many(way: str) -> None:
    tensors = [torch.randn(3) for _ in range(5)]
    place: dict[str, object] = {"a": tensors[0], "b": None}
    owner: dict[str, object] = {"before": {}, "place": place, "after": {}}
    changes: tuple[Callable[[], object], ...] = (
        lambda: place.update(c=1),
        lambda: place.pop("b"),
        lambda: place.update(a=tensors[1]),
        lambda: place.update(a=place.pop("a")),  # last now
        lambda: place.popitem(),
        lambda: place.update(a=tensors[0], b=None),
        lambda: place.clear(),
        lambda: tensors[2].resize_(2),
        lambda: tensors[3].set_(torch.randn(3)),
        lambda: owner.update(place=dict(place)),
        lambda: owner.pop("after"),
    )
    for change in changes:
        watch = Watch(tensors, [(owner, key) for key in owner])
        assert watch.holds()
        change()
        assert not watch.holds()


def test_a_tensor_that_takes_the_form_of_another(way: str) -> None:
    """What tensors have in common is remembered once for all of them."""
    forms: list[Callable[[int], Tensor]] = [
        lambda n: torch.randn(2, 6),
        lambda n: torch.randn(3, 4),
        lambda n: torch.randn(4, 3).t(),
        lambda n: torch.randn(3, 4).double(),
        lambda n: nn.Parameter(torch.randn(3, 4)),
        *([lambda n: torch.randn(n + 1)] * 80),
    ]
    tensors = [make(n) for make in forms for n in range(2)]
    tensors += [make(n) for n, make in enumerate(forms)]
    memory = torch.zeros(200)
    for at, of in ((0, 2), (2, 0), (4, 2), (6, 2), (2, 6), (-1, 0), (-1, -2), (-2, -1)):
        mine, other = tensors[at], tensors[of]
        # At one address all the time.
        before = torch.as_strided(memory.view(mine.dtype), mine.shape, mine.stride())
        after = torch.as_strided(memory.view(other.dtype), other.shape, other.stride())
        mine.data = before
        watch = Watch(tensors, [])
        assert watch.holds() and watch.holds()
        mine.data = after
        assert not watch.holds()
        mine.data = before
        assert watch.holds()


def test_an_owner_that_changes_elsewhere(way: str) -> None:
    """Of the dictionary that has others as its values, only these count: a module's mode and other
    attributes come and go."""
    first = nn.Linear(2, 2)
    model = nn.Sequential(first, nn.ReLU())
    watch = Watch(list(model.parameters()), Watch.places_of(model))
    for change in (
        lambda: model.eval(),
        lambda: setattr(first, "note", 1),
        lambda: setattr(first, "note", 2),
        lambda: delattr(first, "note"),
        lambda: first.register_forward_hook(lambda *_: None),
    ):
        change()
        assert watch.holds() and watch.holds()
    kept = first._buffers
    first.__dict__["_buffers"] = {}
    assert not watch.holds() and not watch.holds()
    first.__dict__["_buffers"] = kept
    assert watch.holds()
    del first.__dict__["_parameters"]
    assert not watch.holds()


class Plain:
    """Its attributes are set by the interpreter's own shortcuts, not by a method as a module's."""

    def __init__(self) -> None:
        self.place: dict[str, object] = {}


def test_an_owner_whose_attribute_is_set_by_specialised_code(way: str) -> None:
    def assign(to: Plain, value: dict[str, object]) -> None:
        to.place = value

    for _ in range(100):
        assign(Plain(), {})
    owner = Plain()
    kept = owner.place
    watch = Watch([], [(owner.__dict__, "place")])
    for _ in range(100):
        assert watch.holds()
        assign(owner, {})
        assert not watch.holds()
        assign(owner, kept)


def test_dictionaries_that_are_again_what_they_were(way: str) -> None:
    """Their contents count, and not how often they changed."""
    first, second = torch.randn(2), torch.randn(2)
    place: dict[str, object] = {"a": first, "b": None}
    owner: dict[str, object] = {"place": place}
    watch = Watch([first], [(owner, "place")])
    for _ in range(2):
        assert watch.holds() and watch.holds()
        place["a"] = second
        assert not watch.holds() and not watch.holds()
        place["a"] = first
        assert watch.holds()
        place["a"] = first
        assert watch.holds()
        del place["b"]
        assert not watch.holds()
        place["b"] = None
    owner["place"] = {}
    assert not watch.holds()
    owner["place"] = place
    assert watch.holds()


@pytest.mark.parametrize("kind", ["Averager", "AveragedModel"])
def test_nothing_keeps_tensors_from_being_swapped(kind: str) -> None:
    """``torch.utils.swap_tensors`` refuses tensors that anything in C++ refers to."""
    model = nn.Linear(3, 4)
    if kind == "Averager":
        averager = Averager(model, {"swa": SWA()})
        update, average = averager.update, averager.averages["swa"]["weight"]
    else:
        averaged = swa_fast.AveragedModel(model)
        update, average = lambda: averaged.update_parameters(model), averaged.module.weight
    with torch.no_grad():
        model.weight.fill_(1)
    update()
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.full((4, 3), 3.0)))
    update()
    assert torch.equal(average, torch.full((4, 3), 2.0))
    # Conversions and loads swap, too, where a user asks torch for it.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.load_state_dict({k: torch.full_like(v, 5) for k, v in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    update()
    torch.testing.assert_close(average, torch.full((4, 3), 3.0))
