"""timm's ModelEmaV3 on swa_fast, beside timm's own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import Tensor, nn

timm_utils = pytest.importorskip("timm.utils")

from swa_fast.integrations import timm as ours  # noqa: E402
from swa_fast.integrations.timm import ModelEmaV3  # noqa: E402

Stock = timm_utils.ModelEmaV3


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 200), nn.BatchNorm1d(200), nn.Linear(200, 2))


def move(model: nn.Module, at: int) -> None:
    """One step of a training."""
    g = torch.Generator().manual_seed(at)
    with torch.no_grad():
        model(torch.randn(8, 3, generator=g).to(next(model.parameters()).dtype))
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype))


def floating(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


SETTINGS: list[dict[str, Any]] = [
    {"decay": 0.9},
    {"decay": 0.95, "exclude_buffers": True},
    {"decay": 0.9, "use_warmup": True, "warmup_gamma": 2.0, "min_decay": 0.3},
    {"decay": 0.9, "update_after_step": 3, "foreach": False},
    {"decay": 0.9, "dtype": torch.float64},
]


@pytest.mark.parametrize("steps", [True, False], ids=["step", "no-step"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_as_close_to_the_formula_as_timm(options: dict[str, Any], steps: bool) -> None:
    errors = []
    for kind in (Stock, ModelEmaV3):
        model = net()
        ema = kind(model, **options)
        exact = {k: v.double().clone() for k, v in floating(model).items()}
        for at in range(12):
            move(model, at)
            step = at if steps else None
            ema.update(model, step=step)
            d = ema.get_decay(step)
            for name, value in floating(model).items():
                buffer = name.split(".")[-1].startswith("running")
                w = 0.0 if buffer and options.get("exclude_buffers") else d
                exact[name] = w * exact[name] + (1 - w) * value.double()
        assert ema.module[1].num_batches_tracked == model[1].num_batches_tracked
        errors.append(max(float((v.double() - exact[k]).abs().max())
                          for k, v in floating(ema.module).items()))  # fmt: skip
    rounding = torch.finfo(torch.float32).eps * max(float(e.abs().max()) for e in exact.values())
    assert ema.__dict__["_copy"] is not None
    assert errors[1] <= 2 * errors[0] + rounding
    assert list(ema.state_dict()) == list(Stock(net(), **options).state_dict())


@pytest.mark.parametrize("first, second", [(Stock, ModelEmaV3), (ModelEmaV3, Stock),
                                           (ModelEmaV3, ModelEmaV3)])  # fmt: skip
def test_a_run_goes_on_from_a_saved_state(first: Any, second: Any, tmp_path: Path) -> None:
    whole = net()
    expected = second(whole, decay=0.9, use_warmup=True)
    half = net()
    ema = first(half, decay=0.9, use_warmup=True)
    for at in range(5):
        move(half, at)
        ema.update(half, step=at)
    torch.save((half.state_dict(), ema.state_dict()), tmp_path / "a.pt")
    del half, ema
    rest = net()
    resumed = second(rest, decay=0.9, use_warmup=True)
    weights, state = torch.load(tmp_path / "a.pt", weights_only=True)
    rest.load_state_dict(weights)
    resumed.load_state_dict(state)
    for at in range(10):
        move(whole, at)
        expected.update(whole, step=at)
        if at >= 5:
            move(rest, at)
            resumed.update(rest, step=at)
    for name, tensor in expected.state_dict().items():
        if first is second:
            assert tensor.equal(resumed.state_dict()[name]), name
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


def test_the_module_stays_the_object_it_was_and_copies_and_pickles_go_on() -> None:
    model = net()
    ema = ModelEmaV3(model, decay=0.9)
    module = ema.module
    move(model, 0)
    ema.update(model)
    assert ema.module is module and len(list(ema.parameters())) == 6
    others = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema)), ema]
    move(model, 1)
    for other in others:
        other.update(model)
        for name, tensor in ema.state_dict().items():
            if other is not ema:
                continue
            for again in others[:2]:
                assert again.state_dict()[name].equal(tensor), name
    # Moved to another dtype between updates.
    ema.double()
    move(model, 2)
    ema.update(model)
    assert next(ema.parameters()).dtype == torch.float64
    ema.set(model)
    assert ema.module[0].weight.equal(model[0].weight.double())


def test_what_timm_does_by_itself() -> None:
    for make in (lambda: net().bfloat16(), lambda: _with_unsaved(net())):
        results = []
        for kind in (Stock, ModelEmaV3):
            model = make()
            ema = kind(model, decay=0.9)
            for at in range(4):
                move(model, at)
                ema.update(model)
            results.append(ema)
        assert results[1].__dict__["_copy"] is None
        for a, b in zip(results[0].buffers(), results[1].buffers(), strict=True):
            assert a.equal(b)
        for name, tensor in results[0].state_dict().items():
            assert tensor.equal(results[1].state_dict()[name]), name


def _with_unsaved(model: nn.Module) -> nn.Module:
    model.register_buffer("mask", torch.zeros(3), persistent=False)
    return model


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    model = net()
    ema = ModelEmaV3(model, decay=0.9)
    move(model, 0)
    ema.update(model)
    before = copy.deepcopy(ema.state_dict())
    model[2] = nn.Linear(200, 3)
    with pytest.raises(ValueError, match=r"2\.weight"):
        ema.update(model)
    for name, tensor in ema.state_dict().items():
        assert tensor.equal(before[name]), name


def test_the_example_of_the_docstring_runs() -> None:
    model, seen, saved = net(), [], []
    names = {
        "model": model,
        "loader": range(3),
        "train_on": lambda at: move(model, at),
        "evaluate": lambda m: seen.append(m),
        "save": saved.append,
    }
    (code,) = code_of(ours)
    exec(code, names)
    ema: Any = names["ema"]
    assert seen == [ema.module] and list(saved[0]) == list(ema.state_dict())
