"""What methods make of a trajectory, beside its last weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swa_fast import EMA, SWA, SWAG, AveragedModel, Averager, Power, Window

from .clock import Clock
from .config import TrainConfig
from .evaluation import Evaluation, Score
from .methods import Captured
from .randomness import derive_seed
from .sharded import whole, whole_weights

Weights = Mapping[str, Mapping[str, Tensor]]  # state dicts, by the names of their files


class Average(ABC):
    """The result of a method along a trajectory.

    Attributes:
        per_process: whether every process has a state of its own.
        captures: how often weights were captured.
        every_step: whether weights are captured after every step, and not after epochs.
        costly: whether its score is worth the time only where it is reported.
    """

    per_process: ClassVar[bool] = False
    costly: ClassVar[bool] = False

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self.every_step = captured is None
        self.captures = 0

    def due(self, epoch: int) -> bool:
        """Whether weights are captured after ``epoch`` epochs."""
        return self._captured is not None and self._captured(epoch)

    @abstractmethod
    def capture(self, model: nn.Module, evaluation: Evaluation, clock: Clock) -> None:
        """Takes the weights of the network in training."""

    @abstractmethod
    def score(self, epoch: int, evaluation: Evaluation, clock: Clock, share: float = 1.0) -> Score:
        """Loss and accuracy after ``epoch`` epochs, with BatchNorm statistics of a ``share`` of the
        training batches where they have to be computed."""

    @abstractmethod
    def networks(self, epoch: int, reported: Sequence[str], model: nn.Module) -> Weights:
        """The weights that are saved after an epoch, given the names of the results that are
        ``reported`` then, and the network in training. All processes must call it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything from which :meth:`load_state_dict` continues; tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class WeightAverage(Average):
    """A running average of weights by a rule."""

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        *,
        rule: SWA | EMA | Power | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(captured)
        self.averaged = AveragedModel(model, rule=rule, backend=backend)

    def capture(self, model: nn.Module, evaluation: Evaluation, clock: Clock) -> None:
        with clock("average"):
            self.averaged.update_parameters(model)
        self.captures += 1

    def score(self, epoch: int, evaluation: Evaluation, clock: Clock, share: float = 1.0) -> Score:
        with clock("bn"):
            evaluation.renew_statistics(self.averaged, epoch, share)
        with clock("eval"):
            return evaluation.score(self.averaged)

    def networks(self, epoch: int, reported: Sequence[str], model: nn.Module) -> Weights:
        return dict.fromkeys(reported, self.averaged.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"captures": self.captures, "averaged": self.averaged.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averaged.load_state_dict(state["averaged"])
        self.captures = int(state["captures"])


class LastAverage(Average):
    """The mean of the weights of the last captures."""

    def __init__(
        self, model: nn.Module, captured: Captured, last: int, backend: str | None
    ) -> None:
        super().__init__(captured)
        self._averager = Averager(model, {"lawa": Window(last)}, backend=backend)
        self._network = copy.deepcopy(model)

    def capture(self, model: nn.Module, evaluation: Evaluation, clock: Clock) -> None:
        with clock("average"):
            self._averager.update()
        self.captures += 1

    def score(self, epoch: int, evaluation: Evaluation, clock: Clock, share: float = 1.0) -> Score:
        self._network.load_state_dict(self._averager.averages["lawa"])
        with clock("bn"):
            evaluation.renew_statistics(self._network, epoch, share)
        with clock("eval"):
            return evaluation.score(self._network)

    def networks(self, epoch: int, reported: Sequence[str], model: nn.Module) -> Weights:
        return dict.fromkeys(reported, self._network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"captures": self.captures, "averager": self._averager.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averager.load_state_dict(state["averager"])
        self.captures = int(state["captures"])


class ShardedAverage(Average):
    """A running average, each process' pieces beside its weights; evaluated in their place."""

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        *,
        rule: SWA | EMA | Power | Window,
        backend: str | None = None,
    ) -> None:
        super().__init__(captured)
        self._model = model
        self._averager = Averager(model, {"average": rule}, backend=backend)
        self._statistics: dict[str, Tensor] = {}  # of BatchNorm, as the last score found them

    def capture(self, model: nn.Module, evaluation: Evaluation, clock: Clock) -> None:
        with clock("average"):
            self._averager.update()
        self.captures += 1

    def score(self, epoch: int, evaluation: Evaluation, clock: Clock, share: float = 1.0) -> Score:
        with self._averager.applied("average"):
            with clock("bn"):
                evaluation.renew_statistics(self._model, epoch, share)
            self._statistics = {
                name: buffer.clone() for name, buffer in self._model.named_buffers()
            }
            with clock("eval"):
                return evaluation.score(self._model)

    def networks(self, epoch: int, reported: Sequence[str], model: nn.Module) -> Weights:
        if not reported:
            return {}
        weights = {**(self._averager.full_averages("average") or {}), **self._statistics}
        return dict.fromkeys(reported, weights)

    def state_dict(self) -> dict[str, Any]:
        state = self._averager.state_dict()
        state["averages"] = {name: whole(row) for name, row in state["averages"].items()}
        return {"captures": self.captures, "averager": state, "statistics": self._statistics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averager.load_state_dict(state["averager"])
        self._statistics = dict(state["statistics"])
        self.captures = int(state["captures"])


class Gaussian(Average):
    """The mean prediction of samples of a SWAG, each with BatchNorm statistics of its own. The
    network that is saved has the mean's weights."""

    costly = True
    samples: ClassVar[int] = 30  # the paper's, as the number of deviations that are kept

    def __init__(self, model: nn.Module, captured: Captured, config: TrainConfig) -> None:
        super().__init__(captured)
        self._seed = config.seed
        self._swag = SWAG(model, 20, backend=config.backend)
        self._network = copy.deepcopy(model)

    def capture(self, model: nn.Module, evaluation: Evaluation, clock: Clock) -> None:
        with clock("average"):
            self._swag.update()
        self.captures += 1

    @torch.no_grad()
    def _become(
        self,
        weights: Mapping[str, Tensor],
        epoch: int,
        evaluation: Evaluation,
        clock: Clock,
        share: float,
    ) -> None:
        with clock("bn"):
            for name, parameter in self._network.named_parameters():
                parameter.copy_(weights[name])
            evaluation.renew_statistics(self._network, epoch, share)

    def score(self, epoch: int, evaluation: Evaluation, clock: Clock, share: float = 1.0) -> Score:
        probabilities: list[Tensor] = []
        seed = derive_seed(self._seed, "swag", epoch) % 2**31
        # A Gaussian of one capture is a point.
        for number in range(self.samples if self.captures > 1 else 0):
            sample = self._swag.sample(seed=seed + number)
            self._become(sample, epoch, evaluation, clock, share)
            with clock("eval"):
                found = evaluation.probabilities(self._network)
            probabilities = [probabilities[0] + found] if probabilities else [found]
        self._become(self._swag.mean, epoch, evaluation, clock, share)
        with clock("eval"):
            if not probabilities:
                return evaluation.score(self._network)
            return evaluation.score_probabilities(probabilities[0] / self.samples)

    def networks(self, epoch: int, reported: Sequence[str], model: nn.Module) -> Weights:
        return dict.fromkeys(reported, self._network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"captures": self.captures, "swag": self._swag.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._swag.load_state_dict(state["swag"])
        self.captures = int(state["captures"])


class Ensemble(Average):
    """The sum of the softmax outputs of networks along a trajectory, for the test set.

    Each network predicts with its own BatchNorm statistics. The ensemble predicts the class with
    the largest sum, and its loss is the cross-entropy of the mean probabilities. Every process has
    the sum for its share of the test set.
    """

    per_process = True

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured)
        self._sum: Tensor | None = None
        self._labels: Tensor | None = None

    def capture(self, model: nn.Module, evaluation: Evaluation, clock: Clock) -> None:
        evaluation.world.share_buffers(model)
        with clock("eval"):
            found = evaluation.probabilities(model)
        self._sum = found if self._sum is None else self._sum + found
        self._labels = evaluation.test_labels
        self.captures += 1

    def score(self, epoch: int, evaluation: Evaluation, clock: Clock, share: float = 1.0) -> Score:
        assert self._sum is not None
        with clock("eval"):
            return evaluation.score_probabilities(self._sum / self.captures)

    def networks(self, epoch: int, reported: Sequence[str], model: nn.Module) -> Weights:
        # A file for every member, named by its number.
        if not self.due(epoch):
            return {}
        return {f"fge-{self.captures:02d}": whole_weights(model)}

    def state_dict(self) -> dict[str, Any]:
        # The labels are for reports, which join the ensembles of several runs.
        return {"captures": self.captures, "sum": self._sum, "labels": self._labels}

    def join(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Goes on from the states of another number of processes, as one of ``size``."""
        parts = [state["sum"] for state in states]
        if any(part is None for part in parts):
            return self.load_state_dict(states[0])
        # Each process has every so-manieth image of the test set.
        count, classes = sum(len(part) for part in parts), parts[0].shape[1]
        total = parts[0].new_empty(count, classes)
        labels = torch.empty(count, dtype=torch.int64, device=total.device)
        for start, state in enumerate(states):
            total[start :: len(states)] = state["sum"]
            labels[start :: len(states)] = state["labels"]
        mine = {"sum": total[rank::size].clone(), "labels": labels[rank::size].clone()}
        return self.load_state_dict({**states[0], **mine})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        captures, total = int(state["captures"]), state["sum"]
        if (captures > 0) != isinstance(total, Tensor):
            raise ValueError(f"expected the sum of {captures} members, found {type(total)}")
        self._sum, self.captures, self._labels = total, captures, state.get("labels")


def make_average(
    method: str, captured: Captured, model: nn.Module, config: TrainConfig, steps: int
) -> Average:
    """What a method averages, of a network that is trained for ``steps`` steps per epoch."""
    if method == "fge":
        return Ensemble(captured)
    if method == "lawa" and config.shard == "none":
        return LastAverage(model, captured, config.lawa_last, config.backend)
    if method == "swag":
        return Gaussian(model, captured, config)
    rule: SWA | EMA | Power | Window = SWA()
    if method == "ema":
        rule = EMA(max(0.0, 1.0 - 1.0 / (config.ema_epochs * steps)))
    if method == "swa-power":
        rule = Power(config.power_gamma)
    if method == "lawa":
        rule = Window(config.lawa_last)
    if config.shard != "none" or isinstance(rule, Window):
        return ShardedAverage(model, captured, rule=rule, backend=config.backend)
    return WeightAverage(model, captured, rule=rule, backend=config.backend)
