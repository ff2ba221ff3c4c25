"""Statistics of several ranks, each of which reads its own share of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .._layout import (
    BATCHES,
    MEAN,
    MEAN_M2,
    MEAN_MEAN,
    SAMPLES,
    SPREAD,
    VALUES,
    VAR_M2,
    VAR_MEAN,
)
from .collector import Collector
from .layers import Layer


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers ``values`` of every rank into a tensor [ranks, ...] on the CPU."""
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    mine = values.to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).cpu()


def agree(
    group: dist.ProcessGroup,
    layers: Sequence[Layer],
    options: tuple[object, ...],
    problem: Exception | None,
) -> None:
    """Checks, on all ranks, that their statistics can be merged.

    Raises:
        ValueError: their layers or options differ.
        RuntimeError: another rank has a ``problem``. This rank's own is raised as it is.
    """
    facts = repr(([(layer.name, layer.channels) for layer in layers], options))
    digest = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
    channels = sum(layer.channels for layer in layers)
    mine = torch.tensor([len(layers), channels, digest, problem is not None])
    everyone = _gather(mine, group).tolist()
    if problem is not None:
        raise problem
    failed = [rank for rank, row in enumerate(everyone) if row[3]]
    if failed:
        raise RuntimeError(f"group: rank {failed[0]} cannot take part, see its error")
    if any(row != everyone[0] for row in everyone):
        found = ", ".join(
            f"rank {rank}: {row[0]} layers, {row[1]} channels" for rank, row in enumerate(everyone)
        )
        raise ValueError(
            "group: expected the same BatchNorm layers, estimator and options on every rank, "
            f"found {found}"
            + (
                ""
                if len({tuple(r[:2]) for r in everyone}) > 1
                else ", with other names, sizes or options"
            )
        )


def _merge(ranks: Sequence[Tensor], estimator: str) -> Tensor:
    """Merges the accumulators of all ranks, in the order of the ranks."""
    merged = ranks[0]
    row = {"torch": BATCHES, "weighted": SAMPLES, "pooled": VALUES}[estimator]
    for other in ranks[1:]:
        counts = merged[: BATCHES + 1] + other[: BATCHES + 1]
        share = other[: BATCHES + 1] / counts.clamp(min=1)
        delta = other - merged
        moved = merged + share[BATCHES] * delta
        moved[: BATCHES + 1] = counts
        moved[MEAN] = merged[MEAN] + share[row] * delta[MEAN]
        moved[SPREAD] = merged[SPREAD] + share[row] * delta[SPREAD]
        for mean, m2, weight in (
            (MEAN_MEAN, MEAN_M2, BATCHES),
            (VAR_MEAN, VAR_M2, BATCHES),
            *([(MEAN, SPREAD, VALUES)] if estimator == "pooled" else []),
        ):
            between = delta[mean].square() * merged[weight] * share[weight]
            moved[m2] = merged[m2] + other[m2] + between
        merged = moved
    return merged


def merge_ranks(
    collector: Collector, group: dist.ProcessGroup, failed: bool
) -> tuple[list[Tensor], int, int]:
    """Exchanges and merges the ranks' statistics in one collective.

    Returns:
        Accumulators on the CPU, one for each device; batches and samples of all ranks.

    Raises:
        RuntimeError: another rank has ``failed``.
    """
    # One after the other on the CPU: the ranks may keep their layers on different devices.
    parts = [s.accumulators.cpu().reshape(-1) for s in collector.statistics]
    head = torch.tensor([failed, collector.batches, collector.samples], dtype=torch.float64)
    everyone = _gather(torch.cat([head, *parts]), group)
    broken = [rank for rank, row in enumerate(everyone) if row[0]]
    if broken:
        raise RuntimeError(f"group: update_bn failed on rank {broken[0]}, see its error")
    batches, samples = (int(total) for total in everyone[:, 1:3].sum(0))
    merged = []
    start = len(head)
    for part, s in zip(parts, collector.statistics, strict=True):
        ranks = everyone[:, start : start + len(part)].unflatten(1, (9, s.channels))
        merged.append(_merge(list(ranks), s.estimator))
        start += len(part)
    return merged, batches, samples
