"""Which checkpoints are averaged, in which order, and with which weights."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import CheckpointError

__all__ = ["expand", "merge_weights", "natural_key", "select", "step_of"]

KINDS = "uniform, linear, minus-sqrt, cosine, power:P, ema:D, window:A:B, or numbers"

# Of running means of fp32 weights, that their difference may have lost.
_WINDOW_TOLERANCE = 1e-6


def _number(text: str, kind: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (low == 0.0 and math.isinf(high) and value == 0.0):
        limits = "above 0" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise CheckpointError(f"weights: expected {kind} with a number {limits}, found {text!r}")
    return value


def _power(p: float, n: int) -> list[float]:
    """i^p - (i-1)^p over n^p, without the cancellation of large i."""
    result = []
    for i in range(1, n + 1):
        # 1 - (1 - 1/i)^p
        step = 1.0 if i == 1 else -math.expm1(p * math.log1p(-1.0 / i))
        result.append(step * (i / n) ** p)
    return result


def merge_weights(kind: str | Sequence[float], n: int) -> list[float]:
    r"""The weights of ``n`` checkpoints, oldest first; they sum to 1.

    Checkpoints of a run at a constant learning rate, :math:`\theta_j = \theta_0 - \sum_{i \le j}
    g_i`, averaged with weights :math:`c_j`, are what the run would have come to had the
    :math:`i`-th stretch been taken at :math:`s_i = \sum_{j \ge i} c_j` times its rate. So a decay
    :math:`s` is replayed by :math:`c_j = s_j - s_{j+1}`; with :math:`s_i = f((i - 1) / n)`

    ==============  ============================  ==================================================
    kind            :math:`f(x)`                  :math:`c_j`
    ==============  ============================  ==================================================
    ``uniform``     :math:`1 - x`                 :math:`1 / n`; ``linear`` is the same
    ``minus-sqrt``  :math:`1 - \sqrt x`           :math:`(\sqrt j - \sqrt{j-1}) / \sqrt n`
    ``cosine``      :math:`(1 + \cos \pi x) / 2`  half of a period of the sine
    ``power:P``     :math:`1 - x^P`               :math:`(j^P - (j-1)^P) / n^P`
    ``ema:D``                                     :math:`D^{n-1}` for the first, then
                                                  :math:`(1 - D) D^{n-j}`
    ``window:A:B``                                :math:`-A / (B-A),\ B / (B-A)`: of the running
                                                  means after A and after B captures the mean of
                                                  captures A + 1 to B
    ==============  ============================  ==================================================

    Args:
        kind: one of the above, or ``n`` numbers (also as text, ``"1,2,1"``), at least 0, which are
            divided by their sum.
        n: how many checkpoints, at least 1.

    Raises:
        CheckpointError: an unknown kind, a number out of its range, not ``n`` numbers, negative
            ones, or none above 0; a window for other than two checkpoints.

    Source: Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
    Pre-training", 2025 (arXiv 2507.17634).
    """
    if n < 1:
        raise CheckpointError(f"expected at least one checkpoint, found {n}")
    if isinstance(kind, str):
        name, _, argument = kind.partition(":")
        if name in ("uniform", "linear") and not argument:
            return [1.0 / n] * n
        if name == "minus-sqrt" and not argument:
            return _power(0.5, n)
        if name == "cosine" and not argument:
            # cos a - cos b as a product, without cancellation.
            half = math.pi / (2 * n)
            return [math.sin((2 * j - 1) * half) * math.sin(half) for j in range(1, n + 1)]
        if name == "power":
            return _power(_number(argument, "power:P", 0.0, math.inf), n)
        if name == "ema":
            decay = _number(argument, "ema:D", 0.0, 1.0)
            return [decay ** (n - 1)] + [(1 - decay) * decay ** (n - j) for j in range(2, n + 1)]
        if name == "window":
            return _window(argument, n)
        try:
            kind = [float(number) for number in kind.split(",")]
        except ValueError:
            raise CheckpointError(f"weights: expected {KINDS}; found {kind!r}") from None
    weights = [float(weight) for weight in kind]
    if len(weights) != n:
        raise CheckpointError(f"weights: expected {n}, one for each input, found {len(weights)}")
    for i, weight in enumerate(weights):
        if not 0.0 <= weight < math.inf:
            raise CheckpointError(f"weights: expected numbers of at least 0, found {weight} at {i}")
    total = math.fsum(weights)
    if not 0.0 < total < math.inf:
        raise CheckpointError(f"weights: expected a sum above 0, found {total}")
    return [weight / total for weight in weights]


def _window(argument: str, n: int) -> list[float]:
    found = re.fullmatch(r"(\d+):(\d+)", argument)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise CheckpointError(
            f"weights: expected window:A:B with whole numbers 0 < A < B, found window:{argument}"
        )
    if n != 2:
        raise CheckpointError(
            f"weights: window:A:B expects two inputs, the running means after A and after B "
            f"captures, found {n}"
        )
    a, b = int(found[1]), int(found[2])
    return [-a / (b - a), b / (b - a)]


def check_window(weights: Sequence[float], dtypes: set[torch.dtype]) -> None:
    """Refuses a window whose difference would be mostly the rounding of the running means.

    Raises:
        CheckpointError: the means, of one of ``dtypes``, would lose more than 1e-6.
    """
    grown = math.fsum(map(abs, weights))
    for dtype in sorted(dtypes, key=str):
        lost = grown * torch.finfo(dtype).eps / 2
        if lost > _WINDOW_TOLERANCE:
            raise CheckpointError(
                f"weights: the window between these running means would have a relative error of "
                f"{lost:.1g}, because they are {str(dtype).removeprefix('torch.')} and their "
                f"rounding grows {grown:.0f} times; keep such means in float64, or give the "
                "captures themselves"
            )


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Sorts checkpoint-9 before checkpoint-10."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(p), p) if p.isdigit() else (0, 0, p) for p in parts]


def step_of(path: str | Path) -> int:
    """The last whole number in a checkpoint's name.

    Raises:
        CheckpointError: there is none.
    """
    numbers = re.findall(r"\d+", re.sub(r"\.[A-Za-z]\w*$", "", Path(path).name))
    if not numbers:
        raise CheckpointError(f"window: expected a step in the name, found {Path(path).name}")
    return int(numbers[-1])


def expand(inputs: str | Path | Sequence[str | Path], *, sort: bool = False) -> list[Path]:
    """The checkpoints that paths and patterns name.

    Args:
        inputs: paths, or patterns with ``*``, ``?`` or ``[...]``. What a pattern matches is in
            natural order; otherwise the order is kept.
        sort: put all of them in natural order.

    Raises:
        CheckpointError: nothing is there.
    """
    result: list[Path] = []
    for item in [inputs] if isinstance(inputs, str | Path) else inputs:
        if Path(item).exists():
            result.append(Path(item))
        elif found := glob.glob(str(item)):
            result += map(Path, sorted(found, key=natural_key))
        else:
            raise CheckpointError(f"inputs: expected a file or folder, found nothing at {item}")
    if not result:
        raise CheckpointError("inputs: expected at least one checkpoint, found none")
    return sorted(result, key=natural_key) if sort else result


def select(
    paths: Sequence[Path],
    *,
    last: int | None = None,
    window: tuple[int, int] | None = None,
    every: int = 1,
) -> list[Path]:
    """Those of the checkpoints, oldest first, that are averaged.

    Args:
        paths: all of them.
        window: (A, B): those whose step, the last number in their name, lies in A < step <= B.
        every: of these every so many, counted back from the last.
        last: of these the last so many.

    Raises:
        CheckpointError: a number out of its range, or nothing left.
    """
    for name, value in (("last", last), ("every", every)):
        if value is not None and value < 1:
            raise CheckpointError(f"{name}: expected at least 1, found {value}")
    chosen = list(paths)
    if window is not None:
        low, high = window
        if not low < high:
            raise CheckpointError(f"window: expected A < B, found {low} and {high}")
        chosen = [path for path in chosen if low < step_of(path) <= high]
    chosen = chosen[::-1][::every][::-1]
    if last is not None:
        if last > len(chosen):
            raise CheckpointError(f"last: expected at most {len(chosen)} inputs, found {last}")
        chosen = chosen[-last:]
    if not chosen:
        raise CheckpointError(f"window: expected a step in ({low}, {high}], found none")
    return chosen
