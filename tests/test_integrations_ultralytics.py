"""ultralytics' ModelEMA on swa_fast, beside ultralytics' own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import Tensor, nn

try:
    from ultralytics.utils import torch_utils
# OSError and the like: its own dependencies, such as OpenCV and a folder for its settings.
except Exception as error:
    pytest.skip(f"ultralytics cannot be imported: {error}", allow_module_level=True)

from swa_fast.integrations import ultralytics as ours

Stock, Fast = torch_utils.ModelEMA, ours.ModelEMA


def net() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 200), nn.BatchNorm1d(200), nn.Linear(200, 2))
    model.names = ["a"]  # type: ignore[assignment]
    return model


def move(model: nn.Module, at: int) -> None:
    """One step of a training."""
    g = torch.Generator().manual_seed(at)
    with torch.no_grad():
        model(torch.randn(8, 3, generator=g))
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g))


def floating(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def test_as_close_to_the_formula_as_ultralytics() -> None:
    errors, emas = [], []
    for kind in (Stock, Fast):
        model = net()
        ema = kind(model, decay=0.99, tau=5)
        exact = {k: v.double().clone() for k, v in floating(model).items()}
        for n in range(1, 25):
            move(model, n)
            ema.enabled = n != 7
            ema.update(model)
            d = 0.99 * (1 - math.exp(-ema.updates / 5))
            for name, value in floating(model).items() if ema.enabled else ():
                exact[name] = d * exact[name] + (1 - d) * value.double()
        errors.append(max(float((v.double() - exact[k]).abs().max())
                          for k, v in floating(ema.ema).items()))  # fmt: skip
        emas.append(ema)
    rounding = torch.finfo(torch.float32).eps * max(float(e.abs().max()) for e in exact.values())
    assert emas[1]._copy is not None and emas[0].updates == emas[1].updates == 23
    assert errors[1] <= 2 * errors[0] + rounding
    theirs, mine = (ema.ema.state_dict() for ema in emas)
    assert list(theirs) == list(mine)
    assert theirs["1.num_batches_tracked"].equal(mine["1.num_batches_tracked"])


@pytest.mark.parametrize("first, second", [(Stock, Fast), (Fast, Stock), (Fast, Fast)])
def test_a_run_goes_on_from_a_saved_state(first: Any, second: Any, tmp_path: Path) -> None:
    # As ultralytics' trainer saves and resumes it.
    whole = net()
    expected = second(whole, tau=5)
    half = net()
    ema = first(half, tau=5)
    for at in range(5):
        move(half, at)
        ema.update(half)
    torch.save((half.state_dict(), ema.ema.state_dict(), ema.updates), tmp_path / "a.pt")
    del half, ema
    rest = net()
    weights, state, updates = torch.load(tmp_path / "a.pt", weights_only=True)
    rest.load_state_dict(weights)
    resumed = second(rest, tau=5)
    resumed.ema.load_state_dict(state)
    resumed.updates = updates
    for at in range(10):
        move(whole, at)
        expected.update(whole)
        if at >= 5:
            move(rest, at)
            resumed.update(rest)
    for name, tensor in expected.ema.state_dict().items():
        if first is second:
            assert tensor.equal(resumed.ema.state_dict()[name]), name
        torch.testing.assert_close(resumed.ema.state_dict()[name], tensor)


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    model = net()
    ema = Fast(model)
    average = ema.ema
    for at in range(3):
        move(model, at)
        ema.update(model)
    assert ema.ema is average
    before = copy.deepcopy(ema.ema.state_dict())
    model[2] = nn.Linear(200, 3)
    with pytest.raises(ValueError, match=r"2\.weight"):
        ema.update(model)
    assert ema.updates == 3
    assert all(t.equal(before[n]) for n, t in ema.ema.state_dict().items())


def test_a_teacher_is_left_to_ultralytics() -> None:
    results = []
    for kind in (Stock, Fast):
        model = net()
        model.teacher_model = nn.Linear(2, 2)
        ema = kind(model, tau=5)
        for at in range(3):
            move(model, at)
            ema.update(model)
        results.append(ema.ema.state_dict())
    assert all(t.equal(results[1][n]) for n, t in results[0].items())


def test_the_example_of_the_docstring_runs() -> None:
    model, seen = net(), []
    names = {
        "model": model,
        "loader": range(3),
        "train_on": lambda at: move(model, at),
        "evaluate": seen.append,
    }
    model.names = ["b"]  # type: ignore[assignment]
    (code,) = code_of(ours)
    exec(code, names)
    ema: Any = names["ema"]
    assert seen == [ema.ema] and ema.updates == 3 and ema.ema.names == ["b"]
