"""Loss surfaces, rays, segments and ensembles: known surfaces, resumption, figures, the command."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_runs import ALL, arguments, small, small_digits  # noqa: F401

import swa_fast
from swa_fast import analysis
from swa_fast.analysis import Cache, Plane, Problem, Value
from swa_fast.analysis.figures import save
from swa_fast.train import data
from swa_fast.train.cli import main
from swa_fast.train.errors import TrainError

N = 7

pytestmark = pytest.mark.usefixtures("small")


class Quadratic(nn.Module):
    """(w - m)' A (w - m) / 2 for every row of a batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(N, N, dtype=torch.float64, generator=generator)
        self.w = nn.Parameter(torch.zeros(N, dtype=torch.float64))
        self.register_buffer("a", root @ root.T / N)
        self.register_buffer("m", torch.randn(N, dtype=torch.float64, generator=generator))

    def at(self, w: Tensor) -> float:
        offset = w.double() - self.m
        return float(offset @ self.a @ offset / 2)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.w - self.m
        return (offset @ self.a @ offset / 2).expand(len(x), 1)


def quadratic(**options: Any) -> tuple[Problem, Quadratic]:
    model = Quadratic()
    batches = [(torch.zeros(4, 1), torch.zeros(4)), (torch.zeros(3, 1), torch.zeros(3))]
    problem = Problem(
        model,
        lambda: batches,
        lambda: batches,
        "quadratic",
        loss=lambda x, y: x.sum(),
        error=lambda x, y: x.sum() / 100,
        **options,
    )
    return problem, model


def vectors(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(N, dtype=torch.float64, generator=generator) for n in names}


def test_a_plane_of_a_quadratic_surface_is_exact(tmp_path: Path) -> None:
    problem, model = quadratic()
    corners = vectors("a", "b", "c", "d")
    others = {"d": corners.pop("d")}
    study = analysis.plane(problem, Cache(tmp_path), corners, others, size=5, refinements=2)
    plane = Plane.through(corners)
    assert len(study.columns["x"]) > 25 + 5  # refined
    for x, y, loss in zip(*(study.columns[k] for k in ("x", "y", "train_loss")), strict=True):
        w = plane.rows[0] + x * plane.rows[1] + y * plane.rows[2]
        assert loss == pytest.approx(model.at(w), abs=1e-6)
    for name, vector in {**corners, **others}.items():
        place = study.facts["points"][name]
        nearest = plane.rows[0] + place["x"] * plane.rows[1] + place["y"] * plane.rows[2]
        assert float((vector - nearest).norm()) == pytest.approx(place["off_plane"], abs=1e-9)
        assert (name in corners) == (place["off_plane"] == 0.0)


def test_the_basis_of_a_plane() -> None:
    corners = vectors("a", "b", "c")
    plane = Plane.through(corners)
    u, v = plane.rows[1:]
    assert float(u @ u) == pytest.approx(1, abs=1e-14) == float(v @ v)
    assert float(u @ v) == pytest.approx(0, abs=1e-14)
    for vector, (x, y) in zip(corners.values(), plane.corners, strict=True):
        assert torch.allclose(plane.points([(x, y)])[0], vector, atol=1e-14)


def test_points_that_span_no_plane_are_named() -> None:
    a, b = vectors("a", "b").values()
    for wrong, message in (
        ({"a": a, "b": b}, "expected three weight vectors for a plane, found 2"),
        ({"a": a, "b": b, "c": b.clone()}, "three distinct weight vectors, found b and c equal"),
        ({"a": a, "b": b, "c": 3 * a - 2 * b}, "span a plane, found a, b, c on one line"),
    ):
        with pytest.raises(ValueError, match=message):
            Plane.through(wrong)


def test_many_points_in_one_pass() -> None:
    rows = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (weights @ rows.double()).float()
    assert torch.allclose(analysis.combine(rows, weights), expected, rtol=0, atol=1e-6)
    out = torch.empty(5, 1001)
    assert analysis.combine(rows, weights, out) is out
    assert torch.equal(out, analysis.combine(rows, weights))


def test_refinement_goes_where_the_error_bends(tmp_path: Path) -> None:
    class Wall(Quadratic):
        """An error that jumps along one line and is flat elsewhere."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(self.w[0] > 0.31, 50.0, 1.0).double().expand(len(x), 1)

    problem, _ = quadratic()
    problem.model.__class__ = Wall
    zero = torch.zeros(N, dtype=torch.float64)
    axes = torch.eye(N, dtype=torch.float64)
    corners = {"o": zero, "x": zero + axes[0], "y": zero + axes[1]}
    study = analysis.plane(problem, Cache(tmp_path), corners, {}, size=9, margin=0.0)
    added = [x for x in study.columns["x"] if abs(x * 8 - round(x * 8)) > 1e-9]
    assert len(added) >= 8
    assert all(abs(x - 0.31) < 0.25 for x in added)


def test_rays_share_their_directions(tmp_path: Path) -> None:
    problem, model = quadratic()
    origins = vectors("a", "b")
    study = analysis.rays(problem, Cache(tmp_path), origins, count=3, length=2.0, steps=4)
    rows = analysis.directions(3, origins["a"], 0)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(rows, analysis.directions(3, origins["a"], 0))
    assert not torch.equal(rows, analysis.directions(3, origins["a"], 1))
    names = ("origin", "ray", "t", "train_loss")
    for origin, ray, t, loss in zip(*(study.columns[name] for name in names), strict=True):
        assert loss == pytest.approx(model.at(origins[origin] + t * rows[ray]), abs=1e-9)
    assert len(study.columns["t"]) == 2 * 3 * 5


def test_a_segment_reaches_beyond_its_ends(tmp_path: Path) -> None:
    problem, model = quadratic()
    ends = vectors("a", "b")
    study = analysis.segment(problem, Cache(tmp_path), ends, size=9, margin=0.5)
    assert study.columns["t"] == pytest.approx([-0.5 + 0.25 * i for i in range(9)])
    for t, loss in zip(study.columns["t"], study.columns["train_loss"], strict=True):
        assert loss == pytest.approx(model.at((1 - t) * ends["a"] + t * ends["b"]), abs=1e-9)
    with pytest.raises(TrainError, match="two distinct weight vectors"):
        analysis.segment(problem, Cache(tmp_path), {"a": ends["a"], "b": ends["a"]})


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_an_ensemble_differs_from_the_average_in_the_second_order() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.randint(3, (200,))
    problem = Problem(Smooth(), lambda: [(x, y)], lambda: [(x, y)], "smooth")
    centre = problem.vector()
    members = {
        str(i): centre + 0.05 * torch.randn(problem.size, dtype=torch.float64) for i in range(6)
    }
    study = analysis.ensemble(problem, members, halvings=4)
    low, high = study.facts["ensemble_slope_95"]
    assert 1.95 < study.facts["ensemble_slope"] < 2.05
    assert low < study.facts["ensemble_slope"] < high < 2.1
    assert 0.95 < study.facts["member_slope"] < 1.05
    mean = torch.stack(list(members.values())).mean(0)
    arms = [float((w - mean).norm()) for w in members.values()]
    assert study.columns["delta"][0] == pytest.approx(max(arms))
    # What is compared at full distance: the mean probabilities against those of the mean.
    p = torch.stack([problem.probabilities(w) for w in members.values()]).mean(0)
    difference = (p - problem.probabilities(mean)).norm(dim=1).mean()
    assert study.columns["ensemble_difference"][0] == pytest.approx(float(difference))
    with pytest.raises(TrainError, match="2 or more weight vectors, found only"):
        analysis.ensemble(problem, {"only": centre})
    with pytest.raises(TrainError, match="all equal"):
        analysis.ensemble(problem, {"a": centre, "b": centre})


def test_distances_and_angles() -> None:
    zero = torch.zeros(N)
    axes = torch.eye(N)
    found = analysis.distances_of({"x": 3 * axes[0], "y": 4 * axes[1], "o": zero}, "o")
    rows = list(zip(*found.columns.values(), strict=True))
    assert rows[0][:2] == ("x", "y") and rows[0][2:] == pytest.approx((5.0, 90.0))
    assert rows[1] == ("x", "o", 3.0, None)
    assert found.facts["norms"] == {"x": 3.0, "y": 4.0, "o": 0.0}
    with pytest.raises(TrainError, match="--centre: expected one of a, b, found 'z'"):
        analysis.distances_of({"a": zero, "b": axes[0]}, "z")


class Counting(Problem):
    """Measures no more than so many points."""

    left = 10**9
    measured = 0

    def value(self, vector: Tensor) -> Value:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.measured += 1
        return super().value(vector)


def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    problem, _ = quadratic()
    problem.__class__ = Counting
    assert isinstance(problem, Counting)
    ends = vectors("a", "b")
    whole = analysis.segment(quadratic()[0], Cache(tmp_path / "whole"), ends, size=20)
    problem.left = 13
    with pytest.raises(KeyboardInterrupt):
        analysis.segment(problem, Cache(tmp_path / "parts"), ends, size=20)
    # A file that a killed process left half-written, and a foreign one.
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) == 13
    files[0].write_text('{"train_loss": 1')
    files[1].write_text("[]")
    problem.left, problem.measured = 10**9, 0
    again = analysis.segment(problem, Cache(tmp_path / "parts"), ends, size=20)
    assert problem.measured == 20 - 13 + 2
    assert again.columns == whole.columns
    # Other data or settings are other points.
    problem.measured = 0
    other = Counting(problem.model, lambda: [], lambda: [], "other data")
    assert other.key(ends["a"]) != problem.key(ends["a"])
    tolerant = Counting(problem.model, lambda: [], lambda: [], "quadratic", tolerance=0.1)
    assert tolerant.key(ends["a"]) != problem.key(ends["a"])


def test_processes_share_the_points(tmp_path: Path) -> None:
    ends = vectors("a", "b")
    measured = []

    class Fake:
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def wait(self) -> None:
            if self.rank == 0:
                work(1)

    def work(rank: int) -> list[float]:
        problem, _ = quadratic()
        problem.__class__ = Counting
        cache = Cache(tmp_path, Fake(rank))  # type: ignore[arg-type]
        study = analysis.segment(problem, cache, ends, size=11)
        measured.append(getattr(problem, "measured"))  # noqa: B009
        return study.columns["train_loss"]

    alone = analysis.segment(quadratic()[0], Cache(tmp_path / "alone"), ends, size=11)
    assert work(0) == alone.columns["train_loss"]
    # The second began when the first was done with its share.
    assert sorted(measured) == [5, 6]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    study = analysis.distances_of(vectors("a", "b"))
    with pytest.raises(TrainError, match="--out: expected a folder that can be written"):
        save(study, tmp_path / "file", "")
    with pytest.raises(TrainError, match="--out: expected a folder that can be written"):
        analysis.segment(quadratic()[0], Cache(tmp_path / "file" / "points"), vectors("a", "b"))


def test_what_is_not_finite_is_kept_as_such(tmp_path: Path) -> None:
    problem, _ = quadratic()
    bad = {"a": torch.full((N,), 1e200, dtype=torch.float64), "b": torch.zeros(N).double()}
    for _ in range(2):
        study = analysis.segment(problem, Cache(tmp_path), bad, size=3, margin=0.0)
        assert not math.isfinite(study.columns["train_loss"][0])
        assert math.isfinite(study.columns["train_loss"][-1])


def test_statistics_are_those_of_the_point(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    x, y = torch.randn(64, 4) + 3, torch.randint(3, (64,))
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    problem = Problem(model, lambda: batches, lambda: batches, "")
    w = problem.vector()
    first = problem.value(2 * w)
    problem.value(w)
    assert problem.value(2 * w) == first
    with torch.no_grad():
        for parameter, part in zip(
            model.parameters(), (2 * w).split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.copy_(part.view(parameter.shape))
    swa_fast.update_bn((images for images, _ in batches), model, estimator="weighted")
    expected = nn.functional.cross_entropy(model.eval()(x), y)
    assert first.test_loss == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all methods with its captures."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(data, "load_digits", small_digits)
        assert main([*arguments(folder, **ALL), "--keep-captures", "--quiet"]) == 0
    return folder


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def analyze(*options: object) -> int:
    return main(["analyze", *map(str, options)])


KINDS: Sequence[tuple[str, Sequence[str]]] = (
    ("plane", ("--size", "3", "--share", "0.5", "--tolerance", "0.5")),
    ("rays", ("--rays", "2", "--steps", "2")),
    ("segment", ("--size", "3")),
    ("ensemble", ("--points", "capture-*", "--halvings", "2")),
    ("distances", ("--centre", "sgd")),
    ("trajectory", ()),
)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_command(
    kind: str, options: Sequence[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze(kind, run, "--out", tmp_path, *options) == 0
    out = capsys.readouterr().out
    for suffix in ("png", "pdf", "csv", "npz", "json"):
        assert f"{tmp_path / kind}.{suffix}" in out
    assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{kind}.pdf").read_bytes().startswith(b"%PDF")
    rows = table(tmp_path / f"{kind}.csv")
    with np.load(tmp_path / f"{kind}.npz", allow_pickle=False) as arrays:
        assert rows and set(rows[0]) <= set(arrays.files)
    json.loads((tmp_path / f"{kind}.json").read_text())
    # Called again, nothing is measured again, and the numbers are the same.
    before = (tmp_path / f"{kind}.csv").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        if kind != "ensemble":
            patch.setattr(Problem, "value", None)
        assert analyze(kind, run, "--out", tmp_path, *options) == 0
    assert (tmp_path / f"{kind}.csv").read_bytes() == before


def test_the_value_at_a_files_weights_is_the_runs(run: Path, tmp_path: Path) -> None:
    """The network of the last weights has the accuracy that the run reports, up to its BatchNorm
    statistics, which the run took from training."""
    options = ("--points", "swa,sgd", "--size", "2", "--margin", "0")
    assert analyze("segment", run, "--out", tmp_path, *options) == 0
    found = float(table(tmp_path / "segment.csv")[0]["test_error"])
    summary = json.loads((run / "results.json").read_text())["summary"]
    (expected,) = (
        r["test_accuracy"] for r in summary if (r["method"], r["budget"]) == ("swa", 1.5)
    )
    assert abs(100 - found - expected) <= 10  # two of twenty images


def test_the_page_of_a_run_needs_no_other_file(run: Path, tmp_path: Path) -> None:
    assert analyze("segment", run, "--out", tmp_path, "--size", "3") == 0
    assert analyze("report", run, "--out", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2 == page.count("<img")
    assert "http" not in page.replace("http-equiv", "")
    for text in ("SWA, 1.5 budgets", "forward/backward", "weight_decay", "torch"):
        assert text in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("plane", "RUN", "--points", "sgd,swa"), "expected three weight vectors for a plane"),
        (("plane", "RUN", "--points", "sgd,swa,nothing"), "found 'nothing'"),
        (("plane", "RUN", "--size", "1"), "--size, --refinements: expected 2 or more"),
        (("rays", "RUN", "--rays", "0"), "found 0 rays"),
        (("rays", "RUN", "--points", "sgd"), "--length: expected with a single point"),
        (("segment", "RUN", "--points", "sgd"), "expected two weight vectors, found sgd"),
        (("segment", "RUN", "--share", "0"), "--share: expected a number in (0, 1]"),
        (("ensemble", "RUN", "--points", "sgd"), "expected 2 or more weight vectors, found sgd"),
        (("distances", "RUN", "--centre", "x"), "--centre: expected one of"),
        (("trajectory", "RUN", "--trajectory", "x"), "--trajectory: expected one of"),
        (("plane", "NOTHING"), "expected the folder of a run, found no results.json"),
    ],
)
def test_bad_input_is_one_line(
    options: Sequence[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": str(run), "NOTHING": str(tmp_path)}
    given = [places.get(argument, argument) for argument in options]
    assert analyze(*given, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "error:" in line]
    assert message in line and "Traceback" not in error
    assert not list(tmp_path.glob("out/*.*"))


def test_weights_of_another_network_and_runs_without_captures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("weights")
    for name in ("other.pt", "text.pt"):
        points = f"sgd,{tmp_path / name}"
        assert analyze("segment", run, "--points", points, "--out", tmp_path / "out") == 2
        assert "expected weights of the run's network, found" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert main([*arguments(plain), "--quiet"]) == 0
    capsys.readouterr()
    assert analyze("plane", plain, "--out", tmp_path / "out") == 2
    assert "the default needs a run of sgd and swa with --keep-captures" in capsys.readouterr().err
    assert analyze("ensemble", plain, "--out", tmp_path / "out") == 2
    assert "found '*fge-[0-9]*'" in capsys.readouterr().err
