"""Averages in Lightning's Trainer, beside its own callbacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as stock
from lightning.pytorch.plugins import MixedPrecision

import swa_fast
from swa_fast import EMA, SWA, Power
from swa_fast.integrations import lightning as ours
from swa_fast.integrations.lightning import EMAWeightAveraging, WeightAveraging

# Lightning's own advice: workers, loggers, checkpoints that exist.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(LightningModule):
    """Dropout for the random numbers, BatchNorm for the statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, 1)
        self.steps: list[Tensor] = []
        self.validated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.head.weight.detach().clone())
        self.log("val", self(batch[0]).square().mean())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps.append(self.head.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(n: int = 24, **options: Any) -> DataLoader[Any]:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    return DataLoader(TensorDataset(x), batch_size=4, **options)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **settings | options)


def ema_of(steps: list[Tensor], decay: float) -> Tensor:
    average = steps[0].double()
    for step in steps[1:]:
        average = decay * average + (1 - decay) * step.double()
    return average


def test_same_arguments_as_lightnings_callbacks() -> None:
    import inspect

    for name in ("WeightAveraging", "EMAWeightAveraging"):
        theirs = inspect.signature(getattr(stock, name)).parameters
        here = inspect.signature(getattr(ours, name)).parameters
        assert set(theirs) <= set(here), name
        assert getattr(ours, name)().state_key == getattr(stock, name)().state_key


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"val_check_interval": 3}, {"max_steps": 5}],
    ids=str,
)
def test_same_averages_validations_and_result_as_lightnings(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    results = []
    for callback in (
        stock.EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=1),
        EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=1),
    ):
        model = Net()
        trainer = trainer_of(tmp_path, callback, **options)
        trainer.fit(model, loader(), loader(8))
        results.append((model, trainer, callback))
    (theirs, _, their_callback), (mine, trainer, callback) = results
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(mine.state_dict()[name], tensor, msg=name)
    assert len(theirs.validated) == len(mine.validated)
    assert int(callback._average_model.n_averaged) == int(their_callback._average_model.n_averaged)
    for a, b in zip(theirs.validated, mine.validated, strict=True):
        torch.testing.assert_close(a, b)
    # Outside of a fit the module is validated as it is.
    with torch.no_grad():
        mine.head.weight.fill_(5)
    trainer.validate(mine, loader(8), verbose=False)
    assert (mine.validated[-1] == 5).all()


def test_live_weights_come_back_after_an_error_in_a_validation(tmp_path: Path) -> None:
    class Fails(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.trainer.current_epoch == 1:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise RuntimeError("broken metric")

    model = Fails()
    callback = EMAWeightAveraging(decay=0.5)
    with pytest.raises(RuntimeError, match="broken metric"):
        trainer_of(tmp_path, callback).fit(model, loader(), loader(8))
    assert model.head.weight.equal(model.steps[-1])
    average = ema_of(model.steps, 0.5)
    torch.testing.assert_close(model.validated[-1].double(), average)
    # A checkpoint of this moment has each under its own key.
    checkpoint = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert checkpoint["current_model_state"]["head.weight"].equal(model.steps[-1])
    torch.testing.assert_close(checkpoint["state_dict"]["head.weight"].double(), average)
    assert not callback._hooks and callback._context is None


def test_an_average_without_updates_replaces_nothing(tmp_path: Path) -> None:
    model = Net()
    callback = EMAWeightAveraging(update_starting_at_step=1000)
    trainer = trainer_of(tmp_path, callback, num_sanity_val_steps=1)
    trainer.fit(model, loader(), loader(4))
    assert model.head.weight.equal(model.steps[-1])
    assert model.validated[-1].equal(model.steps[-1])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["head.weight"].equal(model.steps[-1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_not_averaged(tmp_path: Path, fused: bool) -> None:
    class Overflows(Net):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 2:
                assert self.head.weight.grad is not None
                self.head.weight.grad.fill_(float("inf"))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    model = Overflows()
    callback = WeightAveraging(rule=SWA())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    trainer_of(tmp_path, callback, plugins=[plugin], max_epochs=1).fit(model, loader())
    assert len(model.steps) == 6 and int(callback._average_model.n_averaged) == 5
    kept = torch.stack([*model.steps[:2], *model.steps[3:]]).double().mean(0)
    torch.testing.assert_close(model.head.weight.detach().double(), kept)


def same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        same(dict(enumerate(a)), dict(enumerate(b)), where)
    elif isinstance(a, Tensor):
        assert a.equal(b), where
    else:
        assert a == b, where


def run(folder: Path, *more: Callback, resume: str | None = None) -> tuple[Net, Any]:
    model = Net()
    every = stock.ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)
    callback = WeightAveraging(rule=Power(1.0), update_bn=3)
    trainer = trainer_of(folder, callback, every, *more, enable_checkpointing=True)
    trainer.fit(model, loader(), loader(8), ckpt_path=resume)
    return model, trainer


RUN = """
import sys
sys.path.insert(0, {tests!r})
from test_integrations_lightning import *

class Kill(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 9:
            os._exit(9)

run(Path({folder!r}), Kill())
"""


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    code = RUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    resumed, _ = run(tmp_path / "killed", resume=str(tmp_path / "killed/step=6.ckpt"))
    same(resumed.state_dict(), whole.state_dict())
    a, b = (torch.load(tmp_path / f"{w}/step=12.ckpt", weights_only=True)
            for w in ("whole", "killed"))  # fmt: skip
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        same(a[key], b[key], key)
    name = "WeightAveraging"
    same(a["callbacks"][name], b["callbacks"][name])
    assert a["callbacks"][name]["latest_update_step"] == 12


@pytest.mark.parametrize("first, second", [(stock, ours), (ours, stock)], ids=["ours", "theirs"])
def test_checkpoints_load_both_ways(tmp_path: Path, first: Any, second: Any) -> None:
    def fit(kind: Any, epochs: int, resume: str | None = None) -> Any:
        model = Net()
        callback = kind.EMAWeightAveraging(decay=0.7)
        trainer = trainer_of(tmp_path, callback, max_epochs=epochs)
        trainer.fit(model, loader(), ckpt_path=resume)
        return model, trainer, callback

    expected, _, callback = fit(first, 3)
    half_way = Net()

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    averaging = first.EMAWeightAveraging(decay=0.7)
    trainer_of(tmp_path, averaging, Save(), max_epochs=1).fit(half_way, loader())
    resumed, _, other = fit(second, 3, str(tmp_path / "half.ckpt"))
    assert int(other._average_model.n_averaged) == int(callback._average_model.n_averaged) == 18
    for name, tensor in expected.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)
    # The average alone, for inference.
    plain = Net()
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    plain.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(plain.head.weight.double(), ema_of(half_way.steps, 0.7))


def test_batch_norm_of_the_average_without_an_epoch_more(tmp_path: Path) -> None:
    seen = []

    class Look(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append({name: b.clone() for name, b in self.body[1].named_buffers()})

    plain = Net()
    torch.manual_seed(8)
    trainer_of(tmp_path).fit(plain, loader(shuffle=True), loader(8))
    model = Look()
    callback = WeightAveraging(rule=SWA(), update_bn=True)
    torch.manual_seed(8)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model, loader(shuffle=True), loader(8))
    # Training itself saw nothing of it: no batch more, the same order of the data.
    assert trainer.global_step == 12 == len(model.steps)
    same(dict(enumerate(model.steps)), dict(enumerate(plain.steps)))
    expected = Net()
    expected.load_state_dict(model.state_dict())
    swa_fast.update_bn(loader(), expected)
    # The means of the batches' means are the same in whatever order, their variances' are not.
    mean = expected.body[1].running_mean
    torch.testing.assert_close(model.body[1].running_mean, mean)
    # Within the last validation they were the same, and for checkpoints they are in the average.
    torch.testing.assert_close(seen[-1]["running_mean"], mean)
    average = callback._average_model.module.body[1]
    same(dict(average.named_buffers()), dict(model.body[1].named_buffers()))
    assert not seen[0]["running_mean"].equal(seen[-1]["running_mean"])


def test_batch_norm_from_other_batches(tmp_path: Path) -> None:
    calls: list[int] = []

    def forward(model: Any, batch: Any) -> None:
        calls.append(len(batch[0]))
        model(batch[0])

    callback = WeightAveraging(update_bn=2, bn_loader=lambda: loader(12), bn_call=forward)
    model = Net()
    trainer_of(tmp_path, callback, max_epochs=1).fit(model, loader(persistent_workers=False))
    assert calls == [4, 4]

    for options, error in (
        ({"update_bn": -1}, "expected a number of batches, found -1"),
        ({"update_bn": 3, "use_buffers": True}, "found use_buffers=True"),
    ):
        with pytest.raises(ValueError, match=error):
            WeightAveraging(**options)
    with pytest.raises(ValueError, match="expected one DataLoader for training, found dict"):
        trainer_of(tmp_path, WeightAveraging(update_bn=3)).fit(Net(), {"a": loader()})
    kept = loader(num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="without persistent_workers"):
        trainer_of(tmp_path, WeightAveraging(update_bn=3)).fit(Net(), kept)


def test_an_error_while_statistics_are_estimated_leaves_live_weights(tmp_path: Path) -> None:
    def broken() -> Any:
        yield next(iter(loader()))
        raise OSError("disk")

    model = Net()
    callback = WeightAveraging(rule=EMA(0.5), update_bn=5, bn_loader=broken)
    with pytest.raises(OSError, match="disk"):
        trainer_of(tmp_path, callback).fit(model, loader(), loader(8))
    assert model.head.weight.equal(model.steps[-1]) and callback._context is None


def test_the_example_of_the_docstring_runs(tmp_path: Path) -> None:
    (code,) = code_of(ours)
    trainers = []

    def small(**options: Any) -> Trainer:
        callback = options.pop("callbacks")
        trainers.append(trainer_of(tmp_path, callback, **options | {"max_epochs": 1}))
        return trainers[-1]

    names = {"Trainer": small, "model": Net(), "loader": loader()}
    exec(code, names)
    assert [t.global_step for t in trainers] == [6, 6]
    assert os.path.isdir(tmp_path)
