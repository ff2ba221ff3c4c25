"""When a pass with a tolerance ends: after batches in random order, correlated ones, a drift."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import swa_fast

CHANNELS = 32


def correlated(rho: float, batches: int = 1500, size: int = 16) -> list[Tensor]:
    """Batches whose means follow an autoregression with standard deviation 1/2 around 0; values
    have standard deviation about 1."""
    means = torch.empty(batches, 1, CHANNELS)
    level = torch.randn(CHANNELS)
    for k in range(batches):
        level = rho * level + math.sqrt(1 - rho * rho) * torch.randn(CHANNELS)
        means[k, 0] = level / 2
    return list(means + math.sqrt(0.75) * torch.randn(batches, size, CHANNELS))


@pytest.mark.parametrize("estimator", ["torch", "weighted", "pooled"])
def test_stops_when_the_errors_are_within_the_tolerance(estimator: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    batches = [torch.randn(32, 4) * 3 + 1 for _ in range(400)]
    report = swa_fast.update_bn(batches, model, tolerance=0.05, estimator=estimator)
    assert 10 <= report.batches < 200
    assert report.converged is True
    assert max(report.mean_error, report.var_error) <= 0.05
    k = report.batches
    stacked = torch.stack(batches[:k]).double()
    means, variances = stacked.mean(1), stacked.var(1)
    spread = {"pooled": stacked.flatten(0, 1).var(0, correction=0)}.get(
        estimator, variances.mean(0)
    )
    plain_error = (means.std(0) / math.sqrt(k) / spread.sqrt()).max().item()
    # Widened by a correlation that is there by chance.
    assert plain_error <= report.mean_error <= 1.5 * plain_error
    # Without a tolerance nothing is known of the correlation.
    plain = swa_fast.update_bn(batches, model, max_batches=k, estimator=estimator)
    assert plain.correlation is None and plain.converged is None
    assert plain.mean_error <= report.mean_error
    # One batch fewer would not have been enough.
    fewer = swa_fast.update_bn(
        batches, model, max_batches=k - 1, tolerance=0.05, estimator=estimator
    )
    assert fewer.converged is False


def test_random_order_costs_few_batches_more_than_the_plain_standard_error() -> None:
    report = swa_fast.update_bn(correlated(0.0), nn.BatchNorm1d(CHANNELS), tolerance=0.1)
    assert report.converged and report.correlation < 0.25
    # (1/4 + 0.75/16) / n = 0.01 for a channel of average scatter.
    assert 25 < report.batches < 90


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_correlated_batches(rho: float) -> None:
    """Standard errors of independent batches would end these passes at once."""
    beyond = total = 0
    for _ in range(5):
        model = nn.BatchNorm1d(CHANNELS)
        report = swa_fast.update_bn(correlated(rho), model, tolerance=0.15)
        assert report.converged and report.correlation > 0.7 * rho
        beyond += int((model.running_mean.abs() > 2 * 0.15).sum())
        total += CHANNELS
    assert beyond <= 0.05 * total
    assert "correlation of neighbouring batches" in str(report)


def test_sorted_values_do_not_converge() -> None:
    x = torch.randn(4000, 8)
    for column in range(8):
        x[:, column] = x[x[:, column].argsort(), column]
    model = nn.BatchNorm1d(8)
    report = swa_fast.update_bn(x.split(20), model, tolerance=0.1)
    assert report.batches == 200 and report.converged is False
    assert report.correlation > 0.95


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_loader_in_order_is_read_to_its_end(
    shuffle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """By class: nothing in the first batches tells that others will come."""
    x = torch.randn(2000, 4) + 5 * torch.arange(4).repeat_interleave(500)[:, None]
    loader = DataLoader(TensorDataset(x), batch_size=20, shuffle=shuffle)
    model = nn.BatchNorm1d(4)
    with caplog.at_level(logging.WARNING, "swa_fast"):
        report = swa_fast.update_bn(loader, model, tolerance=0.2)
    assert ("in order" in caplog.text) is not shuffle
    if shuffle:
        assert report.converged and report.batches < 100
    else:
        assert report.batches == 100
        torch.testing.assert_close(model.running_mean, x.mean(0), rtol=1e-4, atol=1e-4)
        part = swa_fast.update_bn(loader, model, tolerance=0.2, max_batches=20)
        assert part.converged is False


def test_ten_batches_at_least_and_dead_channels_do_not_matter() -> None:
    model = nn.BatchNorm1d(2)
    x = torch.randn(64, 1)
    batches = [torch.cat([x + 0.1 * (-1) ** k, 1e-9 * torch.randn(64, 1)], 1) for k in range(19)]
    report = swa_fast.update_bn(batches, model, tolerance=0.5)
    assert 10 <= report.batches < 18 and report.converged
    report = swa_fast.update_bn(batches[:9], model, tolerance=0.5)
    assert report.batches == 9 and report.converged is False


def test_tolerance_out_of_reach_is_said() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    report = swa_fast.update_bn([x, 2 * x] * 8, nn.BatchNorm1d(2), tolerance=1e-6)
    assert report.batches == 16 and report.converged is False
    assert "above the tolerance" in str(report)


def test_a_layer_used_several_times_counts_once_for_the_correlation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> None:
            self.bn(x)
            self.bn(x + 3)

    report = swa_fast.update_bn([torch.randn(16, 4) for _ in range(60)], Twice(), tolerance=1e-3)
    assert report.batches == 60 and report.correlation < 0.4


@pytest.mark.gpu
def test_a_tolerance_where_new_tensors_are_on_a_gpu() -> None:
    batches = [torch.randn(32, 4, device="cpu") for _ in range(40)]
    torch.set_default_device("cuda")
    try:
        model = nn.BatchNorm1d(4)
        report = swa_fast.update_bn([x.to("cuda") for x in batches], model, tolerance=0.5)
        averager = swa_fast.Averager(model, {"swa": swa_fast.SWA()}, device="cpu")
        averager.update()
    finally:
        torch.set_default_device(None)
    assert report.converged is True and report.batches < 40
    assert averager.averages["swa"]["weight"].device.type == "cpu"
