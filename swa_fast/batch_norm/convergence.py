"""How sure the statistics of a pass are, and when a pass with a tolerance may end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import BATCHES, MEAN_MEAN, VAR_MEAN
from .statistics import Statistics, eps_of, standard_errors

# A pass ends after as many batches as say what this number of independent ones would. Fewer do not
# show how they depend on each other: the first of a slow drift look alike.
MIN_INDEPENDENT = 10

# Of the correlation, for which more batches would be needed than anybody has.
_LARGEST = 0.999


class _Series:
    """Statistics of batches, or of blocks of them, one after the other: [2, channels] each."""

    def __init__(self, like: Tensor) -> None:
        self.length = 0
        self.average, self.deviations, self.differences = (torch.zeros_like(like) for _ in range(3))
        self.last = like

    def append(self, values: Tensor) -> None:
        self.length += 1
        delta = values - self.average
        self.average = self.average + delta / self.length
        self.deviations = self.deviations + delta * (values - self.average)
        if self.length > 1:
            self.differences = self.differences + (values - self.last).square()
        self.last = values


class Dependence:
    r"""How much the batches that were read depend on each other, in the channels of one device.

    Of the batches' statistics :math:`x_k` (means; variances) and of the averages of 2, 4, 8, ...
    batches in a row, each with its own mean :math:`\bar x`, sums being over the channels of a layer
    too,

    .. math::
        \rho = 1 - \frac{\sum_k (x_k - x_{k-1})^2}{2 \sum_k (x_k - \bar x)^2}

    estimates the correlation of neighbours (von Neumann's ratio: 0 on average for independent
    ones, however few). If that decays geometrically with the distance, the variance of
    :math:`\bar x` is :math:`\tau = (1 + \rho) / (1 - \rho)` times what independent ones would
    have. Of single batches and of all blocks of which there are ten or more, the largest variance
    of :math:`\bar x` counts, so that correlations which are weak but long are found, too. K batches
    then tell as much as :math:`K / \tau` independent ones.

    Sources: von Neumann, "Distribution of the Ratio of the Mean Square Successive Difference to the
    Variance", 1941; Flyvbjerg and Petersen, "Error estimates on averages of correlated data", 1989.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.eps = eps_of(statistics, statistics.device)
        device = statistics.device
        zeros = torch.zeros(3, statistics.channels, dtype=torch.float64, device=device)
        self.total = zeros
        self.series = [_Series(zeros[1:])]
        sizes = torch.tensor([layer.channels for layer in statistics.layers])
        self.layer_of = (
            torch.arange(len(sizes)).repeat_interleave(sizes).to(device, non_blocking=True)
        )
        self.sizes = sizes.to(device, non_blocking=True)
        starts = torch.tensor([layer.start for layer in statistics.layers])
        self.starts = starts.to(device, non_blocking=True)

    def update(self) -> None:
        """Takes in the batch that has just been merged: what it has added to the accumulators. A
        layer that it used several times counts once, with the average of the uses."""
        merged = self.statistics.accumulators
        uses = merged[BATCHES]
        total = torch.stack([uses, uses * merged[MEAN_MEAN], uses * merged[VAR_MEAN]])
        new = total - self.total
        self.total = total
        values = torch.where(new[0] > 0, new[1:] / new[0].clamp(min=1), self.series[0].average)
        for level in itertools.count():
            series = self.series[level]
            before = series.last
            series.append(values)
            if series.length % 2:
                break
            values = (before + values) / 2
            if level + 1 == len(self.series):
                self.series.append(_Series(values))

    def correlations(self) -> tuple[Tensor, Tensor]:
        """Of every layer, for means and variances, [2, layers]: the correlation of neighbouring
        batches, not below 0, and by how much the variance of the average over all of them exceeds
        that of independent ones, not below 1."""
        single = self.series[0]
        # Channels count alike, whatever their scale.
        scale = single.deviations / max(single.length - 1, 1)
        scale = torch.where(scale > 0, scale.reciprocal(), 0.0)
        correlation: Tensor | None = None
        factor = torch.ones(2, len(self.starts), dtype=torch.float64, device=self.starts.device)
        variance_of_one = factor
        for series in self.series:
            if series is not single and series.length < MIN_INDEPENDENT:
                break
            sums = torch.zeros(2, *factor.shape, dtype=torch.float64, device=factor.device)
            sums.index_add_(
                2, self.layer_of, torch.stack([series.differences, series.deviations]) * scale
            )
            differences, deviations = sums.unbind()
            rho = torch.where(deviations > 0, 1 - differences / (2 * deviations), 0.0)
            if correlation is None:
                correlation = rho.clamp(0.0, _LARGEST)
                # The upper end of the interval that holds the correlation with 95 %.
                rho = (
                    rho
                    + 2 * ((1 - rho.square()).clamp(min=0) / (series.length * self.sizes)).sqrt()
                )
            rho = rho.clamp(0.0, _LARGEST)
            variance = deviations / max(series.length - 1, 1) / series.length
            if series is single:
                variance_of_one = torch.where(variance > 0, variance, 1.0)
            excess = variance / variance_of_one * (1 + rho) / (1 - rho)
            # A NaN stays one.
            factor = torch.where(excess <= factor, factor, excess)
        assert correlation is not None
        return correlation, factor

    def independent(self) -> tuple[Tensor, Tensor]:
        """The largest correlation of a layer, and the least number of independent batches that a
        layer's batches are worth."""
        correlation, factor = self.correlations()
        batches = self.statistics.accumulators[BATCHES, self.starts].clamp(
            max=self.series[0].length
        )
        worth = torch.where(batches > 0, batches / factor.amax(0), math.inf)
        return correlation.amax(), worth.amin()

    def inflation(self) -> Tensor:
        """Of standard errors of means and of variances, by the dependence of the layer they belong
        to, [2, channels]."""
        return self.correlations()[1][:, self.layer_of].sqrt()


class Convergence:
    """Compares the standard errors with a tolerance, without waiting for a GPU: there a comparison
    is started behind one batch and its outcome found behind a later one."""

    def __init__(self, statistics: Sequence[Statistics], tolerance: float) -> None:
        self.dependences = [Dependence(s) for s in statistics]
        self.tolerance = tolerance
        self.pending: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def update(self) -> None:
        for dependence in self.dependences:
            dependence.update()

    def reached(self) -> bool:
        if not self.pending:
            self.pending = [_copy_to_host(_judged(d)) for d in self.dependences]
        if any(event is not None and not event.query() for _, event in self.pending):
            return False
        found = [judged.tolist() for judged, _ in self.pending]
        self.pending = []
        # A statistic that is not finite stays so: the pass may as well end, with that error.
        if any(math.isnan(error) for part in found for error in part[:2]):
            return True
        return all(
            max(errors) <= self.tolerance and worth >= MIN_INDEPENDENT
            for *errors, _, worth in found
        )

    def correlation(self) -> float:
        return max(float(d.independent()[0]) for d in self.dependences)

    def enough(self) -> bool:
        """Whether the batches are worth enough independent ones for the errors to mean anything."""
        return all(float(d.independent()[1]) >= MIN_INDEPENDENT for d in self.dependences)


def _judged(dependence: Dependence) -> Tensor:
    """Standard errors of mean and variance, correlation, independent batches, on the device."""
    s = dependence.statistics
    errors = standard_errors(s.accumulators, s.estimator, dependence.eps, dependence.inflation())
    return torch.cat([errors, torch.stack(dependence.independent())])


def _copy_to_host(errors: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """``errors`` on the CPU, and the event after which they are there; None if they are already."""
    if errors.device.type != "cuda":
        return errors, None
    pinned = torch.empty(errors.shape, dtype=errors.dtype, device="cpu", pin_memory=True)
    pinned.copy_(errors, non_blocking=True)
    # torch.Event(errors.device) forgets the device's index, and records on the stream of whichever
    # device is the current one: it could be over before the copy has begun.
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(errors.device))
    return pinned, event
