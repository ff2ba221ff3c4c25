"""Averages of any width from snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from swa_fast import EMA, SWA, Averager, Power
from swa_fast.checkpoints import CheckpointError, reader
from swa_fast.post_hoc import (
    PostHoc,
    coefficients,
    inner_product,
    sigma_of,
    synthesize,
)

UPDATES = 256


def gamma_of(sigma: float) -> float:
    return Power(sigma_rel=sigma).gamma


def test_inner_products() -> None:
    products = (4, 0.05, 8, 0.10), (8, 0.05, 8, 0.05)
    for (ta, a, tb, b), expected in zip(products, (0.0058412928, 1.1554066905), strict=True):
        found = float(inner_product(ta, gamma_of(a), tb, gamma_of(b)))
        assert found == pytest.approx(expected, rel=1e-8)
        assert float(inner_product(tb, gamma_of(b), ta, gamma_of(a))) == pytest.approx(found)
    # By quadrature.
    tau = (np.arange(200_000) + 0.5) * (4 / 200_000)
    a, b = gamma_of(0.05), gamma_of(0.10)
    product = (a + 1) * tau**a / 4 ** (a + 1) * (b + 1) * tau**b / 8 ** (b + 1)
    assert float(product.sum() * 4 / 200_000) == pytest.approx(0.0058412928, rel=1e-6)


def evenly(count: int, end: int = 4096) -> tuple[list[float], list[float]]:
    times = [end * i / count for i in range(1, count + 1) for _ in range(2)]
    return times, [gamma_of(0.05), gamma_of(0.10)] * count


def test_coefficients_of_the_paper() -> None:
    found, error = coefficients(*evenly(4), 4096, gamma_of(0.075))
    expected = [
        5.55e-8, -9.915e-7, 1.308978e-4, -7.879842e-4, 0.011581696, -0.0446650486, 0.3364241579,
        0.697317217,
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-10)
    np.testing.assert_allclose(found[4:], expected[4:], rtol=1e-8)
    assert error == pytest.approx(0.035, abs=5e-4)


@pytest.mark.parametrize(
    "snapshots, errors",
    [
        (4, (0.035, 0.106, 0.223, 0.394)),
        (8, (0.013, 0.033, 0.078, 0.182)),
        (16, (0.0035, 0.009, 0.023, 0.079)),
        (32, (0.0009, 0.0023, 0.0065, 0.034)),
    ],
)
def test_errors_by_the_number_of_snapshots(snapshots: int, errors: tuple[float, ...]) -> None:
    times, gammas = evenly(snapshots)
    for sigma, expected in zip((0.075, 0.15, 0.20, 0.25), errors, strict=True):
        c, error = coefficients(times, gammas, 4096, gamma_of(sigma))
        assert error == pytest.approx(expected, abs=0.6 * 10 ** -(3 if expected > 0.01 else 4))
        assert c.sum() == pytest.approx(1.0, abs=1e-12) and 1.0 < np.abs(c).sum() < 2.35
        # Against the weights that the updates really have.
        assert error == pytest.approx(profile_error(c, times, gammas, gamma_of(sigma)), rel=0.02)


def weights(end: float, gamma: float, count: int) -> np.ndarray:
    i = np.arange(1, count + 1)
    inside = (i / end) ** (gamma + 1) - ((i - 1) / end) ** (gamma + 1)
    return np.where(i <= end, inside, 0.0)


def profile_error(c, times, gammas, gamma, end: int = 4096) -> float:
    made = sum(x * weights(t, g, end) for x, t, g in zip(c, times, gammas, strict=True))
    target = weights(end, gamma, end)
    return float(np.linalg.norm(made - target) / np.linalg.norm(target))


def test_a_decay_from_narrow_averages_says_how_bad_it_is() -> None:
    times, gammas = evenly(8)
    for gamma in (-0.5, -0.9):  # whose continuous profiles have no norm
        c, error = coefficients(times, gammas, 4096, gamma)
        assert error == pytest.approx(profile_error(c, times, gammas, gamma), rel=1e-9)
        assert error > 0.5


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Iterates that are unit vectors, so that an average is its own profile."""
    x = torch.zeros(UPDATES)
    rules = {"a": Power(sigma_rel=0.05), "b": Power(sigma_rel=0.10)}
    wanted = {str(s): Power(sigma_rel=s) for s in (0.075, 0.15)}
    averager = Averager([("x", x)], {**rules, **wanted}, dtype=torch.float64)
    snapshots = PostHoc(averager, list(rules), tmp_path / "snapshots", every=UPDATES // 16)
    for step in range(UPDATES):
        x.zero_()
        x[step] = 1
        averager.update()
        snapshots.update()
    averages = {name: averager.averages[name]["x"].clone() for name in wanted}
    return tmp_path, averages


def test_synthesis_of_a_training(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, wanted = trained
    assert len(list((folder / "snapshots").iterdir())) == 32
    outs = [folder / "narrow.safetensors", folder / "wide.pt"]
    results = synthesize(folder / "snapshots", sigma_rel=[0.075, 0.15], out=outs)
    for result, out, (sigma, direct) in zip(results, outs, wanted.items(), strict=True):
        with reader(out) as made:
            error = (made.read("x") - direct).norm() / direct.norm()
        # The averages count updates, the formula is of a continuum.
        assert float(error) == pytest.approx(result.error, rel=0.05, abs=2e-6)
        assert result.sigma_rel == pytest.approx(float(sigma)) and result.at == UPDATES
        assert result.l1 == pytest.approx(sum(abs(c) for c in result.coefficients.values()))
        assert len(result.coefficients) == 32
    with reader(outs[0]) as made:
        note = json.loads(made.metadata["swa_fast"])["synthesis"]
    assert note == results[0].to_json()
    half = synthesize(
        folder / "snapshots", sigma_rel=0.1, at=UPDATES // 2, out=folder / "half.safetensors"
    )
    assert half[0].error < 1e-6 and len(half[0].coefficients) == 16


def test_what_cannot_be_synthesised(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, out = trained[0] / "snapshots", trained[0] / "out.safetensors"
    for problem, arguments in (
        ("expected exactly one of them, found none", {}),
        ("found sigma_rel, gamma", {"sigma_rel": 0.1, "gamma": 3}),
        ("expected 1 to 8 targets, found 9", {"gamma": [1.0] * 9}),
        ("expected 2, one for each target, found 1", {"gamma": [1.0, 2.0]}),
        ("sigma_rel: expected a number in", {"sigma_rel": 0.5}),
        (r"updates of a snapshot \(16, 32", {"gamma": 3, "at": 17}),
    ):
        with pytest.raises(ValueError, match=problem):
            synthesize(folder, out=out, **arguments)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="expected snapshots of PostHoc, found none"):
        synthesize(trained[0] / "nowhere", gamma=3, out=out)
    some = next(folder.iterdir())
    (folder / "again.safetensors").write_bytes(some.read_bytes())
    with pytest.raises(CheckpointError, match="expected one snapshot of gamma"):
        synthesize(folder, gamma=3, out=out)
    assert not out.exists()


def test_snapshots_of_other_rules_are_refused(tmp_path: Path) -> None:
    x = torch.zeros(3)
    averager = Averager([x], {"swa": SWA(), "ema": EMA(0.9), "late": Power(2.0, start=3)})
    for name in ("ema", "late"):
        with pytest.raises(ValueError, match="expected Power from the first update on"):
            PostHoc(averager, [name], tmp_path, every=1)
    with pytest.raises(KeyError, match="found 'other'"):
        PostHoc(averager, ["other"], tmp_path, every=1)
    with pytest.raises(ValueError, match="every: expected at least 1"):
        PostHoc(averager, ["swa"], tmp_path, every=0)
    snapshots = PostHoc(averager, ["swa"], tmp_path, every=2)
    assert snapshots.gammas == {"swa": 0.0} and snapshots.save() == []
    averager.update()
    assert snapshots.update() == []
    averager.update()
    (path,) = snapshots.update()
    assert path.name == f"swa-000000002-{sigma_of(0):.4f}.safetensors"
    # A run that goes on keeps the rhythm.
    assert PostHoc(averager, ["swa"], tmp_path, every=3).update() != []
