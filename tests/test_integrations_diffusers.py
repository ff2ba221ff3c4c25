"""diffusers' EMAModel on swa_fast, beside diffusers' own."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

from diffusers import UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel as Stock  # noqa: E402

from swa_fast.integrations import diffusers as ours  # noqa: E402
from swa_fast.integrations.diffusers import EMAModel  # noqa: E402


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 2)).to(dtype)


def move(model: nn.Module, at: int) -> None:
    """One step of a training."""
    g = torch.Generator().manual_seed(at)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype))


def exact(model: nn.Module, ema: Any, steps: range) -> list[Tensor]:
    """The average by the same formula in float64."""
    averages = [p.detach().double().clone() for p in model.parameters()]
    for at in steps:
        move(model, at)
        d = ema.get_decay(at + 1)
        for a, p in zip(averages, model.parameters(), strict=True):
            a.copy_(d * a + (1 - d) * p.detach().double())
    return averages


def same(a: Any, b: Any) -> None:
    a, b = a.state_dict(), b.state_dict()
    for tensor, other in zip(a.pop("shadow_params"), b.pop("shadow_params"), strict=True):
        assert tensor.equal(other)
    assert a == b


SETTINGS = [
    {"decay": 0.9},
    {"decay": 0.999, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    {"decay": 0.95, "min_decay": 0.5, "update_after_step": 3},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_as_close_to_the_formula_as_diffusers_and_with_its_state(options: dict[str, Any]) -> None:
    results = []
    for kind in (Stock, EMAModel):
        model = net()
        ema = kind(model.parameters(), **options)
        expected = exact(net(), ema, range(12))
        for at in range(12):
            move(model, at)
            ema.step(model.parameters())
        errors = [(a.double() - e).abs().max() for a, e in
                  zip(ema.shadow_params, expected, strict=True)]  # fmt: skip
        results.append((max(errors), ema))
    (theirs, stock), (mine, ema) = results
    rounding = torch.finfo(torch.float32).eps * max(float(e.abs().max()) for e in expected)
    assert ema._shadow is not None and mine <= 2 * theirs + rounding
    ours_state, their_state = ema.state_dict(), stock.state_dict()
    assert list(ours_state) == list(their_state)
    for key, value in their_state.items():
        assert key == "shadow_params" or ours_state[key] == value
    assert ema.cur_decay_value == stock.cur_decay_value


def test_states_load_both_ways_in_the_middle_of_a_run() -> None:
    for first, second in ((Stock, EMAModel), (EMAModel, Stock)):
        whole, half, rest = net(), net(), net()
        a, b = (second(m.parameters(), decay=0.9) for m in (whole, rest))
        c = first(half.parameters(), decay=0.9)
        for at in range(10):
            move(whole, at)
            a.step(whole.parameters())
            if at < 5:
                move(half, at)
                c.step(half.parameters())
        rest.load_state_dict(half.state_dict())
        b.load_state_dict(c.state_dict())
        for at in range(5, 10):
            move(rest, at)
            b.step(rest.parameters())
        for x, y in zip(a.shadow_params, b.shadow_params, strict=True):
            torch.testing.assert_close(x, y)
        assert b.optimization_step == 10


RUN = """
import sys
sys.path.insert(0, {tests!r})
from test_integrations_diffusers import *

model = net()
ema = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True)
for at in range(20):
    move(model, at)
    ema.step(model.parameters())
    if at == 6:
        torch.save((model.state_dict(), ema.state_dict()), {file!r})
    if at == 9:
        os._exit(9)
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    file = str(tmp_path / "a.pt")
    code = RUN.format(tests=str(Path(__file__).parent), file=file)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    whole, resumed = net(), net()
    a = EMAModel(whole.parameters(), decay=0.9, use_ema_warmup=True)
    b = EMAModel(resumed.parameters(), decay=0.9, use_ema_warmup=True)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    b.load_state_dict(state)
    for at in range(20):
        move(whole, at)
        a.step(whole.parameters())
        if at > 6:
            move(resumed, at)
            b.step(resumed.parameters())
    same(a, b)


def test_store_copy_and_restore() -> None:
    model = net()
    ema = EMAModel(model.parameters(), decay=0.9)
    for at in range(4):
        move(model, at)
        ema.step(model.parameters())
    live = [p.detach().clone() for p in model.parameters()]
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert all(p.equal(a) for p, a in zip(model.parameters(), ema.shadow_params, strict=True))
    ema.restore(model.parameters())
    assert all(p.equal(x) for p, x in zip(model.parameters(), live, strict=True))


def test_what_is_done_to_the_averages_between_steps_counts() -> None:
    models, emas = [net(), net()], []
    for kind, model in zip((Stock, EMAModel), models, strict=True):
        ema = kind(model.parameters(), decay=0.9)
        emas.append(ema)
        for at in range(9):
            move(model, at)
            if at == 2:
                ema.shadow_params[0].fill_(4.0)  # written
            if at == 3:
                ema.to(dtype=torch.float64)  # replaced, in another dtype
            if at == 5:
                ema.decay = 0.2
            if at == 6:
                list(model.parameters())[1].requires_grad_(False)
            if at == 7:
                model[1] = copy.deepcopy(model[1])  # other parameters
            ema.step(model.parameters())
    for a, b in zip(emas[0].shadow_params, emas[1].shadow_params, strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # Frozen at step 6 and moved since: a copy of it.
    assert emas[1].shadow_params[1].equal(list(models[1].parameters())[1].double())
    again = pickle.loads(pickle.dumps(emas[1]))
    same(again, emas[1])
    again.step(models[1].parameters())


def test_kinds_that_are_not_kept_are_averaged_as_diffusers_does() -> None:
    model, other = net(), net()
    a, b = Stock(model.parameters(), decay=0.9), EMAModel(other.parameters(), decay=0.9)
    for ema, m in ((a, model), (b, other)):
        ema.shadow_params[0] = ema.shadow_params[0].double()
        for at in range(4):
            move(m, at)
            ema.step(m.parameters())
    same(a, b)
    assert b._shadow is None


def test_an_update_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    ema = EMAModel(model.parameters(), decay=0.9)
    for at in range(3):
        move(model, at)
        ema.step(model.parameters())
    before = copy.deepcopy(ema.state_dict())

    def interrupt(decay: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ema._shadow, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ema.step(model.parameters())
    assert ema.state_dict()["optimization_step"] == before["optimization_step"] == 3
    for x, y in zip(ema.shadow_params, before["shadow_params"], strict=True):
        assert x.equal(y)


def unet() -> UNet2DModel:
    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=2,
        add_attention=False,
    )  # fmt: skip


def test_the_example_of_the_docstring_runs_and_its_files_load_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, sampled = unet(), []
    names = {
        "unet": model,
        "loader": range(3),
        "train_on": lambda at: move(model, at),
        "sample": lambda m: sampled.append(next(m.parameters()).detach().clone()),
    }
    (code,) = code_of(ours)
    exec(code, names)
    ema: Any = names["ema"]
    assert sampled[0].equal(ema.shadow_params[0]) and ema._shadow is not None
    for kind in (Stock, EMAModel):
        loaded = kind.from_pretrained("unet_ema", UNet2DModel)
        assert loaded.optimization_step == 3 and loaded.decay == 0.9999
        for x, y in zip(loaded.shadow_params, ema.shadow_params, strict=True):
            assert x.equal(y)
    assert os.path.isdir("unet_ema")
