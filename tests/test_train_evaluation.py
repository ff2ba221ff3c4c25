"""Scores of networks and ensembles, and the BatchNorm statistics of averages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import (
    ALL,
    EPOCHS,
    OPTIONS,
    STEPS,
    arguments,
    assert_same,
    load,
    records,
    small_digits,
    words,
)

from swa_fast.train import cli
from swa_fast.train.averages import Ensemble
from swa_fast.train.clock import Clock
from swa_fast.train.config import TrainConfig
from swa_fast.train.distributed import World
from swa_fast.train.errors import TrainError
from swa_fast.train.randomness import derive_seed
from swa_fast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small")


def test_average_has_batch_norm_statistics_of_its_own(finished: Path) -> None:
    config = TrainConfig.from_options(OPTIONS)
    trainer = Trainer(config, small_digits(), World())
    model = trainer.build()
    model.load_state_dict(load(finished / "model_swa-1.pt"))
    found = {n: b.clone() for n, b in model.named_buffers()}
    # Over the first layer's input, by hand: the mean over all images.
    seed = derive_seed(config.seed, "bn", EPOCHS - 1)
    model.train()
    means, counts = [], []
    with torch.no_grad():
        for images, _ in trainer.batches.epoch(seed):
            means.append(model.conv1(images).mean((0, 2, 3)))  # type: ignore[operator]
            counts.append(len(images))
    shares = torch.tensor(counts) / sum(counts)
    assert counts[0] != counts[1]
    torch.testing.assert_close(
        found["layer1.0.bn1.running_mean"],
        (torch.stack(means) * shares[:, None]).sum(0),
        rtol=1e-4,
        atol=1e-5,
    )
    assert found["bn.num_batches_tracked"] == STEPS


def test_passes_for_curves_see_the_first_batches_only(finished: Path, tmp_path: Path) -> None:
    """Half of the batches is one of two; reported results, and the training, stay the same."""
    assert cli.main(["train", "--out", str(tmp_path), *words({**ALL, "curve_data": 0.5})]) == 0
    for whole, short in zip(records(finished), records(tmp_path), strict=True):
        reported = short["epoch"] in (4, 6)
        for method, average in short["averages"].items():
            if average["test_loss"] is not None and method != "fge":
                assert average["bn_share"] == (1.0 if reported else 0.5)
                changed = average["test_loss"] != whole["averages"][method]["test_loss"]
                assert changed != reported, (method, short["epoch"])
                average |= {"bn_share": 1.0, "test_loss": None, "test_accuracy": None}
                whole["averages"][method] |= {"test_loss": None, "test_accuracy": None}
        assert short == whole
    for path in finished.glob("model_*.pt"):
        assert_same(load(tmp_path / path.name), load(path))
    trainer = Trainer(TrainConfig.from_options(OPTIONS), small_digits(), World())
    model = trainer.build()
    trainer.evaluation.renew_statistics(model, 3, share=0.5)
    images, _ = next(trainer.batches.epoch(derive_seed(OPTIONS["seed"], "bn", 2)))
    with torch.no_grad():
        mean = model.conv1(images).mean((0, 2, 3))  # type: ignore[operator]
    found = model.get_buffer("layer1.0.bn1.running_mean")
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)


def test_a_pass_over_weights_that_diverged_is_an_error_of_the_training() -> None:
    trainer = Trainer(TrainConfig.from_options(OPTIONS), small_digits(), World())
    model = trainer.build()
    model.conv1.weight.data.fill_(math.nan)  # type: ignore[union-attr,operator]
    with pytest.raises(TrainError, match=r"epoch 3: .*; the training diverged, try a lower --lr"):
        trainer.evaluation.renew_statistics(model, 3)


def test_passes_for_curves_can_be_left_out(tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path, curve_data=0.0)) == 0
    averages = [r["averages"]["swa"] for r in records(tmp_path) if r["trajectory"] == "swa"]
    assert [a["test_loss"] is not None for a in averages] == [False, False, False, True]
    assert [a["captures"] for a in averages] == [0, 0, 1, 2]


def test_an_ensemble_that_rules_a_label_out_has_a_finite_loss() -> None:
    """Two networks so sure of the first class that float32 leaves nothing for the second."""
    evaluation: Any = Trainer(TrainConfig.from_options(OPTIONS), small_digits(), World()).evaluation
    evaluation.test_labels = torch.tensor([0, 1])
    evaluation._device = torch.device("cpu")
    clock = Clock(torch.device("cpu"))
    ensemble = Ensemble(lambda epoch: True)
    for scale in (200.0, 300.0):
        evaluation.probabilities = lambda _, s=scale: torch.tensor([[s, 0.0]] * 2).softmax(1)
        ensemble.capture(nn.Identity(), evaluation, clock)
    loss, accuracy = ensemble.score(1, evaluation, clock)
    assert accuracy == 50.0
    # Of the two labels one costs nothing and one the logarithm of the least float32.
    assert loss == pytest.approx(149 * math.log(2) / 2)
