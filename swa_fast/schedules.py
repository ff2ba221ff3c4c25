"""Learning-rate schedules of Stochastic Weight Averaging and of what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

__all__ = [
    "SWALR",
    "DelayedSWALR",
    "budget_epoch",
    "cosine_cycle_lr",
    "cosine_lr",
    "cyclic_lr",
    "fge_lr",
    "fge_member",
    "first_capture",
    "paper_lr",
    "paper_swa_lr",
    "step_lr",
]


class DelayedSWALR(LRScheduler):
    r"""Leaves the rates alone until its call number ``start``, then moves each parameter group's
    from what it is then to ``swa_lr``, where it stays.

    .. math::
        \text{rate}(e) = r_0 + \alpha(t)\,(r_\text{swa} - r_0), \qquad
        t = \min\left(1, \frac{e - \text{start} + 1}{\text{anneal\_epochs}}\right), \qquad
        \alpha(t) = \begin{cases} (1 - \cos \pi t)/2 & \text{cos} \\ t & \text{linear}
        \end{cases}

    after the e-th call of ``step``, :math:`e \ge \text{start}`, with the group's rate :math:`r_0`
    before call ``start``. As the rate goes by :math:`e` alone, it may be called at every epoch
    after another schedule, which it overrules from ``start`` on. torch's
    :class:`~torch.optim.swa_utils.SWALR`, which goes from the last rate to the next, writes one as
    soon as it is made (with ``anneal_epochs=0``), fails when a group is added later, and begins
    anew from ``last_epoch``.

    Args:
        optimizer: whose groups' ``lr`` is written.
        swa_lr: the last rate: of all groups, also of those added later, or one for each. A group
            added later may bring its own as ``swa_lr``, and has to beside a list.
        start: the first call that writes. 1, torch's way, is for a schedule that is called from
            the start of the averaging phase only; :func:`first_capture` says when that is.
        anneal_epochs: calls until ``swa_lr`` is reached; 0 and 1 reach it at once.
        anneal_strategy: ``cos`` or ``linear``.
        last_epoch: calls made in the run that goes on, or -1. It needs the optimiser's state to be
            loaded before. As with torch's schedules, being made counts as the next call.

    :math:`r_0` is in ``state_dict()`` and, for ``last_epoch``, in each group as ``swa_from_lr``. Of
    a group that is added after ``start`` it is the rate at the call that first finds the group.

    Raises:
        ValueError: an argument outside its range, a rate that is missing for a group (nothing is
            written then), or ``last_epoch`` amid the annealing without the optimiser's state.

    Source: the schedule of Izmailov et al., UAI 2018, arXiv 1803.05407, with torch's annealing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | Sequence[float],
        *,
        start: int = 1,
        anneal_epochs: int = 10,
        anneal_strategy: str = "cos",
        last_epoch: int = -1,
    ) -> None:
        for name, value, least in (("start", start, 1), ("anneal_epochs", anneal_epochs, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, found {value}")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(
                f"anneal_strategy: expected 'cos' or 'linear', found {anneal_strategy!r}"
            )
        listed = isinstance(swa_lr, Sequence)
        rates = [float(rate) for rate in swa_lr] if isinstance(swa_lr, Sequence) else [swa_lr]
        for rate in rates:
            if not 0 <= rate < math.inf:
                raise ValueError(f"swa_lr: expected a number of 0 or more, found {rate}")
        groups = optimizer.param_groups
        if listed and len(rates) != len(groups):
            raise ValueError(
                f"swa_lr: expected one rate or one for each of {len(groups)} groups, found "
                f"{len(rates)}"
            )
        self.swa_lr: float | list[float] = rates if listed else rates[0]
        self.start, self.anneal_epochs = start, anneal_epochs
        self.anneal_strategy = anneal_strategy
        # For each group: the last rate that it brought itself, and the rate at the start.
        self._own: list[float | None] = [None] * len(groups)
        self._from: list[float] = []
        if last_epoch >= 0 and not listed:
            self._own = [group.get("swa_lr") for group in groups]
        if last_epoch >= 0:
            self._from = [group["swa_from_lr"] for group in groups if "swa_from_lr" in group]
            if not self._from and last_epoch >= start and self._share(last_epoch) < 1:
                raise ValueError(
                    f"last_epoch: {last_epoch} is amid the annealing; load the optimizer's state "
                    "first, which says from which rate (swa_from_lr in each group)"
                )
            for group in groups:  # torch wants it, also of those added after schedules were made
                group.setdefault("initial_lr", group["lr"])
        super().__init__(optimizer, last_epoch)

    def _share(self, epoch: int) -> float:
        """How much of the way is gone after this call."""
        t = min(1.0, (epoch - self.start + 1) / max(1, self.anneal_epochs))
        return (1.0 - math.cos(math.pi * t)) / 2.0 if self.anneal_strategy == "cos" else t

    def _last_rate(self, index: int) -> float:
        own = self._own[index]
        if own is not None:
            return own
        if isinstance(self.swa_lr, float | int):
            return self.swa_lr
        if index < len(self.swa_lr):
            return self.swa_lr[index]
        raise ValueError(
            f"swa_lr: found {len(self.swa_lr)} rates, none for group {index}, which was added "
            "later; add it with its own 'swa_lr'"
        )

    def get_lr(self) -> list[float | Tensor]:
        """The groups' rates after this call; ``get_last_lr`` has the present ones."""
        groups = self.optimizer.param_groups
        self._own += [group.get("swa_lr") for group in groups[len(self._own) :]]
        for group, own in zip(groups, self._own, strict=False) if self.last_epoch > 0 else ():
            # What an earlier schedule left there is not taken for a group's own by the next.
            group.pop("swa_lr", None)
            if own is not None:
                group["swa_lr"] = own
        if self.last_epoch < self.start:
            return [group["lr"] for group in groups]
        last = [self._last_rate(i) for i in range(len(groups))]
        self._from += [float(group["lr"]) for group in groups[len(self._from) :]]
        for group, rate in zip(groups, self._from, strict=False):
            group["swa_from_lr"] = rate
        share = self._share(self.last_epoch)
        return [
            swa_lr if share == 1 else rate + share * (swa_lr - rate)
            for rate, swa_lr in zip(self._from, last, strict=False)
        ]


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
    ``epochs + 1``: no capture within the budget, as when a trained network goes on.

    Raises:
        ValueError: ``epochs`` below 1 or ``fraction`` below 0.
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected 1 or more, found {epochs}")
    if not fraction >= 0:
        raise ValueError(f"fraction: expected a number of 0 or more, found {fraction}")
    # Rounding keeps a product such as 0.29 * 100 = 28.999999999999996 from losing an epoch.
    return math.floor(round(fraction * epochs, 6)) + 1


def cyclic_lr(iteration: int, *, lr_max: float, lr_min: float, cycle: int) -> float:
    r"""Learning rate of the paper's cyclical schedule: a linear fall in every cycle, then a jump.

    .. math::
        t = \frac{((i - 1) \bmod c) + 1}{c} \qquad \text{rate} = (1 - t)\,\alpha_1 + t\,\alpha_2

    The last iteration of a cycle uses exactly :math:`\alpha_2`; the weights are captured after it.
    :math:`\alpha_1` itself is never used.

    Args:
        iteration: i, counted from 1 at the start of the averaging phase.
        lr_max, lr_min: :math:`\alpha_1` and :math:`\alpha_2`.
        cycle: c, iterations per cycle.

    Raises:
        ValueError: ``iteration`` or ``cycle`` below 1, a rate not above 0, or ``lr_min`` above
            ``lr_max``.

    Source: Izmailov et al., UAI 2018, arXiv 1803.05407, section 3.
    """
    for name, value in (("iteration", iteration), ("cycle", cycle)):
        if not value >= 1:
            raise ValueError(f"{name}: expected 1 or more, found {value}")
    _expect_falling(lr_max, lr_min)
    t = ((iteration - 1) % cycle + 1) / cycle
    return (1.0 - t) * lr_max + t * lr_min


def fge_lr(epoch: float, *, lr_max: float, lr_min: float, cycle: int) -> float:
    r"""Learning rate of Fast Geometric Ensembling: a triangle in every cycle.

    .. math::
        t = \frac{\text{epoch} \bmod c}{c} \qquad \text{rate} = \begin{cases}
        (1 - 2t)\,\alpha_1 + 2t\,\alpha_2 & t < 1/2 \\
        (2t - 1)\,\alpha_1 + (2 - 2t)\,\alpha_2 & \text{otherwise} \end{cases}

    A member of the ensemble is taken in the middle of a cycle, where the rate is least: after every
    epoch for which :func:`fge_member` holds.

    Args:
        epoch: epochs trained so far since the ensembling began, with the fraction of the present
            one: e + j/n before the step j = 0, ..., n - 1 of n.
        lr_max, lr_min: :math:`\alpha_1` and :math:`\alpha_2`.
        cycle: c, an even number of epochs.

    Raises:
        ValueError: ``epoch`` below 0, ``cycle`` odd or below 2, a rate not above 0, or ``lr_min``
            above ``lr_max``.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
    NeurIPS 2018, arXiv 1802.10026.
    """
    if not epoch >= 0:
        raise ValueError(f"epoch: expected 0 or more, found {epoch}")
    if cycle < 2 or cycle % 2:
        raise ValueError(f"cycle: expected an even number of epochs, found {cycle}")
    _expect_falling(lr_max, lr_min)
    t = (epoch % cycle) / cycle
    if t < 0.5:
        return (1.0 - 2.0 * t) * lr_max + 2.0 * t * lr_min
    return (2.0 * t - 1.0) * lr_max + (2.0 - 2.0 * t) * lr_min


def fge_member(epoch: int, *, cycle: int) -> bool:
    """Whether Fast Geometric Ensembling takes a member after ``epoch`` epochs (counted from 1 since
    it began) with cycles of ``cycle`` epochs: in the middle of each."""
    return (epoch - 1) % cycle + 1 == cycle // 2


def cosine_lr(epoch: float, *, lr: float, total: float) -> float:
    r"""Cosine schedule without restarts:
    :math:`\tfrac12\,\text{lr}\,(1 + \cos(\pi\,\text{epoch}/\text{total}))`.

    Args:
        epoch: epochs trained so far, with the fraction of the present one; ``total`` at most.
        lr: the initial rate.
        total: epochs of the whole budget.

    Raises:
        ValueError: ``epoch`` outside [0, total], or ``lr`` or ``total`` not above 0.

    Source: Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983; as used for Shake-Shake networks by
    Gastaldi, arXiv 1705.07485.
    """
    for name, value in (("lr", lr), ("total", total)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, found {value}")
    if not 0 <= epoch <= total:
        raise ValueError(f"epoch: expected 0 to {total}, found {epoch}")
    return 0.5 * lr * (1.0 + math.cos(math.pi * epoch / total))


def cosine_cycle_lr(epoch: float, *, lr: float, total: float, cycle: float) -> float:
    r"""The stretch of :func:`cosine_lr` that ends one cycle before the end, again and again: the
    rate at epoch :math:`\text{total} - 2c + (\text{epoch} \bmod c)`.

    With ``lr`` 0.2, 1,800 epochs and cycles of 100 it is the schedule of the paper's Shake-Shake
    runs, :math:`0.1\,(1 + \cos(\pi\,(1600 + k \bmod 100)/1800))`.

    Args:
        epoch: epochs since the averaging phase began, with the fraction of the present one.
        lr, total: of the cosine schedule before.
        cycle: c, epochs per cycle; half of ``total`` at most.

    Raises:
        ValueError: ``epoch`` below 0, ``cycle`` outside (0, total/2], or as :func:`cosine_lr`.
    """
    if not epoch >= 0:
        raise ValueError(f"epoch: expected 0 or more, found {epoch}")
    if not 0 < cycle <= total / 2:
        raise ValueError(
            f"cycle: expected a number above 0 and at most half of {total}, found {cycle}"
        )
    return cosine_lr(total - 2 * cycle + epoch % cycle, lr=lr, total=total)


def step_lr(epoch: float, *, lr: float, total: float) -> float:
    """A tenth of the rate from half of ``total`` epochs on, and a hundredth from three quarters on,
    as PyramidNets are trained (Han et al., CVPR 2017, arXiv 1610.02915).

    Args:
        epoch: epochs trained so far.
        lr: the initial rate.
        total: epochs of the whole budget.

    Raises:
        ValueError: ``epoch`` below 0, or ``lr`` or ``total`` not above 0.
    """
    if not epoch >= 0:
        raise ValueError(f"epoch: expected 0 or more, found {epoch}")
    for name, value in (("lr", lr), ("total", total)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, found {value}")
    return lr * (1.0 if epoch < 0.5 * total else 0.1 if epoch < 0.75 * total else 0.01)


def budget_epoch(epochs: int, budget: float) -> int:
    """The epoch, counted from 1, with which ``budget`` times ``epochs`` are spent; half an epoch
    counts as one (1.25 budgets of 150 end with epoch 188).

    Raises:
        ValueError: ``epochs`` below 1 or ``budget`` not above 0.
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected 1 or more, found {epochs}")
    if not budget > 0:
        raise ValueError(f"budget: expected a number above 0, found {budget}")
    return max(1, math.floor(round(budget * epochs, 6) + 0.5))


def _expect_falling(lr_max: float, lr_min: float) -> None:
    for name, value in (("lr_max", lr_max), ("lr_min", lr_min)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, found {value}")
    if lr_min > lr_max:
        raise ValueError(f"lr_min: expected {lr_max} (lr_max) at most, found {lr_min}")
