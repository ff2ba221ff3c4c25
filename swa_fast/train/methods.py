"""The training methods: which trajectories they need, and what they average along them.

A *trajectory* is one sequence of training steps. A *method* is a rule that makes a result of it:

=========== ============ ==========================================================================
method      trajectory   result
=========== ============ ==========================================================================
sgd         sgd          the last weights of the conventional run
ema         sgd          exponential moving average of its weights, one update per step
fge         fge          ensemble of the networks in the middle of each triangular cycle; beside it,
                         as fge-average, the mean of their weights
swa         swa          mean of the weights at the end of epochs at a constant rate
swa-cyclic  swa-cyclic   mean of the weights at the end of each cycle of a sawtooth rate
swa-fixed   swa-fixed    mean of the weights at the end of epochs at one rate from the first step
swa-power   swa          mean of swa's captures that weighs the n-th by a power of n
lawa        swa          mean of swa's last captures
swag        swa          mean prediction of samples of a Gaussian around swa's captures
=========== ============ ==========================================================================

fge, swa-cyclic and, on demand, swa go on from the conventional run after some of its epochs, with
its momentum.

Sources: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
UAI 2018, arXiv 1803.05407; Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling
of DNNs", NeurIPS 2018, arXiv 1802.10026; of the last three methods see :class:`swa_fast.Power`,
:class:`swa_fast.Window` and :class:`swa_fast.SWAG`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .. import schedules
from .config import TrainConfig
from .defaults import ALONG_SWA

#: Learning rate of a step, given the finished epochs, the finished steps of the present one and the
#: steps per epoch.
Rate = Callable[[int, int, int], float]

#: Whether weights are captured after so many epochs; None stands for a capture after every step.
Captured = Callable[[int], bool] | None


@dataclass(frozen=True)
class Trajectory:
    """One sequence of training steps.

    Attributes:
        name: of its files and records.
        begin: finished epochs of the trajectory sgd that it goes on from; 0 for initial weights.
        end: its last epoch. Epochs are counted from the initial weights.
        rate: of its steps.
        captures: by method, when weights are captured.
        marks: by method, the epochs after which results are reported, by budget.
        branches: epochs after which other trajectories go on from this one.
    """

    name: str
    begin: int
    end: int
    rate: Rate
    captures: Mapping[str, Captured]
    marks: Mapping[str, Mapping[float, int]]
    branches: tuple[int, ...] = ()

    @property
    def reported(self) -> frozenset[int]:
        """All epochs after which a result is reported."""
        return frozenset(epoch for marks in self.marks.values() for epoch in marks.values())


def plan(config: TrainConfig) -> list[Trajectory]:
    """The trajectories that the methods of a configuration need, in the order of training."""
    chosen = config.methods
    after = [_swa(config)] if any(method in chosen for method in ALONG_SWA) else []
    others = {"swa-cyclic": _swa_cyclic, "fge": _fge, "swa-fixed": _swa_fixed}
    after += [make(config) for method, make in others.items() if method in chosen]
    branches = tuple(sorted({each.begin for each in after if each.begin > 0}))
    conventional: list[str] = [method for method in ("sgd", "ema") if method in chosen]
    if not conventional and not branches:
        return after
    end = config.epochs if conventional else branches[-1]
    marks = {method: {1.0: end} for method in conventional}
    captures: dict[str, Captured] = {"ema": None} if "ema" in chosen else {}
    return [Trajectory("sgd", 0, end, _conventional(config), captures, marks, branches), *after]


def _conventional(config: TrainConfig) -> Rate:
    lr, total = config.lr, config.epochs
    schedule: dict[str, Rate] = {
        "paper": lambda epoch, step, steps: schedules.paper_lr(
            epoch, lr=lr, total=total, final_lr=0.01 * lr
        ),
        "cosine": lambda epoch, step, steps: schedules.cosine_lr(
            epoch + step / steps, lr=lr, total=total
        ),
        "steps": lambda epoch, step, steps: schedules.step_lr(epoch, lr=lr, total=total),
        "constant": lambda epoch, step, steps: lr,
    }
    return schedule[config.lr_schedule]


def _counts_initial(config: TrainConfig, begin: int) -> bool:
    """Whether the weights that averaging starts from are averaged: by default those of a network
    that is already trained, as in the paper's algorithm, but not those in the middle of a run, as
    in the authors' code."""
    if config.include_initial is not None:
        return config.include_initial
    return begin == config.epochs or (begin == 0 and config.pretrained is not None)


def _averaged(
    config: TrainConfig,
    name: str,
    begin: int,
    first: int,
    rate: Rate,
    captured: Captured,
    methods: Sequence[str] = (),
) -> Trajectory:
    """The trajectory of the method of its name, or of several; it reports the budgets that hold
    its ``first`` capture."""
    ends = {budget: schedules.budget_epoch(config.epochs, budget) for budget in config.budgets}
    marks = {budget: end for budget, end in ends.items() if end >= first}
    along = methods or (name,)
    captures, reported = dict.fromkeys(along, captured), dict.fromkeys(along, marks)
    return Trajectory(name, begin, config.last_epoch, rate, captures, reported)


def _swa(config: TrainConfig) -> Trajectory:
    first = schedules.first_capture(config.epochs, config.swa_start)
    initial = _counts_initial(config, first - 1)
    scratch, lr, swa_lr = config.swa_from == "scratch", config.lr, config.swa_lr

    def rate(epoch: int, step: int, steps: int) -> float:
        if scratch:
            return schedules.paper_swa_lr(epoch, lr=lr, swa_lr=swa_lr, start=first)
        return swa_lr

    def captured(epoch: int) -> bool:
        if epoch == first - 1:
            return initial
        return epoch >= first and (epoch - first) % config.swa_every == 0

    methods = [method for method in ALONG_SWA if method in config.methods]
    return _averaged(config, "swa", 0 if scratch else first - 1, first, rate, captured, methods)


def _swa_cyclic(config: TrainConfig) -> Trajectory:
    begin = schedules.first_capture(config.epochs, config.swa_start) - 1
    initial, cycle = _counts_initial(config, begin), config.cycle_epochs
    assert cycle is not None
    lr, low, high = config.lr, config.cycle_lr_min, config.cycle_lr_max

    def rate(epoch: int, step: int, steps: int) -> float:
        passed = epoch - begin
        if config.cycle_shape == "cosine":
            return schedules.cosine_cycle_lr(
                passed + step / steps, lr=lr, total=config.epochs, cycle=cycle
            )
        done = passed * steps + step + 1
        return schedules.cyclic_lr(done, lr_max=high, lr_min=low, cycle=cycle * steps)

    def captured(epoch: int) -> bool:
        return initial if epoch == begin else (epoch - begin) % cycle == 0

    return _averaged(config, "swa-cyclic", begin, begin + cycle, rate, captured)


def _fge(config: TrainConfig) -> Trajectory:
    begin, end = schedules.first_capture(config.epochs, config.fge_start) - 1, config.epochs
    cycle, low, high = config.fge_cycle, config.fge_lr_min, config.fge_lr_max

    def rate(epoch: int, step: int, steps: int) -> float:
        return schedules.fge_lr(epoch - begin + step / steps, lr_max=high, lr_min=low, cycle=cycle)

    def captured(epoch: int) -> bool:
        return epoch > begin and schedules.fge_member(epoch - begin, cycle=cycle)

    results = ("fge", "fge-average")
    captures, marks = dict.fromkeys(results, captured), {key: {1.0: end} for key in results}
    return Trajectory("fge", begin, end, rate, captures, marks)


def _swa_fixed(config: TrainConfig) -> Trajectory:
    first = schedules.first_capture(config.epochs, config.fixed_start)
    return _averaged(
        config, "swa-fixed", 0, first, lambda *_: config.fixed_lr, lambda epoch: epoch >= first
    )
