"""Planes, lines and directions in the space of weights, and many points of them in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import combine_

__all__ = ["Plane", "combine", "directions", "distances"]

# Vectors nearer than this share of their norms are one, and directions with a sine below it too.
_SAME = 1e-6


def combine(rows: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    r"""K linear combinations of r weight vectors, :math:`y_k = \sum_j c_{kj} x_j`, in one pass:
    :math:`4r + 4K` bytes per fp32 element.

    Args:
        rows: [r, n], contiguous; float32, float64, bfloat16 or float16.
        coefficients: [K, r].
        out: [K, n], contiguous, overwritten; None makes one of the rows' dtype.

    Raises:
        TypeError, ValueError: as :func:`swa_fast.combine_`.
    """
    if out is None:
        out = rows.new_empty(len(coefficients), rows.shape[1])
    weights = torch.as_tensor(coefficients, dtype=torch.float64, device="cpu")
    combine_(list(out), list(rows), weights)
    return out


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


@dataclass(frozen=True)
class Plane:
    r"""The plane through three weight vectors.

    With :math:`u = w_1 - w_0` and :math:`v = (w_2 - w_0) - \langle w_2 - w_0, \hat u\rangle \hat u`
    its points are :math:`w_0 + x\,\hat u + y\,\hat v` (Izmailov et al., 2018, section 3.1), so
    distances in the plane are those of weights.

    Attributes:
        rows: [3, n]: origin and both unit vectors.
        corners: coordinates (x, y) of the three vectors.
    """

    rows: Tensor
    corners: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, vectors: Mapping[str, Tensor]) -> Plane:
        """The plane through three named vectors [n] of one floating dtype.

        Raises:
            ValueError: not three, two of them are the same, or all lie on one line.
        """
        if len(vectors) != 3:
            raise ValueError(f"expected three weight vectors for a plane, found {len(vectors)}")
        names, (origin, first, second) = list(vectors), vectors.values()
        scale = max(_dot(w, w) ** 0.5 for w in vectors.values())
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = vectors[names[i]], vectors[names[j]]
            if float((a.double() - b.double()).norm()) <= _SAME * scale:
                raise ValueError(
                    f"expected three distinct weight vectors, found {names[i]} and {names[j]} equal"
                )
        u = first.double() - origin.double()
        length = float(u.norm())
        u /= length
        v = second.double() - origin.double()
        whole, along = float(v.norm()), _dot(v, u)
        v -= along * u
        v -= _dot(v, u) * u  # what the first subtraction left by rounding
        height = float(v.norm())
        if height <= _SAME * whole:
            raise ValueError(
                f"expected three weight vectors that span a plane, found {', '.join(names)} on one "
                "line"
            )
        rows = torch.stack((origin.double(), u, v / height)).to(origin.dtype)
        return cls(rows, ((0.0, 0.0), (length, 0.0), (along, height)))

    def project(self, vector: Tensor) -> tuple[float, float, float]:
        """Coordinates of the nearest point of the plane, and how far it is."""
        origin, u, v = self.rows.double()
        offset = vector.double() - origin
        x, y = _dot(offset, u), _dot(offset, v)
        return x, y, float((offset - x * u - y * v).norm())

    def points(self, coordinates: Sequence[tuple[float, float]]) -> Tensor:
        """The weight vectors [K, n] at coordinates."""
        weights = [(1.0, x, y) for x, y in coordinates]
        return combine(self.rows, torch.tensor(weights, dtype=torch.float64))


def directions(count: int, like: Tensor, seed: int) -> Tensor:
    """Directions drawn uniformly from the unit sphere, [count, n], as float32 or ``like``'s dtype;
    the same ones for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, like.numel(), generator=generator, dtype=torch.float32).double()
    rows /= rows.norm(dim=1, keepdim=True)
    return rows.to(like.device, like.dtype)


def distances(vectors: Mapping[str, Tensor], centre: str) -> tuple[Tensor, Tensor]:
    """Pairwise distances, and the cosines of the angles at ``centre`` between the others, float64
    [N, N]; NaN where an arm has no length."""
    rows = torch.stack([vector.double() for vector in vectors.values()])
    arms = rows - vectors[centre].double()
    norms = arms.norm(dim=1)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist"), (
        arms @ arms.T / (norms[:, None] * norms[None, :])
    )
