"""Statistics of all layers of a device in flat storage, and what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backends, _ops
from .._layout import (
    ACCUMULATOR_ROWS,
    BATCHES,
    MEAN,
    MEAN_M2,
    SPREAD,
    VALUES,
    VAR_M2,
)
from .layers import Layer


class Statistics:
    """Accumulators of all layers on one device, one after the other in flat storage."""

    def __init__(
        self, layers: Sequence[Layer], device: torch.device, estimator: str, backend: str | None
    ) -> None:
        self.layers = layers
        self.device = device
        self.estimator = estimator
        self.backend = _backends.choose_backend(device, backend)
        start = 0
        for place, layer in enumerate(layers):
            layer.statistics = self
            layer.place = place
            layer.start = start
            start += layer.channels
        self.channels = start
        self.accumulators = torch.zeros(ACCUMULATOR_ROWS, start, dtype=torch.float64, device=device)
        tickets = self.split(_ops.batch_norm_tickets(device, start))
        for layer in layers:
            layer.tickets = tickets[layer.place]
        # A forward that uses a layer twice needs two batches' storage: nothing is merged before the
        # forward has come to its end.
        self.batches: list[Tensor] = []
        self.parts: list[Sequence[Tensor]] = []  # views of batches, by layer
        self.used = 0

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """Cuts ``flat`` [..., channels] into the layers' parts, in their order."""
        # One call for all: each view by itself would take as long as a small kernel.
        sizes = [layer.channels for layer in self.layers]
        parts: Sequence[Tensor] = flat.split(sizes, dim=-1)
        return parts

    def batch(self, layer: Layer) -> Tensor:
        """Returns the storage [4, channels] for the statistics of the layer's next use."""
        use = layer.uses
        if use == len(self.batches):
            flat = torch.zeros(4, self.channels, dtype=torch.float64, device=self.device)
            self.batches.append(flat)
            self.parts.append(self.split(flat))
        layer.uses = use + 1
        if use >= self.used:
            self.used = use + 1
        return self.parts[use][layer.place]

    def so_far(self, layer: Layer, unbiased: bool) -> tuple[Tensor, Tensor]:
        """Mean and variance of a layer's uses up to now, as torch's cumulative average has them in
        the layer's buffers at that moment: 0 and 1 before the first."""
        part = slice(layer.start, layer.start + layer.channels)
        merged = self.accumulators[:, part]
        count = merged[BATCHES].clone()
        mean = merged[MEAN].clone()
        variance = variance_of(merged, self.estimator, unbiased)
        variance = torch.where(count > 0, variance, 1.0)
        for use in range(layer.uses):
            values, _, batch_mean, deviations = self.parts[use][layer.place].unbind()
            count = count + (values > 0)
            share = (values > 0) / count.clamp(min=1)
            mean = mean + share * (batch_mean - mean)
            variance = variance + share * (deviations / (values - 1).clamp(min=1) - variance)
        return mean, variance

    def merge(self) -> None:
        for batch in self.batches[: self.used]:
            _ops.batch_norm_merge_(self.accumulators, batch, self.estimator, backend=self.backend)
        self.used = 0

    def discard(self) -> None:
        for batch in self.batches[: self.used]:
            batch[VALUES].zero_()
        self.used = 0


def variance_of(accumulators: Tensor, estimator: str, unbiased: bool) -> Tensor:
    if estimator != "pooled":
        return accumulators[SPREAD]
    values = accumulators[VALUES]
    return accumulators[SPREAD] / (values - 1 if unbiased else values)


def standard_errors(
    accumulators: Tensor, estimator: str, eps: Tensor | float, inflation: Tensor | None = None
) -> Tensor:
    """Computes the largest relative standard errors of mean and variance over the channels.

    Args:
        inflation: of the errors by the batches' dependence on each other, [2, channels].

    Returns:
        Two values, NaN if any statistic is not finite. Channels seen in one batch are infinitely
        uncertain; those seen in none do not count.
    """
    batches = accumulators[BATCHES]
    # With eps, as in the layer's own denominator: a dead channel's error matters to nobody.
    variance = variance_of(accumulators, estimator, unbiased=False) + eps
    scale = (batches * (batches - 1)).clamp(min=0).reciprocal()
    errors = torch.stack([accumulators[MEAN_M2], accumulators[VAR_M2]])
    errors = (errors * scale).sqrt()
    errors = errors / torch.stack([variance.sqrt(), variance])
    if inflation is not None:
        errors = errors * inflation.to(errors.device)
    errors = torch.where(batches == 1, math.inf, errors)
    errors = torch.where(batches == 0, 0.0, errors)
    return errors.amax(1)


def eps_of(statistics: Statistics, device: torch.device) -> Tensor | float:
    values = {layer.module.eps for layer in statistics.layers}
    if len(values) == 1:
        return float(values.pop())
    each = [torch.full((layer.channels,), float(layer.module.eps)) for layer in statistics.layers]
    return torch.cat(each).double().to(device, non_blocking=True)


def check_finite(accumulators: Sequence[Tensor], statistics: Sequence[Statistics]) -> None:
    """Checks that all means and variances are finite.

    Args:
        accumulators: one for each of ``statistics``, on the CPU.

    Raises:
        FloatingPointError: a mean or variance is not finite.
    """
    bad = []
    for values, part in zip(accumulators, statistics, strict=True):
        finite = values[MEAN : SPREAD + 1].isfinite().all(0)
        if not finite.all():
            each = zip(part.layers, part.split(finite), strict=True)
            bad += [layer for layer, channels in each if not channels.all()]
    if bad:
        first = min(bad, key=lambda layer: layer.order)
        raise FloatingPointError(
            f"layer {first.name}: expected finite activations, found a NaN or an infinity; it is "
            f"the first of {len(bad)} such layers in the order of the forward"
        )


def used_layers(
    statistics: Sequence[Statistics], accumulators: Sequence[Tensor], unbiased: bool
) -> list[Layer]:
    """Lists the layers that a forward has used, in the order of the model.

    Raises:
        ValueError: the variance of one of them is not defined.
    """
    used = []
    for part, merged in zip(statistics, accumulators, strict=True):
        starts = [layer.start for layer in part.layers]
        batches, values = merged[[BATCHES, VALUES]][:, starts].tolist()
        for layer, batch_count, value_count in zip(part.layers, batches, values, strict=True):
            if batch_count == 0:
                continue
            if unbiased and value_count < 2:
                raise ValueError(
                    f"layer {layer.name}: expected more than 1 value per channel in the whole "
                    "pass, found 1"
                )
            used.append(layer)
    return sorted(used, key=lambda layer: layer.index)


def write(
    statistics: Sequence[Statistics],
    accumulators: Sequence[Tensor],
    used: Sequence[Layer],
    unbiased: bool,
) -> None:
    """Writes the layers' statistics into their buffers.

    Args:
        accumulators: one for each of ``statistics``, on any device.
        used: the layers to write.
    """
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for part, merged in zip(statistics, accumulators, strict=True):
        ours = merged.to(part.device)
        means = part.split(ours[MEAN])
        variances = part.split(variance_of(ours, part.estimator, unbiased))
        batches = part.split(ours[BATCHES])
        for layer in used:
            if layer.statistics is not part:
                continue
            module = layer.module
            assert module.running_mean is not None and module.running_var is not None
            targets += [module.running_mean, module.running_var]
            values += [means[layer.place], variances[layer.place]]
            if module.num_batches_tracked is not None:
                targets.append(module.num_batches_tracked)
                values.append(batches[layer.place][0])
    # One call, which a KeyboardInterrupt cannot divide.
    torch._foreach_copy_(targets, values)
