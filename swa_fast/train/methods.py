"""The training methods: which trajectories they need, and what they average along them.

A *trajectory* is one sequence of training steps. A *method* is a rule that makes a result of it:

=========== ============ ==========================================================================
method      trajectory   result
=========== ============ ==========================================================================
sgd         sgd          the last weights of the conventional run
ema         sgd          exponential moving average of its weights, one update per step
fge         fge          ensemble of the networks in the middle of each triangular cycle
swa         swa          mean of the weights at the end of epochs at a constant rate
swa-cyclic  swa-cyclic   mean of the weights at the end of each cycle of a sawtooth rate
swa-fixed   swa-fixed    mean of the weights at the end of epochs at one rate from the first step
=========== ============ ==========================================================================

fge, swa-cyclic and, on demand, swa go on from the conventional run after some of its epochs, with
its momentum.

Sources: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
UAI 2018, arXiv 1803.05407; Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling
of DNNs", NeurIPS 2018, arXiv 1802.10026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .. import schedules
from .config import TrainConfig

__all__ = ["Trajectory", "plan"]


@dataclass(frozen=True)
class Trajectory:
    """One sequence of training steps.

    Attributes:
        name: of its files and records.
        begin: finished epochs of the trajectory sgd that it goes on from; 0 for initial weights.
        end: its last epoch. Epochs are counted from the initial weights.
        rate: learning rate of a step, given the finished epochs, the finished steps of the present
            one and the steps per epoch.
        captures: by method, whether weights are captured after so many epochs; None for every step.
        marks: by method, the epochs after which results are reported, by budget.
        branches: epochs after which other trajectories go on from this one.
    """

    name: str
    begin: int
    end: int
    rate: Callable[[int, int, int], float]
    captures: Mapping[str, Callable[[int], bool] | None]
    marks: Mapping[str, Mapping[float, int]]
    branches: tuple[int, ...] = ()

    @property
    def reported(self) -> frozenset[int]:
        """All epochs after which a result is reported."""
        return frozenset(epoch for marks in self.marks.values() for epoch in marks.values())


def plan(config: TrainConfig) -> list[Trajectory]:
    """The trajectories that the methods of a configuration need, in the order of training."""
    chosen = config.methods
    others = {"swa": _swa, "swa-cyclic": _swa_cyclic, "fge": _fge, "swa-fixed": _swa_fixed}
    after = [make(config) for method, make in others.items() if method in chosen]
    branches = tuple(sorted({each.begin for each in after if each.begin > 0}))
    conventional = "sgd" in chosen or "ema" in chosen
    if not conventional and not branches:
        return after
    end = config.epochs if conventional else branches[-1]
    sgd = Trajectory(
        name="sgd",
        begin=0,
        end=end,
        rate=_conventional_rate(config),
        captures={"ema": None} if "ema" in chosen else {},
        marks={method: {1.0: end} for method in ("sgd", "ema") if method in chosen},
        branches=branches,
    )
    return [sgd, *after]


def _conventional_rate(config: TrainConfig) -> Callable[[int, int, int], float]:
    lr, total = config.lr, config.epochs

    def rate(epoch: int, step: int, steps: int) -> float:
        if config.lr_schedule == "paper":
            return schedules.paper_lr(epoch, lr=lr, total=total, final_lr=0.01 * lr)
        if config.lr_schedule == "cosine":
            return schedules.cosine_lr(epoch + step / steps, lr=lr, total=total)
        if config.lr_schedule == "steps":
            return schedules.step_lr(epoch, lr=lr, total=total)
        return lr

    return rate


def _counts_initial(config: TrainConfig, begin: int) -> bool:
    """Whether the weights that averaging starts from are averaged: by default those of a network
    that is already trained, as in the paper's algorithm, but not those in the middle of a run, as
    in the authors' code."""
    if config.include_initial is not None:
        return config.include_initial
    return begin == config.epochs or (begin == 0 and config.pretrained is not None)


def _trajectory(
    config: TrainConfig,
    method: str,
    begin: int,
    first: int,
    rate: Callable[[int, int, int], float],
    captured: Callable[[int], bool],
) -> Trajectory:
    """The trajectory of one method; it reports the budgets that hold its ``first`` capture."""
    ends = {budget: schedules.budget_epoch(config.epochs, budget) for budget in config.budgets}
    marks = {budget: end for budget, end in ends.items() if end >= first}
    return Trajectory(method, begin, config.last_epoch, rate, {method: captured}, {method: marks})


def _swa(config: TrainConfig) -> Trajectory:
    first = schedules.first_capture(config.epochs, config.swa_start)
    initial = _counts_initial(config, first - 1)
    scratch = config.swa_from == "scratch"

    def rate(epoch: int, step: int, steps: int) -> float:
        if scratch:
            lr, swa_lr = config.lr, config.swa_lr
            return schedules.paper_swa_lr(epoch, lr=lr, swa_lr=swa_lr, start=first)
        return config.swa_lr

    def captured(epoch: int) -> bool:
        if epoch == first - 1:
            return initial
        return epoch >= first and (epoch - first) % config.swa_every == 0

    return _trajectory(config, "swa", 0 if scratch else first - 1, first, rate, captured)


def _swa_cyclic(config: TrainConfig) -> Trajectory:
    begin = schedules.first_capture(config.epochs, config.swa_start) - 1
    initial = _counts_initial(config, begin)
    cycle = config.cycle_epochs
    assert cycle is not None

    def rate(epoch: int, step: int, steps: int) -> float:
        passed = epoch - begin
        if config.cycle_shape == "cosine":
            return schedules.cosine_cycle_lr(
                passed + step / steps, lr=config.lr, total=config.epochs, cycle=cycle
            )
        return schedules.cyclic_lr(
            passed * steps + step + 1,
            lr_max=config.cycle_lr_max,
            lr_min=config.cycle_lr_min,
            cycle=cycle * steps,
        )

    def captured(epoch: int) -> bool:
        return initial if epoch == begin else (epoch - begin) % cycle == 0

    return _trajectory(config, "swa-cyclic", begin, begin + cycle, rate, captured)


def _fge(config: TrainConfig) -> Trajectory:
    begin = schedules.first_capture(config.epochs, config.fge_start) - 1
    cycle, low, high = config.fge_cycle, config.fge_lr_min, config.fge_lr_max

    def rate(epoch: int, step: int, steps: int) -> float:
        return schedules.fge_lr(epoch - begin + step / steps, lr_max=high, lr_min=low, cycle=cycle)

    def captured(epoch: int) -> bool:
        return epoch > begin and schedules.fge_member(epoch - begin, cycle=cycle)

    end = config.epochs
    return Trajectory("fge", begin, end, rate, {"fge": captured}, {"fge": {1.0: end}})


def _swa_fixed(config: TrainConfig) -> Trajectory:
    first = schedules.first_capture(config.epochs, config.fixed_start)

    def rate(epoch: int, step: int, steps: int) -> float:
        return config.fixed_lr

    return _trajectory(config, "swa-fixed", 0, first, rate, lambda epoch: epoch >= first)
