"""The watch: what moved, changed type or was replaced is noticed before it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    Net,
    is_averaged,
    need,
    snapshot,
    step,
)
from torch import nn

import swa_fast
from swa_fast import SWA, Averager, _backends
from swa_fast._watch import Watch


@pytest.mark.parametrize("extension", [True, False], ids=["C++ watch", "Python watch"])
def test_changes_of_the_model_are_noticed(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension:
        need("cpu", "cpu")
    else:
        monkeypatch.setattr(_backends, "cpu_library", lambda: None)
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


def test_watch_of_many() -> None:
    """Both implementations agree on what a change is."""
    tensors = [torch.randn(3) for _ in range(5)]
    place: dict[str, object] = {"a": tensors[0], "b": None}
    changes: tuple[Callable[[], object], ...] = (
        lambda: place.update(c=1),
        lambda: place.pop("b"),
        lambda: place.update(a=tensors[1]),
        lambda: tensors[2].resize_(2),
        lambda: tensors[3].set_(torch.randn(3)),
    )
    for change in changes:
        watches = [Watch(tensors, [place]) for _ in range(2)]
        assert all(watch.holds() for watch in watches)
        change()
        assert not any(watch.holds() for watch in watches)


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
