"""Epochs by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import EPOCHS, OPTIONS, arguments, assert_same, follow, records, small_digits

from swa_fast.train import cli
from swa_fast.train.config import TrainConfig
from swa_fast.train.distributed import World
from swa_fast.train.methods import plan
from swa_fast.train.randomness import derive_seed
from swa_fast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small")


def test_two_epochs_by_hand() -> None:
    """Order, crops and the network's own draws of each epoch, the optimiser's settings, and the
    means over images of a network that draws random numbers, with a smaller last batch."""
    options = {
        **OPTIONS, "model": "shakeshake26-2x64d", "methods": ("sgd",), "epochs": 2,
        "nesterov": True, "weight_decay": 0.1, "momentum": 0.5, "lr_schedule": "constant",
    }  # fmt: skip
    trainer = Trainer(TrainConfig.from_options(options), small_digits(), World())
    model = trainer.build()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1, nesterov=True
    )
    for epoch, (_, run) in enumerate(follow(options, "sgd")):
        torch.manual_seed(derive_seed(OPTIONS["seed"], "train", epoch))
        model.train()
        loss, correct = 0.0, 0
        for images, labels in trainer.batches.epoch(derive_seed(OPTIONS["seed"], "augment", epoch)):
            logits = model(images)
            mean = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            loss += mean.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        assert run.records[epoch]["train_loss"] == pytest.approx(loss / 60, rel=1e-5)
        assert run.records[epoch]["train_accuracy"] == pytest.approx(100 * correct / 60)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert epoch == 1


def test_initial_scales_of_2018() -> None:
    """BatchNorm's scales are uniform; everything else starts as it does without the option."""
    models = [
        Trainer(TrainConfig.from_options({**OPTIONS, "bn_gamma": gamma}), small_digits(), World())
        .build()
        .state_dict()
        for gamma in ("ones", "uniform")
    ]
    norms = [name for name in models[0] if name.replace("weight", "running_var") in models[0]]
    norms = [name for name in norms if name.endswith("weight")]
    assert norms
    for name, value in models[0].items():
        assert torch.equal(models[1][name], value) != (name in norms), name
    scales = torch.cat([models[1][name] for name in norms])
    assert 0 <= scales.min() < 0.2 and 0.8 < scales.max() < 1


def test_training_goes_on_from_the_iterate_not_from_the_average() -> None:
    *_, (_, averaging) = follow(OPTIONS, "swa")
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, small_digits(), World())
    plain = trainer.start(plan(config)[1])
    plain.averages.clear()
    for _ in range(EPOCHS):
        trainer.train_epoch(plain)
    assert_same(dict(plain.model.state_dict()), dict(averaging.model.state_dict()))


def test_compiled_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front only: generating code takes minutes on a busy machine."""
    compiled = []

    def compile_front(function: Any) -> Any:
        compiled.append(function)
        return original(function, backend="aot_eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_front)
    options = {"epochs": 1, "methods": "sgd"}
    assert cli.main([*arguments(tmp_path / "a", **options), "--compile"]) == 0
    assert len(compiled) == 1 and isinstance(compiled[0], nn.Module)
    assert cli.main(arguments(tmp_path / "b", **options)) == 0
    a, b = records(tmp_path / "a")[0], records(tmp_path / "b")[0]
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu(simulator: Any) -> None:
    """An epoch of four times as many steps has no more waits; averaging after every step
    included."""
    waits = []
    for batch_size in (32, 8):
        options = {**OPTIONS, "methods": ("ema",), "batch_size": batch_size, "device": "cuda"}
        config = TrainConfig.from_options({**options, "eval_every": EPOCHS})
        trainer = Trainer(config, small_digits(), World())
        run = trainer.start(plan(config)[0])
        trainer.train_epoch(run)
        simulator.reset()
        trainer.train_epoch(run)
        waits.append(simulator.counters()["total"]["host_syncs"])
        assert len(trainer.batches) == 64 // batch_size
    assert waits[0] == waits[1]
