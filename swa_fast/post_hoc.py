"""Post-hoc EMA: averages of any width from snapshots that a training left.

During training :class:`PostHoc` saves snapshots of one or two :class:`~swa_fast.Power` averages;
afterwards :func:`synthesize` makes the average of any other width as a weighted sum of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .averager import Averager
from .checkpoints.averaging import combine
from .checkpoints.entries import bytes_of
from .checkpoints.errors import CheckpointError
from .checkpoints.formats import reader
from .checkpoints.output import Layout, Output
from .checkpoints.safetensors import read_header
from .rules import Power
from .sharding import is_dtensor

__all__ = ["PostHoc", "Synthesis", "coefficients", "inner_product", "sigma_of", "synthesize"]

_MAX_TARGETS = 8
# Below it the target's profile is not square-integrable, or nearly so, at its beginning.
_CLOSED_FORM = -0.25


def sigma_of(gamma: float) -> float:
    r"""The relative width :math:`\sqrt{(\gamma+1) / ((\gamma+2)^2 (\gamma+3))}` of a profile."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def inner_product(
    t_a: float | np.ndarray, gamma_a: float | np.ndarray,
    t_b: float | np.ndarray, gamma_b: float | np.ndarray,
) -> Any:  # fmt: skip
    r"""Of two profiles :math:`p(\tau) = (\gamma+1)\, \tau^\gamma / t^{\gamma+1}` on
    :math:`[0, t]`:

    .. math::
        \langle p_a, p_b\rangle = \frac{(\gamma_a+1)(\gamma_b+1)\,(t_a/t_b)^x}
        {(\gamma_a+\gamma_b+1)\max(t_a, t_b)}, \qquad
        x = \begin{cases} \gamma_b & t_a < t_b \\ -\gamma_a & \text{else} \end{cases}

    Source: Karras et al., CVPR 2024, algorithm 3.
    """
    ratio = np.asarray(t_a, np.float64) / t_b
    power = np.where(ratio < 1, gamma_b, -np.asarray(gamma_a, np.float64))
    scale = (np.asarray(gamma_a) + 1) * (np.asarray(gamma_b) + 1)
    return scale * ratio**power / ((np.asarray(gamma_a) + gamma_b + 1) * np.maximum(t_a, t_b))


def coefficients(
    times: Sequence[float], gammas: Sequence[float], at: float, gamma: float
) -> tuple[np.ndarray, float]:
    r"""The weights of snapshots whose sum comes closest to a profile.

    Solves :math:`A c = b` with the inner products of the snapshots' profiles with each other and
    with the target's, in float64, and divides by :math:`\sum c`.

    Args:
        times: updates that each snapshot had seen, [r].
        gammas: of their averages, [r].
        at: updates that the target has seen.
        gamma: of the target, above -1.

    Returns:
        The weights, float64 [r], which sum to 1, and the relative L2 error of the profile.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    CVPR 2024, algorithm 3.
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    products = inner_product(t[:, None], g[:, None], t, g)
    target = inner_product(t, g, float(at), float(gamma))
    # In units in which every profile has the norm 1.
    unit = np.sqrt(np.diag(products))
    c = np.linalg.solve(products / np.outer(unit, unit), target / unit) / unit
    c /= c.sum()
    if gamma > _CLOSED_FORM:
        norm = float(inner_product(float(at), gamma, float(at), gamma))
        error = float(c @ products @ c - 2 * c @ target) / norm + 1.0
    else:
        error = _discrete_error(c, t, g, round(at), gamma)
    return c, math.sqrt(max(error, 0.0))


def _discrete_error(c: np.ndarray, t: np.ndarray, g: np.ndarray, at: int, gamma: float) -> float:
    """The squared relative error over the weights of the updates 1 to ``at``."""
    error = norm = 0.0
    for first in range(1, at + 1, 1 << 16):
        i = np.arange(first, min(first + (1 << 16), at + 1), dtype=np.float64)

        def profile(end: float, power: float, i: np.ndarray = i) -> np.ndarray:
            inside = (i / end) ** (power + 1) - ((i - 1) / end) ** (power + 1)
            return np.where(i <= end, inside, 0.0)

        wanted = profile(at, gamma)
        made = sum(weight * profile(end, power) for weight, end, power in zip(c, t, g, strict=True))
        error += float(np.square(made - wanted).sum())
        norm += float(np.square(wanted).sum())
    return error / norm


class PostHoc:
    """Snapshots of power-function averages during training, for :func:`synthesize`.

    Args:
        averager: with the averages.
        names: of averages by :class:`~swa_fast.Power` (or :class:`~swa_fast.SWA`), from the first
            update on. Two, such as ``Power(sigma_rel=0.05)`` and ``Power(sigma_rel=0.10)``, are
            far better than one.
        folder: where the snapshots go, a safetensors file each:
            ``NAME-UPDATES-SIGMA.safetensors``.
        every: calls of :meth:`update` from snapshot to snapshot. The error of the synthesis falls
            with the square of the number of snapshots: 16 to 32 suit most uses.

    Raises:
        KeyError: there is no average of that name.
        ValueError: ``every`` below 1, or an average by another rule.
    """

    def __init__(
        self, averager: Averager, names: Sequence[str], folder: str | Path, *, every: int
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, found {every}")
        rules = averager.state_dict()["rules"]
        self.gammas: dict[str, float] = {}
        for name in names:
            if name not in rules:
                raise KeyError(f"expected one of {', '.join(rules)}, found {name!r}")
            rule = rules[name]
            if rule["rule"] not in ("Power", "SWA") or rule.get("start"):
                raise ValueError(
                    f"averages[{name!r}]: expected Power from the first update on, found {rule}"
                )
            self.gammas[name] = float(rule.get("gamma", 0.0))
        if not self.gammas:
            raise ValueError("names: expected at least one average, found none")
        self.averager, self.folder, self.every = averager, Path(folder), every
        self._calls = max(averager.n_averaged[name] for name in self.gammas)

    def update(self) -> list[Path]:
        """To be called after every update of the averager: saves when it is time. Only then is
        the device waited for.

        Returns:
            The files that were written.
        """
        self._calls += 1
        return self.save() if self._calls % self.every == 0 else []

    @torch.no_grad()
    def save(self) -> list[Path]:
        """Saves a snapshot of each average now. Where parameters are sharded all processes have to
        call it, and the first writes.

        Returns:
            The files that were written here; none of an average that was not updated yet.

        Raises:
            CheckpointError: there is no room on the disk.
        """
        written = []
        counts = self.averager.n_averaged
        for name, gamma in self.gammas.items():
            if counts[name] == 0:
                continue
            path = self.folder / (f"{name}-{counts[name]:09d}-{sigma_of(gamma):.4f}.safetensors")
            note = {"average": name, "updates": counts[name], "gamma": gamma}
            weights: dict[str, Tensor] | None = self.averager.averages[name]
            if weights is not None and any(map(is_dtensor, weights.values())):
                weights = self.averager.full_averages(name)
            if weights is not None:
                _save(weights, path, note)
                written.append(path)
        return written


def _save(tensors: dict[str, Tensor], path: Path, note: dict[str, Any]) -> None:
    first: dict[int, str] = {}
    tied = {n: of for n, x in tensors.items() if (of := first.setdefault(id(x), n)) != n}
    names = sorted((n for n in tensors if n not in tied), key=lambda n: -tensors[n].itemsize)
    plan = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    metadata = {**tied, "format": "pt", "swa_fast": json.dumps({"post_hoc": note})}
    with Output(path, Layout(plan, path, "model", 1), tied, overwrite=True) as output:
        output.open(metadata)
        for name in names:
            output.write(name, 0, bytes_of(tensors[name].detach().cpu().contiguous()))
        output.commit(metadata, [], "keep")


@dataclass
class Synthesis:
    """An average that :func:`synthesize` made.

    Attributes:
        output: the file.
        gamma, sigma_rel: its width.
        at: updates that it has seen.
        error: relative L2 error of its profile. Where it is large, more snapshots are needed, or a
            width closer to theirs.
        l1: the sum of the weights' absolute values: what rounding of the snapshots grows by. Of
            fp16 snapshots a relative error of ``l1 / 2048`` remains.
        coefficients: the weights of the snapshots, by file.
    """

    output: str
    gamma: float
    sigma_rel: float
    at: int
    error: float
    l1: float
    coefficients: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def _targets(**given: float | str | Sequence[float | str] | None) -> list[float]:
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        found = ", ".join(chosen) or "none"
        raise ValueError(f"{', '.join(given)}: expected exactly one of them, found {found}")
    ((name, value),) = chosen.items()
    values = [value] if isinstance(value, str | int | float) else list(value)
    if not 1 <= len(values) <= _MAX_TARGETS:
        raise ValueError(f"{name}: expected 1 to {_MAX_TARGETS} targets, found {len(values)}")
    rules: list[Any] = [Power(**{name: v}) for v in values]  # type: ignore[arg-type]
    return [rule.gamma for rule in rules]


def synthesize(
    folder: str | Path,
    *,
    sigma_rel: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] | None = None,
    decay: str | Sequence[str] | None = None,
    at: int | None = None,
    out: str | Path | Sequence[str | Path],
    dtype: str = "keep",
    overwrite: bool = False,
    progress: bool = False,
) -> list[Synthesis]:
    r"""Makes averages of other widths from the snapshots of a training, in one pass over them.

    Args:
        folder: with the snapshots of :class:`PostHoc`, those of several averages together.
        sigma_rel, gamma, decay: the width, exactly one of the three, as for
            :class:`~swa_fast.Power`; or up to eight of them.
        at: updates that the average has seen; None takes the last snapshot. Later snapshots are
            not used, and there has to be one at just this number.
        out: a file for each target, or a folder or a file for one, as for
            :func:`~swa_fast.checkpoints.average`.
        dtype: of the result, see there.
        overwrite: replace what is there.
        progress: show a bar on stderr, with tqdm.

    Returns:
        For each target what it is and how well the snapshots could express it, which ``error`` and
        ``l1`` say.

    Raises:
        ValueError: not exactly one kind of target, more than eight, or one out of range.
        CheckpointError: no snapshots, none at ``at``, or any that cannot be read or do not fit
            together. Nothing is written.

    Source: Karras et al., CVPR 2024.
    """
    gammas = _targets(sigma_rel=sigma_rel, gamma=gamma, decay=decay)
    outputs = [Path(out)] if isinstance(out, str | Path) else [Path(path) for path in out]
    if len(outputs) != len(gammas):
        raise ValueError(f"out: expected {len(gammas)}, one for each target, found {len(outputs)}")
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"out: expected different places, found {', '.join(map(str, outputs))}")
    found = _snapshots(Path(folder))
    latest = max(updates for updates, _ in found)
    end = latest if at is None else at
    used = {key: path for key, path in sorted(found.items()) if key[0] <= end}
    if end not in {updates for updates, _ in used}:
        known = ", ".join(map(str, sorted({updates for updates, _ in found})))
        raise CheckpointError(f"at: expected the updates of a snapshot ({known}), found {end}")
    times, widths = (list(column) for column in zip(*used, strict=True))
    solved = [coefficients(times, widths, end, target) for target in gammas]
    results = [
        Synthesis(
            str(path), target, sigma_of(target), end, error, float(np.abs(c).sum()),
            {str(f): float(x) for f, x in zip(used.values(), c, strict=True)},
        )
        for path, target, (c, error) in zip(outputs, gammas, solved, strict=True)
    ]  # fmt: skip
    with ExitStack() as stack:
        opened = [stack.enter_context(reader(path)) for path in used.values()]
        combine(
            opened, outputs, torch.from_numpy(np.stack([c for c, _ in solved])),
            notes=[{"synthesis": result.to_json()} for result in results], accumulate="fp64",
            dtype=dtype, shard_size=5_000_000_000, checksums=False, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    return results


def _snapshots(folder: Path) -> dict[tuple[int, float], Path]:
    """The snapshots in a folder by their updates and gamma."""
    result: dict[tuple[int, float], Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        _, metadata = read_header(path)
        try:
            note = json.loads(metadata["swa_fast"])["post_hoc"]
            key = int(note["updates"]), float(note["gamma"])
        except (KeyError, ValueError, TypeError):
            continue
        if key in result:
            raise CheckpointError(
                f"{path}: expected one snapshot of gamma {key[1]} at {key[0]} updates, found "
                f"{result[key]} besides; keep the snapshots of each run in a folder of its own"
            )
        result[key] = path
    if not result:
        raise CheckpointError(f"{folder}: expected snapshots of PostHoc, found none")
    return result
