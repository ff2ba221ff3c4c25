"""update_bn on several ranks: gloo processes on the CPU, each with its own share of the data."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_processes
from torch import Tensor, nn

import swa_fast
from swa_fast.batch_norm import layers

# Which batches each rank reads; the sizes of all batches.
SIZES = (8, 8, 8, 5, 8, 3)
SHARES = {
    2: ((0, 1, 2, 3), (4, 5)),
    4: ((0, 1), (), (2, 3, 4), (5,)),  # one rank has no data at all
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(1), nn.Linear(96, 4),
        nn.BatchNorm1d(4),
    )  # fmt: skip


def make_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 6, 6, generator=generator) + i for i, n in enumerate(SIZES)]


def share(rank: int, ranks: int) -> list[Tensor]:
    return [make_batches()[i] for i in SHARES[ranks][rank]]


def results(rank: int, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for estimator in ("torch", "weighted", "pooled"):
        model = make_model()
        report = swa_fast.update_bn(share(rank, ranks), model, estimator=estimator, group=True)
        found[estimator] = model.state_dict()
        found[estimator + " report"] = (report.batches, report.samples, report.mean_error)
    return found


def shared_normalisation(rank: int, ranks: int) -> dict[str, Any]:
    """Layers that are taken for synchronising ones, which themselves need GPUs: their own forward
    runs, and their statistics are those of the rank's batches."""
    original = layers._synchronises
    layers._synchronises = lambda layer: True
    try:
        model = make_model()
        swa_fast.update_bn(share(rank, ranks), model, estimator="pooled", group=True)
    finally:
        layers._synchronises = original
    return model.state_dict()


def subgroup(rank: int, ranks: int) -> dict[str, Any]:
    """Ranks 0 and 1 by themselves; the others are no members."""
    group = dist.new_group([0, 1])
    model = make_model()
    if rank >= 2:
        with pytest.raises(ValueError, match="of which this process is a member"):
            swa_fast.update_bn(share(rank, ranks), model, group=group)
        return {}
    swa_fast.update_bn(share(rank, 2), model, estimator="pooled", group=group)
    return model.state_dict()


def refusals(rank: int, ranks: int) -> dict[str, Any]:
    """What goes wrong on one rank, and the error on each."""
    last = rank == ranks - 1

    def broken() -> Iterator[Tensor]:
        yield make_batches()[0]
        raise OSError("disk gone")

    wider = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(6))
    renamed = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))
    one = nn.Sequential(nn.BatchNorm2d(3))
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    batches = make_batches()[:2]
    nans = [*batches, torch.full((2, 3, 6, 6), math.nan)]
    one_state = copy.deepcopy(one.state_dict())
    cases: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        "sizes": (wider if last else one, batches, {}),
        "names": (renamed if last else one, batches, {}),
        "no layers": (nn.Identity() if last else one, batches, {}),
        "options": (one, batches, {"estimator": "weighted" if last else "pooled"}),
        "lazy": (lazy if last else one, batches, {}),
        "loader": (one, broken() if last else batches, {}),
        "nan": (one, nans if last else batches, {}),
        "empty": (one, [], {}),
    }
    found = {}
    for name, (model, loader, arguments) in cases.items():
        try:
            swa_fast.update_bn(loader, model, group=True, **arguments)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        for key, value in one.state_dict().items():
            assert torch.equal(value, one_state[key]), (name, key)
    # And the group still works.
    swa_fast.update_bn(batches, one, group=True)
    return found


def worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        found = results(rank, ranks)
        found["shared"] = shared_normalisation(rank, ranks)
        found["alone"] = subgroup(rank, ranks) if ranks > 2 else refusals(rank, ranks)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each rank has found. Starting processes is what takes the time: one set of them does
    everything."""
    ranks = request.param
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(worker, (ranks, str(folder)), ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def test_same_as_one_process(found: list[dict[str, Any]]) -> None:
    for estimator in ("torch", "weighted", "pooled"):
        alone = make_model()
        report = swa_fast.update_bn(make_batches(), alone, estimator=estimator)
        for rank in range(len(found)):
            for key, expected in alone.state_dict().items():
                value = found[rank][estimator][key]
                assert torch.equal(value, found[0][estimator][key]), (rank, key)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            if estimator == "pooled":
                torch.testing.assert_close(found[rank]["shared"], alone.state_dict())
            batches, samples, error = found[rank][estimator + " report"]
            assert (batches, samples) == (report.batches, report.samples) == (6, 40)
            assert error == pytest.approx(report.mean_error, rel=1e-6)


def test_ranks_of_a_subgroup(found: list[dict[str, Any]]) -> None:
    if len(found) < 4:
        pytest.skip("needs ranks that are not in the group")
    alone = make_model()
    swa_fast.update_bn(make_batches(), alone, estimator="pooled")
    for key, expected in alone.state_dict().items():
        assert torch.equal(found[0]["alone"][key], found[1]["alone"][key])
        torch.testing.assert_close(found[0]["alone"][key], expected, rtol=1e-6, atol=1e-7)


def test_failures_on_one_rank_raise_on_all(found: list[dict[str, Any]]) -> None:
    if len(found) > 2:
        pytest.skip("with two ranks")
    first, last = (rank["alone"] for rank in found)
    models = "ValueError: group: expected the same BatchNorm layers, estimator and options"
    for name in ("sizes", "names", "no layers", "options"):
        assert first[name] == last[name] and first[name].startswith(models), name
    assert "rank 0: 1 layers, 3 channels, rank 1: 2 layers, 9 channels" in first["sizes"]
    assert "other names, sizes or options" in first["names"]
    assert first["lazy"] == "RuntimeError: group: rank 1 cannot take part, see its error"
    assert last["lazy"].startswith("ValueError: group: expected an initialised model")
    assert first["loader"] == "RuntimeError: group: update_bn failed on rank 1, see its error"
    assert last["loader"] == "OSError: disk gone"
    assert first["nan"] == last["nan"]
    assert first["nan"].startswith("FloatingPointError: layer 0: expected finite activations")
    assert first["empty"] == last["empty"]
    assert first["empty"].endswith("expected at least one batch, found none on all ranks")
