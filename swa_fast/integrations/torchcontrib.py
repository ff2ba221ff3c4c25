"""torchcontrib's optimiser ``SWA`` with its update in one launch for each parameter group, for code
that was written for it: torchcontrib itself is not needed (and no longer maintained).

Example::

    from swa_fast.integrations.torchcontrib import SWA  # instead of torchcontrib.optim

    optimizer = SWA(torch.optim.SGD(model.parameters(), lr=0.1), 10, 5, swa_lr=0.05)
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    optimizer.swap_swa_sgd()
    optimizer.bn_update(loader, model)
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swa_fast import SWA as EqualWeights
from swa_fast import Averager, update_bn

__all__ = ["SWA"]


class SWA(Optimizer):
    r"""An optimiser that averages the weights after some of its steps,

    .. math:: a \leftarrow a + \frac{w - a}{n + 1}, \qquad n \leftarrow n + 1

    for each parameter group by itself, after step :math:`t > \text{swa\_start}` where
    :math:`\text{swa\_freq}` divides :math:`t`. As torchcontrib's class of this name, with its
    arguments, methods and the layout of its state; averages of 16-bit parameters are kept in
    float32.

    Args:
        optimizer: whose steps these are.
        swa_start: steps before the first that may be averaged, at least 0.
        swa_freq: which steps are averaged, at least 1. Without both, :meth:`update_swa` is called
            by hand.
        swa_lr: the learning rate from the step after ``swa_start`` on, at least 0; None leaves it.

    Raises:
        TypeError: no optimiser.
        ValueError: an argument outside its range.

    Source: https://github.com/pytorch/contrib, ``torchcontrib.optim.SWA``; Izmailov et al., UAI
    2018.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_start: int | None = None,
        swa_freq: int | None = None,
        swa_lr: float | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected an Optimizer, found {type(optimizer).__name__}")
        automatic = swa_start is not None and swa_freq is not None
        if not automatic and not (swa_start is None and swa_freq is None and swa_lr is None):
            warnings.warn(
                "swa_start, swa_freq: found only one of them or none, so neither they nor swa_lr "
                "have an effect; call update_swa() by hand",
                stacklevel=2,
            )
            swa_start = swa_freq = swa_lr = None
        for name, value, least in (
            ("swa_start", swa_start, 0), ("swa_freq", swa_freq, 1), ("swa_lr", swa_lr, 0),
        ):  # fmt: skip
            if value is not None and not value >= least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        self.optimizer = optimizer
        self.swa_start = None if swa_start is None else int(swa_start)
        self.swa_freq = None if swa_freq is None else int(swa_freq)
        self.swa_lr = swa_lr
        self._averagers: dict[int, Averager] = {}  # by the place of the group
        for group in self.param_groups:
            group["n_avg"] = group["step_counter"] = 0

    def __getattr__(self, name: str) -> Any:
        # What others ask of an optimiser: its defaults and hooks.
        if name == "optimizer":  # while this is made of a pickle
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimiser's, with ``n_avg``, updates of the average, and ``step_counter``."""
        return self.optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The averages as ``swa_buffer`` of each parameter that has one."""
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for at, averager in self._averagers.items():
            averages = averager.averages["swa"]
            for i, parameter in enumerate(self.param_groups[at]["params"]):
                found[parameter] = {"swa_buffer": averages[str(i)]}
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimiser's."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimiser, and an update of the averages if it is the time for one."""
        if self.swa_lr is not None and self.swa_start is not None:
            for group in self.param_groups:
                if group["step_counter"] >= self.swa_start:
                    group["lr"] = self.swa_lr
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            group["step_counter"] += 1
            now, start, freq = group["step_counter"], self.swa_start, self.swa_freq
            if start is not None and freq is not None and now > start and now % freq == 0:
                self.update_swa_group(group)
        return loss

    def update_swa(self) -> None:
        """Takes the current weights of all groups into their averages."""
        for group in self.param_groups:
            self.update_swa_group(group)

    def update_swa_group(self, group: dict[str, Any]) -> None:
        """Takes the current weights of one of ``param_groups`` into their average."""
        at = next(i for i, each in enumerate(self.param_groups) if each is group)
        if at not in self._averagers:
            self._averagers[at] = self._averager_of(group)
        self._averagers[at].update()
        group["n_avg"] += 1

    @staticmethod
    def _averager_of(group: Mapping[str, Any]) -> Averager:
        named = [(str(i), parameter) for i, parameter in enumerate(group["params"])]
        return Averager(named, {"swa": EqualWeights()})

    @torch.no_grad()
    def swap_swa_sgd(self) -> None:
        """Averages and weights trade places: all of them or, where it is interrupted, none.
        Groups without an average keep their weights, with a warning."""
        live: list[Tensor] = []
        averages: list[Tensor] = []
        for at, group in enumerate(self.param_groups):
            if at not in self._averagers:
                warnings.warn(
                    f"swap_swa_sgd: parameter group {at} has no average and keeps its weights",
                    stacklevel=2,
                )
                continue
            live += group["params"]
            averages += self._averagers[at].averages["swa"].values()
        before = [tensor.detach().clone() for tensor in (*live, *averages)]
        try:
            for tensor, average, value in zip(live, averages, before, strict=False):
                tensor.copy_(average)
                average.copy_(value)
        except BaseException:
            for tensor, value in zip((*live, *averages), before, strict=True):
                tensor.copy_(value)
            raise

    def state_dict(self) -> dict[str, Any]:
        """torchcontrib's: ``opt_state`` and ``param_groups`` of the optimiser, and ``swa_state``
        with the averages by the number of their parameter."""
        state = self.optimizer.state_dict()
        swa_state: dict[int, dict[str, Tensor]] = {}
        for at, averager in self._averagers.items():
            numbers = state["param_groups"][at]["params"]
            averages = averager.averages["swa"].values()
            for number, average in zip(numbers, averages, strict=True):
                swa_state[number] = {"swa_buffer": average}
        return {
            "opt_state": state["state"],
            "swa_state": swa_state,
            "param_groups": state["param_groups"],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`, also one of torchcontrib, whose averages are found
        by their order.

        Raises:
            ValueError: it does not fit; nothing has changed then.
        """
        keys = ("opt_state", "swa_state", "param_groups")
        if not isinstance(state_dict, Mapping) or not all(key in state_dict for key in keys):
            raise ValueError(f"state_dict: expected one with the keys {', '.join(keys)}")
        groups = state_dict["param_groups"]
        averaged = [at for at, group in enumerate(groups) if group.get("n_avg", 0) > 0]
        counts = [len(groups[at]["params"]) for at in averaged]
        buffers = [each.get("swa_buffer") for each in state_dict["swa_state"].values()]
        if len(groups) != len(self.param_groups) or sum(counts) != len(buffers):
            raise ValueError(
                f"state_dict: expected {len(self.param_groups)} parameter groups and an average of "
                f"each parameter of those that have n_avg, found {len(groups)} groups and "
                f"{len(buffers)} averages for {sum(counts)} parameters"
            )
        # In the order of the groups, whatever the order in which they were first averaged.
        numbers = [number for at in averaged for number in groups[at]["params"]]
        if all(number in state_dict["swa_state"] for number in numbers):
            buffers = [state_dict["swa_state"][number]["swa_buffer"] for number in numbers]
        averagers = {}
        for at, count in zip(averaged, counts, strict=True):
            averagers[at] = self._averager_of(self.param_groups[at])
            averagers[at].load_average("swa", buffers[:count], n_averaged=groups[at]["n_avg"])
            buffers = buffers[count:]
        self.optimizer.load_state_dict({"state": state_dict["opt_state"], "param_groups": groups})
        self._averagers = averagers

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the optimiser; its average begins by itself."""
        self.optimizer.add_param_group({**param_group, "n_avg": 0, "step_counter": 0})

    @staticmethod
    def bn_update(
        loader: Iterable[Any], model: nn.Module, device: str | torch.device | None = None
    ) -> None:
        """The BatchNorm statistics of the model's weights as they are now, every sample weighing
        the same, as torchcontrib's. (:func:`swa_fast.update_bn` has more to choose from.)"""
        update_bn(loader, model, device, estimator="weighted")
