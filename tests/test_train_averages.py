"""What methods make of a trajectory, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_runs import (
    ALL,
    EPOCHS,
    OPTIONS,
    STEPS,
    arguments,
    assert_same,
    follow,
    load,
    small_digits,
)

from swa_fast.train import cli, snapshot
from swa_fast.train.config import TrainConfig
from swa_fast.train.distributed import World
from swa_fast.train.methods import plan
from swa_fast.train.models import build_model
from swa_fast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small")


def test_average_is_the_mean_of_the_captured_weights(finished: Path) -> None:
    for method, epochs in (("swa", (3, 4, 5, 6)), ("swa-fixed", (3, 4, 5, 6))):
        captured = [
            {n: p.detach().double().clone() for n, p in run.model.named_parameters()}
            for _, run in follow(ALL, method)
            if run.epoch in epochs
        ]
        average = load(finished / f"model_{method}.pt")
        first = load(finished / f"model_{method}-1.pt")
        for name in captured[0]:
            for saved, part in ((average, captured), (first, captured[:2])):
                mean = torch.stack([weights[name] for weights in part]).mean(0)
                torch.testing.assert_close(saved[name].double(), mean, rtol=1e-6, atol=1e-7)


def test_exponential_average(finished: Path) -> None:
    """By hand, from the weights after every step of the conventional run."""
    config = TrainConfig.from_options(ALL)
    trainer = Trainer(config, small_digits(), World())
    run = trainer.start(plan(config)[0])
    decay, expected = 1 - 1 / STEPS, None

    def between() -> None:
        nonlocal expected
        weights = {n: p.detach().double().clone() for n, p in run.model.named_parameters()}
        if expected is None:
            expected = weights
        else:
            expected = {n: decay * expected[n] + (1 - decay) * w for n, w in weights.items()}

    for _ in range(EPOCHS):
        trainer.train_epoch(run, between)
    assert expected is not None
    average = load(finished / "model_ema.pt")
    for name, value in expected.items():
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-6)


def test_cyclic_average_continues_the_conventional_run(finished: Path) -> None:
    """Two captures, after epochs 4 and 6, from the conventional run's state after epoch 2 with its
    momenta."""
    config = TrainConfig.from_options(ALL)
    trainer = Trainer(config, small_digits(), World())
    conventional, _, cyclic, *_ = plan(config)
    run = trainer.start(conventional)
    for _ in range(2):
        trainer.train_epoch(run)
    state = snapshot.take(trainer, run)
    assert_same(
        dict(state["model"]), dict(load(finished / "checkpoints/sgd-branch-00002.pt")["model"])
    )
    other = trainer.start(cyclic)
    snapshot.continue_from(trainer, other, state, Path("here"))
    buffers = [s["momentum_buffer"] for s in other.optimizer.state.values()]
    assert len(buffers) == len(list(other.model.parameters())) and any(b.any() for b in buffers)
    captured = []
    while other.epoch < 6:
        trainer.train_epoch(other)
        if other.epoch in (4, 6):
            captured.append({n: p.detach().clone() for n, p in other.model.named_parameters()})
    average = load(finished / "model_swa-cyclic.pt")
    for name in captured[0]:
        mean = torch.stack([weights[name].double() for weights in captured]).mean(0)
        torch.testing.assert_close(average[name].double(), mean, rtol=1e-6, atol=1e-7)


def test_the_members_of_an_ensemble_are_averaged_too(tmp_path: Path) -> None:
    """The mean of their weights, with statistics of its own."""
    assert cli.main(arguments(tmp_path, methods="fge", epochs=6, fge_start=0.3)) == 0
    members = [load(path) for path in sorted(tmp_path.glob("model_fge-[0-9]*.pt"))]
    average = load(tmp_path / "model_fge-average.pt")
    model = build_model("preresnet8", in_channels=1, num_classes=3, width=2)
    for name, _ in model.named_parameters():
        mean = torch.stack([member[name].double() for member in members]).mean(0)
        torch.testing.assert_close(average[name].double(), mean, rtol=1e-6, atol=1e-7)
    model.load_state_dict(average)
    trainer = Trainer(TrainConfig.from_options({**OPTIONS, "epochs": 6}), small_digits(), World())
    trainer.evaluation.renew_statistics(model, 6)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(average[name], buffer)
    rows = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert [(r["name"], r["captures"]) for r in rows] == [
        ("FGE", 3),
        ("FGE, average of members", 3),
    ]
    assert rows[1]["test_accuracy"] == pytest.approx(trainer.evaluation.score(model)[1])


def test_ensemble_averages_probabilities(tmp_path: Path) -> None:
    """Two members, by hand, from their saved weights."""
    assert cli.main(arguments(tmp_path, methods="sgd,fge", epochs=6, fge_start=0.3)) == 0
    summary = {
        r["method"]: r for r in json.loads((tmp_path / "results.json").read_text())["summary"]
    }
    config = TrainConfig.from_options({**OPTIONS, "epochs": 6})
    trainer = Trainer(config, small_digits(), World())
    members = sorted(tmp_path.glob("model_fge-[0-9]*.pt"))
    assert len(members) == summary["fge"]["captures"] == 3
    outputs = []
    labels = small_digits().test_labels
    for path in members:
        model = build_model("preresnet8", in_channels=1, num_classes=3, width=2)
        model.load_state_dict(load(path))
        model.eval()
        with torch.no_grad():
            outputs += [model(images).softmax(1) for images, _ in trainer.evaluation.test_batches()]
    mean = torch.stack(outputs).mean(0)
    correct = (mean.argmax(1) == labels).double().mean().item()
    assert summary["fge"]["test_accuracy"] == pytest.approx(100 * correct)
    loss = torch.nn.functional.nll_loss(mean.log(), labels).item()
    assert summary["fge"]["test_loss"] == pytest.approx(loss, rel=1e-5)
