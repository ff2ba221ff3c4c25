"""The studies: which points are measured, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..train.config import TrainConfig
from ..train.errors import TrainError
from ..train.methods import plan as trajectories
from .geometry import Plane, combine, directions, distances
from .measure import Cache, Problem, Value

__all__ = ["Study", "distances_of", "ensemble", "plane", "rays", "segment", "trajectory"]

Vectors = Mapping[str, Tensor]

# Least cells that a refinement halves: those where the error bends most, a quarter of them.
_REFINED = 0.25
# Points of the learning rate's curve in an epoch.
_RATES = 50


@dataclass(frozen=True)
class Study:
    """A table of numbers, and what else is known of it.

    Attributes:
        kind: ``plane``, ``rays``, ...
        columns: of equal lengths; they become the CSV file.
        facts: single numbers, names and small tables; they become a JSON file.
        arrays: whatever has another shape than the columns, for the npz file.
    """

    kind: str
    columns: dict[str, list[Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


def _columns(values: Sequence[Value]) -> dict[str, list[Any]]:
    names = ("train_loss", "train_error", "test_loss", "test_error")
    return {name: [getattr(value, name) for value in values] for name in names}


def _two_or_more(vectors: Vectors, least: int, what: str) -> None:
    if len(vectors) < least:
        found = ", ".join(vectors) or "none"
        raise TrainError(f"{what}: expected {least} or more weight vectors, found {found}")


def plane(
    problem: Problem,
    cache: Cache,
    corners: Vectors,
    others: Vectors,
    *,
    size: int = 11,
    margin: float = 0.2,
    refinements: int = 1,
) -> Study:
    """Losses and errors on the plane through three weight vectors.

    Args:
        problem: measures.
        cache: of values.
        corners: three weight vectors by name.
        others: weight vectors whose nearest points of the plane are marked.
        size: points of a side of the first grid.
        margin: how far it reaches beyond the marked points, as a share of their extent.
        refinements: how often the cells where the test error bends most get middle points.

    Raises:
        TrainError: the vectors span no plane.
    """
    try:
        found = Plane.through(corners)
    except ValueError as error:
        raise TrainError(f"--points: {error}") from error
    marked = {name: (*xy, 0.0) for name, xy in zip(corners, found.corners, strict=True)}
    marked.update({name: found.project(vector) for name, vector in others.items()})
    spans = []
    for axis in (0, 1):
        places = [place[axis] for place in marked.values()]
        beyond = margin * (max(places) - min(places))
        spans.append((min(places) - beyond, max(places) + beyond))
    # Points by their place on a lattice that has room for all refinements.
    step = 2**refinements
    values: dict[tuple[int, int], Value] = {}

    def at(place: tuple[int, int]) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        i, j = (p / (step * (size - 1)) for p in place)
        return x0 + i * (x1 - x0), y0 + j * (y1 - y0)

    def measure(places: Sequence[tuple[int, int]]) -> None:
        coordinates = [at(place) for place in places]
        new = cache.values(
            problem, len(places), lambda which: found.points([coordinates[i] for i in which])
        )
        values.update(zip(places, new, strict=True))

    measure([(step * i, step * j) for j in range(size) for i in range(size)])
    cells = [(step * i, step * j) for j in range(size - 1) for i in range(size - 1)]
    for level in range(refinements):
        width = step >> level
        bends = {cell: _bend(values, cell, width) for cell in cells}
        chosen = sorted(cells, key=lambda cell: -bends[cell])[: math.ceil(_REFINED * len(cells))]
        half = width // 2
        corners_of = [(a * half, b * half) for a in range(3) for b in range(3)]
        wanted = {(i + a, j + b) for i, j in chosen for a, b in corners_of}
        measure(sorted(wanted - set(values)))
        cells = [(i + a * half, j + b * half) for i, j in chosen for a in (0, 1) for b in (0, 1)]
    measured = sorted(values)
    x, y = zip(*(at(place) for place in measured), strict=True)
    return Study(
        "plane",
        {"x": list(x), "y": list(y), **_columns([values[place] for place in measured])},
        {
            "points": {n: {"x": p[0], "y": p[1], "off_plane": p[2]} for n, p in marked.items()},
            "corners": list(corners),
        },
    )


def _bend(values: Mapping[tuple[int, int], Value], cell: tuple[int, int], width: int) -> float:
    """How much the logarithm of the test error bends in a cell and its neighbours."""

    def error(i: int, j: int) -> float | None:
        value = values.get((cell[0] + i * width, cell[1] + j * width))
        usable = value is not None and math.isfinite(value.test_error)
        return math.log(max(value.test_error, 1e-3)) if usable and value is not None else None

    bends = []
    lines = [((i, 0), (i + 1, 0), (i + 2, 0)) for i in (-1, 0)]
    lines += [((0, j), (0, j + 1), (0, j + 2)) for j in (-1, 0)]
    for line in lines:
        a, b, c = (error(*place) for place in line)
        if a is not None and b is not None and c is not None:
            bends.append(abs(a - 2 * b + c))
    return max(bends, default=0.0)


def rays(
    problem: Problem,
    cache: Cache,
    origins: Vectors,
    *,
    count: int = 10,
    length: float,
    steps: int = 9,
    seed: int = 0,
) -> Study:
    """Losses and errors along w + t d, for random unit directions d that all origins share.

    Args:
        problem: measures.
        cache: of values.
        origins: weight vectors by name.
        count: directions.
        length: the largest t.
        steps: points of a ray beside its origin.
        seed: of the directions.
    """
    _two_or_more(origins, 1, "--points")
    if count < 1 or steps < 1 or not length > 0:
        raise TrainError(
            f"expected 1 or more rays and steps and a length above 0, found {count} rays, {steps} "
            f"steps and a length of {length}"
        )
    distance = [length * i / steps for i in range(steps + 1)]
    columns: dict[str, list[Any]] = {"origin": [], "ray": [], "t": []}
    values: list[Value] = []
    for name, origin in origins.items():
        rows = torch.cat((origin[None], directions(count, origin, seed)))
        # The origin itself is the same point of all rays.
        places = [(0, 0.0)] + [(ray, t) for ray in range(count) for t in distance[1:]]

        def points(which: Sequence[int], rows: Tensor = rows, places: Any = places) -> Tensor:
            weights = torch.zeros(len(which), 1 + count, dtype=torch.float64)
            weights[:, 0] = 1
            for k, i in enumerate(which):
                weights[k, 1 + places[i][0]] = places[i][1]
            return combine(rows, weights)

        found = dict(zip(places, cache.values(problem, len(places), points), strict=True))
        for ray in range(count):
            for t in distance:
                columns["origin"].append(name)
                columns["ray"].append(ray)
                columns["t"].append(t)
                values.append(found[(0, 0.0) if t == 0 else (ray, t)])
    return Study("rays", {**columns, **_columns(values)}, {"seed": seed, "length": length})


def segment(
    problem: Problem,
    cache: Cache,
    ends: Vectors,
    *,
    size: int = 25,
    margin: float = 0.5,
) -> Study:
    """Losses and errors along the line through two weight vectors: t is 0 at the first and 1 at the
    second, and reaches ``margin`` beyond both."""
    if len(ends) != 2:
        raise TrainError(
            f"--points: expected two weight vectors, found {', '.join(ends) or 'none'}"
        )
    (first, second), names = ends.values(), list(ends)
    length = float((second.double() - first.double()).norm())
    if length == 0:
        raise TrainError(f"--points: expected two distinct weight vectors, found {names} equal")
    ts = [(1 + 2 * margin) * i / (size - 1) - margin for i in range(size)]
    rows = torch.stack((first, second))

    def points(which: Sequence[int]) -> Tensor:
        weights = [(1 - ts[i], ts[i]) for i in which]
        return combine(rows, torch.tensor(weights, dtype=torch.float64))

    values = cache.values(problem, size, points)
    columns = {"t": ts, "distance": [t * length for t in ts], **_columns(values)}
    return Study("segment", columns, {"ends": names, "distance": length})


def ensemble(
    problem: Problem,
    members: Vectors,
    *,
    halvings: int = 4,
    progress: Callable[[Sequence[float]], Any] = lambda items: items,
) -> Study:
    r"""Ensembles of networks against the average of their weights, as the networks come together.

    The weights :math:`w_i` are drawn towards their mean, :math:`w_i(s) = \bar w + s (w_i - \bar w)`
    for :math:`s = 1, \tfrac12, \tfrac14, ...`. By the argument of Izmailov et al. (2018, section
    3.5) the prediction of the ensemble, the mean of the probabilities, differs from that of
    :math:`\bar w` in the second order of :math:`\Delta = \max_i \lVert w_i(s) - \bar w \rVert`,
    while the predictions of its members differ from it in the first: the slopes on a log-log plot
    are 2 and 1.

    Args:
        problem: measures. With a tolerance its BatchNorm statistics would be of different batches
            at different points, and their noise would hide small differences: it should have none.
        members: two or more weight vectors.
        halvings: of s.
        progress: wraps the values of s.
    """
    _two_or_more(members, 2, "members")
    rows = torch.stack(list(members.values()))
    count = len(rows)
    mean = combine(rows, torch.full((1, count), 1.0 / count))[0]
    arms = [float((row.double() - mean.double()).norm()) for row in rows]
    if max(arms) == 0:
        raise TrainError("members: expected distinct weight vectors, found all equal")
    labels = problem.labels().cpu()
    centre = problem.probabilities(mean).cpu()
    columns: dict[str, list[float]] = {
        name: []
        for name in (
            *("scale", "delta", "ensemble_difference", "member_difference", "agreement"),
            *("ensemble_accuracy", "average_accuracy", "member_accuracy"),
        )
    }

    def accuracy(p: Tensor) -> float:
        return 100 * float((p.argmax(1) == labels).double().mean())

    together = torch.stack((mean, *rows))
    for s in progress([2.0**-i for i in range(halvings + 1)]):
        total, differences, accuracies = torch.zeros_like(centre), [], []
        for i in range(count):
            weights = torch.zeros(1, 1 + count, dtype=torch.float64)
            weights[0, 0], weights[0, 1 + i] = 1 - s, s
            p = problem.probabilities(combine(together, weights)[0]).cpu()
            total += p
            differences.append(float((p - centre).norm(dim=1).mean()))
            accuracies.append(accuracy(p))
        p = total / count
        columns["scale"].append(s)
        columns["delta"].append(s * max(arms))
        columns["ensemble_difference"].append(float((p - centre).norm(dim=1).mean()))
        columns["member_difference"].append(sum(differences) / count)
        columns["agreement"].append(100 * float((p.argmax(1) == centre.argmax(1)).double().mean()))
        columns["ensemble_accuracy"].append(accuracy(p))
        columns["average_accuracy"].append(accuracy(centre))
        columns["member_accuracy"].append(sum(accuracies) / count)
    facts: dict[str, Any] = {"members": list(members)}
    for name in ("ensemble", "member"):
        slope, half = _slope(columns["delta"], columns[f"{name}_difference"])
        facts[f"{name}_slope"], facts[f"{name}_slope_95"] = slope, [slope - half, slope + half]
    return Study("ensemble", dict(columns), facts)


# Two-sided 95 % quantiles of Student's distribution by degrees of freedom from 1 on.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of a line through points on a log-log plot, and half of its 95 % confidence interval
    (Student's, of the residuals); NaN where there are too few."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    n = len(pairs)
    if n < 2:
        return math.nan, math.nan
    mx, my = (sum(values) / n for values in zip(*pairs, strict=True))
    sxx = sum((a - mx) ** 2 for a, _ in pairs)
    slope = sum((a - mx) * (b - my) for a, b in pairs) / sxx
    if n < 3:
        return slope, math.nan
    rest = sum((b - my - slope * (a - mx)) ** 2 for a, b in pairs)
    quantile = _STUDENT[min(n - 2, len(_STUDENT)) - 1]
    return slope, quantile * math.sqrt(rest / (n - 2) / sxx)


def distances_of(vectors: Vectors, centre: str | None = None) -> Study:
    """Norms, pairwise distances, and angles in degrees as seen from one of the weight vectors (the
    last, unless it is named)."""
    _two_or_more(vectors, 2, "--points")
    names = list(vectors)
    middle = names[-1] if centre is None else centre
    if middle not in vectors:
        raise TrainError(f"--centre: expected one of {', '.join(names)}, found {middle!r}")
    apart, cosines = distances(vectors, middle)
    columns: dict[str, list[Any]] = {
        key: [] for key in ("first", "second", "distance", f"angle at {middle}")
    }
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            angle = math.degrees(math.acos(min(1.0, max(-1.0, float(cosines[i, j])))))
            row = (names[i], names[j], float(apart[i, j]))
            seen = angle if middle not in row[:2] else None
            for key, cell in zip(columns, (*row, seen), strict=True):
                columns[key].append(cell)
    norms = {name: float(vector.double().norm()) for name, vector in vectors.items()}
    arrays = {"distances": apart, "cosines": cosines}
    return Study("distances", columns, {"norms": norms, "centre": middle}, arrays)


def trajectory(results: Mapping[str, Any], name: str) -> Study:
    """Learning rate, error of the iterate and error of its averages along a trajectory of a run,
    with the epochs of its captures, from results.json."""
    records = [r for r in results["records"] if r["trajectory"] == name]
    known = sorted({r["trajectory"] for r in results["records"]})
    if not records:
        raise TrainError(f"--trajectory: expected one of {', '.join(known)}, found {name!r}")
    methods = sorted({method for r in records for method in r["averages"]})

    def error(found: Mapping[str, Any]) -> float | None:
        return None if found["test_accuracy"] is None else 100 - found["test_accuracy"]

    columns: dict[str, list[Any]] = {
        "epoch": [r["epoch"] for r in records],
        "lr": [r["lr"] for r in records],
        "iterate_error": [error(r) for r in records],
    }
    for method in methods:
        averages = [r["averages"].get(method) for r in records]
        columns[f"{method}_error"] = [None if a is None else error(a) for a in averages]
        columns[f"{method}_captures"] = [None if a is None else a["captures"] for a in averages]
    if not methods:
        raise TrainError(f"--trajectory: expected one with captures, found {name!r} without any")
    # The rate within the epochs, which cycles make more of than their ends show.
    followed = next(
        t for t in trajectories(TrainConfig.from_json(results["config"])) if t.name == name
    )
    grid = [divmod(i, _RATES) for i in range(_RATES * followed.begin, _RATES * followed.end)]
    rates = [followed.rate(epoch, step, _RATES) for epoch, step in grid]
    arrays = {
        "rate_epoch": torch.tensor([epoch + step / _RATES for epoch, step in grid]),
        "rate": torch.tensor(rates, dtype=torch.float64),
    }
    return Study("trajectory", columns, {"trajectory": name, "methods": methods}, arrays)
