"""Scores of networks and ensembles, and the BatchNorm statistics of averages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import EPOCHS, OPTIONS, STEPS, load, small_digits

from swa_fast.train.averages import Ensemble
from swa_fast.train.clock import Clock
from swa_fast.train.config import TrainConfig
from swa_fast.train.distributed import World
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


def test_an_ensemble_that_rules_a_label_out_has_a_finite_loss() -> None:
    """Two networks so sure of the first class that float32 leaves nothing for the second."""
    evaluation: Any = Trainer(TrainConfig.from_options(OPTIONS), small_digits(), World()).evaluation
    evaluation._test_labels = torch.tensor([0, 1])
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
