"""Learning-rate schedules of Stochastic Weight Averaging."""

from __future__ import annotations

import math

from torch.optim.swa_utils import SWALR

__all__ = ["SWALR", "first_capture", "paper_lr", "paper_swa_lr"]


def paper_lr(epoch: float, *, lr: float, total: float, final_lr: float) -> float:
    r"""Learning rate of the paper's conventional schedule: full, then linearly down, then constant.

    .. math::
        t = \text{epoch}/\text{total} \qquad r = \text{final\_lr}/\text{lr} \qquad
        \text{rate} = \text{lr} \cdot \begin{cases} 1 & t \le 0.5 \\
        1 - (1 - r)\,(t - 0.5)/0.4 & 0.5 < t \le 0.9 \\ r & t > 0.9 \end{cases}

    Args:
        epoch: epochs trained so far (0 before the first one). The paper sets the rate once, before
            each epoch. Any number beyond ``total`` gives ``final_lr``.
        lr: the initial rate.
        total: epochs of the whole budget.
        final_lr: the last rate; 0.01 ``lr`` in the paper's conventional runs.

    Raises:
        ValueError: ``epoch`` below 0, ``total`` or a rate not above 0.

    Source: Izmailov et al., UAI 2018, arXiv 1803.05407.
    """
    if not epoch >= 0:
        raise ValueError(f"epoch: expected 0 or more, found {epoch}")
    for name, value in (("lr", lr), ("total", total), ("final_lr", final_lr)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, found {value}")
    t = epoch / total
    if t <= 0.5:
        return lr
    if t > 0.9:
        return final_lr
    return lr * (1.0 - (1.0 - final_lr / lr) * (t - 0.5) / 0.4)


def paper_swa_lr(epoch: float, *, lr: float, swa_lr: float, start: int) -> float:
    """Learning rate of the paper's SWA run: :func:`paper_lr` from ``lr`` down to ``swa_lr``, as if
    the budget were ``start`` epochs, and ``swa_lr`` from then on.

    Args:
        epoch: epochs trained so far.
        lr: the initial rate.
        swa_lr: the constant rate while weights are averaged.
        start: the epoch, counted from 1, after which weights are captured first (161 of 200 and
            126 of 150 in the paper's runs); see :func:`first_capture`.

    Raises:
        ValueError: as :func:`paper_lr`.

    Source: Izmailov et al., UAI 2018, arXiv 1803.05407.
    """
    return paper_lr(epoch, lr=lr, total=start, final_lr=swa_lr)


def first_capture(epochs: int, fraction: float) -> int:
    r"""The epoch, counted from 1, after which the first weights are averaged:
    :math:`\lfloor \text{fraction} \cdot \text{epochs} \rfloor + 1`.

    Averaging begins once ``fraction`` of the budget has passed, so the first weights taken are
    those after one further epoch: 0.8 of 200 epochs gives 161. A fraction of 1 gives
    ``epochs + 1``: no capture within the budget.

    Raises:
        ValueError: ``epochs`` below 1 or ``fraction`` outside (0, 1].
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected 1 or more, found {epochs}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number in (0, 1], found {fraction}")
    # Rounding keeps a product such as 0.29 * 100 = 28.999999999999996 from losing an epoch.
    return math.floor(round(fraction * epochs, 6)) + 1
