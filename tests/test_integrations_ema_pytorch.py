"""ema-pytorch's EMA on swa_fast, beside ema-pytorch's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import Tensor, nn

ema_pytorch = pytest.importorskip("ema_pytorch")

from swa_fast.integrations import ema_pytorch as ours  # noqa: E402

Stock, Fast = ema_pytorch.EMA, ours.EMA


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 200), nn.BatchNorm1d(200), nn.Linear(200, 2))


def move(model: nn.Module, at: int) -> None:
    """One step of a training."""
    g = torch.Generator().manual_seed(at)
    with torch.no_grad():
        model(torch.randn(8, 3, generator=g))
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g))


def floating(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


SETTINGS: list[dict[str, Any]] = [
    {"beta": 0.9, "update_after_step": 2, "update_every": 3},
    {"beta": 0.99, "update_after_step": 0, "update_every": 1, "inv_gamma": 2.0, "power": 0.75},
    {"beta": 0.9, "update_after_step": 4, "update_every": 1, "min_value": 0.5},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_as_close_to_the_formula_as_ema_pytorch(options: dict[str, Any]) -> None:
    errors, emas = [], []
    for kind in (Stock, Fast):
        model = net()
        ema = kind(model, **options)
        exact: dict[str, Tensor] = {}
        for at in range(24):
            move(model, at)
            ema.update()
            # The first call and those up to update_after_step copy, then every so many count.
            every = at % options["update_every"] == 0
            copies = at == 0 or (every and at <= options["update_after_step"])
            d = 0.0 if copies else ema.get_current_decay()
            if copies or every:
                for name, value in floating(model).items():
                    exact[name] = d * exact.get(name, value.double()) + (1 - d) * value.double()
        errors.append(max(float((v.double() - exact[k]).abs().max())
                          for k, v in floating(ema.ema_model).items()))  # fmt: skip
        emas.append(ema)
    rounding = torch.finfo(torch.float32).eps * max(float(e.abs().max()) for e in exact.values())
    assert emas[1].__dict__["_copy"] is not None
    assert errors[1] <= 2 * errors[0] + rounding
    theirs, mine = (ema.state_dict() for ema in emas)
    assert list(theirs) == list(mine)
    for name, tensor in theirs.items():
        if not tensor.is_floating_point():
            assert tensor.equal(mine[name]), name


@pytest.mark.parametrize("first, second", [(Stock, Fast), (Fast, Stock), (Fast, Fast)])
def test_a_run_goes_on_from_a_saved_state(first: Any, second: Any, tmp_path: Path) -> None:
    options = {"beta": 0.9, "update_after_step": 1, "update_every": 2}
    whole = second(net(), **options)
    half = first(net(), **options)
    for at in range(7):
        move(half.model, at)
        half.update()
    torch.save(half.state_dict(), tmp_path / "a.pt")
    del half
    rest = second(net(), **options)
    rest.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    for at in range(15):
        move(whole.model, at)
        whole.update()
        if at >= 7:
            move(rest.model, at)
            rest.update()
    for name, tensor in whole.state_dict().items():
        if first is second:
            assert tensor.equal(rest.state_dict()[name]), name
        torch.testing.assert_close(rest.state_dict()[name], tensor)


def test_names_left_out_are_ema_pytorchs_own() -> None:
    results = []
    for kind in (Stock, Fast):
        ema = kind(
            net(), beta=0.9, update_after_step=0, update_every=1, ignore_startswith_names={"0"},
            param_or_buffer_names_no_ema={"2.bias"},
        )  # fmt: skip
        for at in range(5):
            move(ema.model, at)
            ema.update()
        results.append(ema.state_dict())
    for name, tensor in results[0].items():
        assert tensor.equal(results[1][name]), name


def test_the_average_stays_the_object_it_was_and_fails_whole() -> None:
    ema = Fast(net(), beta=0.9, update_after_step=0, update_every=1)
    average = ema.ema_model
    for at in range(4):
        move(ema.model, at)
        ema.update()
    assert ema.ema_model is average
    before = copy.deepcopy(ema.ema_model.state_dict())
    ema.model[2] = nn.Linear(200, 3)
    with pytest.raises(ValueError, match=r"2\.weight"):
        ema.update()
    assert all(t.equal(before[n]) for n, t in ema.ema_model.state_dict().items())


def test_the_example_of_the_docstring_runs() -> None:
    model, seen, saved = net(), [], []
    names = {
        "model": model,
        "loader": range(3),
        "train_on": lambda at: move(model, at),
        "evaluate": lambda m: seen.append(m(torch.zeros(2, 3))),
        "save": saved.append,
    }
    (code,) = code_of(ours)
    exec(code, names)
    ema: Any = names["ema"]
    assert seen[0].shape == (2, 2) and list(saved[0]) == list(ema.state_dict())
