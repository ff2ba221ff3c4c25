"""BatchNorm statistics behind the names and conventions of ``fvcore.nn.precise_bn``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .options import Options
from .report import BNReport
from .run import reestimate

__all__ = ["BN_MODULE_TYPES", "get_bn_modules", "update_bn_stats"]

BN_MODULE_TYPES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)

_log = logging.getLogger("swa_fast")


def get_bn_modules(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of ``model`` that are in training mode. Drop-in for fvcore's function of
    this name."""
    return [
        module
        for module in model.modules()
        if module.training and isinstance(module, BN_MODULE_TYPES)
    ]


def _at_least(loader: Iterable[Any], count: int) -> Iterator[Any]:
    found = 0
    for batch in itertools.islice(loader, count):
        yield batch
        found += 1
    if found < count:
        raise AssertionError(
            f"data_loader: expected at least num_iters = {count} batches, found {found}"
        )


@torch.no_grad()
def update_bn_stats(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int = 200,
    progress: str | None = None,
) -> BNReport:
    r"""Replaces the running statistics of the BatchNorm layers that are in training mode by those
    of ``num_iters`` batches. Drop-in for ``fvcore.nn.precise_bn.update_bn_stats``.

    With the notation of :func:`swa_fast.update_bn` the statistics are those of all values together,
    the variance biased:

    .. math::
        \mu = \sum_k \frac{m_k}{M} \mu_k \qquad
        \sigma^2 = \sum_k \frac{m_k}{M} \left(\sigma_k^2 + (\mu_k - \mu)^2\right)

    merged in float64 without fvcore's difference of squares, :math:`E[x^2] - \mu^2`, which loses
    all digits where the mean is large against the standard deviation.

    Modes are left as they are: layers in eval mode keep their statistics, and a model without a
    layer in training mode is left alone. A layer may be used several times in a forward, which
    fvcore refuses. If anything raises, nothing has changed.

    Args:
        model: called as ``model(batch)`` with each batch as it comes.
        data_loader: the batches, which have to be on the model's device.
        num_iters: how many batches to use.
        progress: ``tqdm`` shows a progress bar; None does not.

    Returns:
        What was done (fvcore returns None).

    Raises:
        AssertionError: ``data_loader`` has fewer than ``num_iters`` batches.
        ValueError: ``num_iters`` below 1, or another ``progress``.
        FloatingPointError, TypeError: as :func:`swa_fast.update_bn`.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576.
    """
    if num_iters < 1:
        raise ValueError(f"num_iters: expected 1 or more, found {num_iters}")
    if progress not in (None, "tqdm"):
        raise ValueError(f"progress: expected None or 'tqdm', found {progress!r}")
    _log.info("computing BatchNorm statistics from %d batches", num_iters)
    options = Options(
        estimator="pooled",
        unbiased=False,
        max_batches=num_iters,
        progress=progress == "tqdm",
        whole_batch=True,
        switch_mode=False,
    )
    return reestimate(_at_least(data_loader, num_iters), model, options)
