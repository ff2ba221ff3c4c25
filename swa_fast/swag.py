"""SWAG: a Gaussian over weights from the iterates of a run, its samples, and what they predict."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from . import _backends, _ops
from ._applied import applied
from ._cadence import Cadence
from ._memory import FlatMemory, Slot, dense_strides
from ._modules import Filter, Selection, check_kind
from ._watch import Watch
from .batch_norm import update_bn
from .batch_norm.batches import move
from .batch_norm.options import device_of
from .engine import Engine, Plan
from .hooks import Attachment, Gate, attach
from .rules import SWA
from .storage import Storage

__all__ = ["SWAG", "predict"]

# Rows of the averages, as swag_ writes them.
_MEAN, _SQUARES, _DEVIATIONS = range(3)
# Elements of a sample that are drawn at once, which bounds what is allocated for it.
_CHUNK = 1 << 22


class _Engine(Engine):
    """Updates mean, squared deviations and a column of deviations in one launch."""

    def launch(self, plan: Plan, gate: Gate | None) -> None:
        table = plan.update
        columns = len(self.averages) - _DEVIATIONS - 1
        _ops.swag_(
            plan.backend,
            table.averages,
            table.sources,
            self.n_averaged[:1],
            self.counters,
            table.words,
            table.pairs,
            columns,
            table.short,
            *(() if gate is None else gate.on(self.place)),
        )


class SWAG:
    r"""A Gaussian over the weights of a model, from its iterates along a run at a constant or
    cyclical learning rate.

    .. math::
        \mathcal N\left(\mu,\ \tfrac12 \left(\operatorname{diag}(\sigma^2) +
        \tfrac{1}{K - 1} D D^\top\right)\right)

    with the mean :math:`\mu` and the variance :math:`\sigma^2 = M_2 / n` of the iterates, and the
    deviations of the last :math:`K` from the mean of their time in the columns of :math:`D`. One
    launch per device updates all, :math:`4 + 8 + 8 + 4` bytes per fp32 parameter, with Welford's
    recurrence: :math:`E[w^2] - E[w]^2` in fp32 would lose a variance that is small beside the
    weights. The memory is :math:`K + 3` rows of the parameters' size, of which one is for samples.

    Parameters that are averaged are all floating-point ones; rows are float32, and float64 for
    float64 parameters. Buffers are not: give :func:`predict` a loader to refresh BatchNorm from.

    Args:
        params_or_module: as for :class:`~swa_fast.Averager`.
        k: :math:`K`, columns of deviations, at least 2.
        device: where the rows live; None keeps each beside its parameter.
        filter: which parameters, as for :class:`~swa_fast.Averager`.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device.
        trainable_only: leave out parameters that do not require a gradient.
        unwrap: as for :class:`~swa_fast.Averager`.

    Raises:
        TypeError: a parameter that is not floating-point.
        ValueError: an argument outside its range, or no parameter.

    Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS
    2019.
    """

    def __init__(
        self,
        params_or_module: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        k: int = 20,
        *,
        device: int | str | torch.device | None = None,
        filter: Filter | None = None,
        backend: str | None = None,
        trainable_only: bool = False,
        unwrap: bool = True,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ValueError(f"k: expected an integer of at least 2, found {k}")
        _backends.check_name(backend)
        self.k = k
        self._selection = Selection(params_or_module, False, trainable_only, filter, unwrap)
        self._aliases, tensors, _ = self._selection.collect()
        if not tensors:
            found, left_out = self._selection.what_leaves_nothing()
            raise ValueError(f"{found}: expected at least one parameter, found none{left_out}")
        for name in self._selection.shards:
            raise TypeError(
                f"{name}: found a DTensor; samples of sharded parameters are not supported, since "
                "processes that hold the same piece would have to draw the same numbers"
            )
        names: dict[int, str] = {}
        for name, at in self._aliases.items():
            names.setdefault(at, name)
        slots = []
        for i, tensor in enumerate(tensors):
            check_kind(names[i], tensor)
            if tensor.dtype not in _ops.AVERAGE_DTYPES:
                raise TypeError(
                    f"{names[i]}: expected float32, float64, bfloat16 or float16, found "
                    f"{tensor.dtype}"
                )
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            slots.append(Slot(names[i], True, dtype, tuple(tensor.shape), dense_strides(tensor)))
        where = device_of(device)
        rows = _DEVIATIONS + k + 1
        # Samples are drawn here, from the rows side by side.
        self._flat = FlatMemory(slots, [where or tensor.device for tensor in tensors], rows)
        rules = [[SWA()] * rows]
        self._storage = Storage(slots, self._flat, rules, backend=backend, engine=_Engine)
        self._watched(tensors)

    @property
    def module(self) -> nn.Module:
        """The module whose weights these are.

        Raises:
            ValueError: it was made from tensors.
        """
        if self._selection.module is None:
            raise ValueError("module: expected a SWAG of a module, found one of tensors")
        return self._selection.module

    def _watched(self, tensors: list[Tensor]) -> None:
        module = self._selection.module
        self._storage.bind(tensors, [] if module is None else Watch.places_of(module))

    def _current(self) -> list[Tensor]:
        names, tensors, _ = self._selection.collect()
        shapes = {name: tuple(tensors[at].shape) for name, at in names.items()}
        expected = {name: self._storage.slots[at].shape for name, at in self._aliases.items()}
        if shapes != expected:
            differing = sorted(
                n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)
            )
            raise ValueError(
                "the model does not fit: " + "; ".join(
                    f"{n}: expected {expected.get(n, 'nothing')}, found "
                    f"{shapes.get(n, 'nothing')}" for n in differing[:5]
                )
            )  # fmt: skip
        found: list[Tensor] = [tensors[0]] * len(self._storage.slots)
        for name, at in self._aliases.items():
            found[at] = tensors[names[name]]
        return found

    def _refuse_if_sampled(self, what: str) -> None:
        if self._storage.applied is not None:
            raise RuntimeError(f"{what}: a sample is in the model's place; leave sampled() first")

    @torch.no_grad()
    def _update(self, gate: Gate | None = None) -> None:
        self._refuse_if_sampled("update")
        if not self._storage.holds():
            self._watched(self._current())
        self._storage.update(gate)

    def update(self) -> None:
        """Takes the current weights as the next iterate.

        Raises:
            RuntimeError: a sample is in the model's place.
            ValueError: the model has other parameters than before; nothing is written.
        """
        self._update()

    def attach(self, optimizer: Optimizer, *, every: int = 1, start: int = 0) -> Attachment:
        """As :meth:`swa_fast.Averager.attach`."""
        return attach(optimizer, self._update, lambda: self._storage, Cadence(every, start))

    @property
    def n_averaged(self) -> int:
        """Iterates so far. Waits for the device."""
        return int(self._storage.counts[0][0])

    def _row(self, row: int) -> dict[str, Tensor]:
        tensors = self._storage.averages[row]
        return {name: tensors[at] for name, at in self._aliases.items()}

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean by the parameters' names: the row itself, not a copy. It may be moved to shared
        memory, say, and is then followed."""
        self._storage.give_away()
        return self._row(_MEAN)

    def variance(self) -> dict[str, Tensor]:
        """The diagonal variance :math:`M_2 / n` by the parameters' names."""
        n = max(self.n_averaged, 1)
        return {name: squares / n for name, squares in self._row(_SQUARES).items()}

    def sq_mean(self) -> dict[str, Tensor]:
        """The mean of the squares, :math:`\\mu^2 + \\sigma^2`, which other implementations keep."""
        mean = self._row(_MEAN)
        return {name: mean[name].square() + v for name, v in self.variance().items()}

    def deviations(self) -> dict[str, Tensor]:
        """Columns of :math:`D`, at most k, the oldest first, by name: ``[columns, *shape]``."""
        n = self.n_averaged
        rows = [_DEVIATIONS + i % self.k for i in range(max(n - self.k, 0), n)]
        return {
            name: torch.stack([self._storage.averages[row][at] for row in rows])
            if rows
            else self._storage.averages[_MEAN][at].new_empty((0, *self._storage.slots[at].shape))
            for name, at in self._aliases.items()
        }

    def _side_by_side(self) -> None:
        """Takes the rows that a user has moved into the memory of all for a sample.

        Raises:
            ValueError: one of them was changed to something else.
        """
        storage = self._storage
        if not storage.given_away:
            return
        storage.find_averages()
        for row, places in zip(
            storage.averages, self._flat.averages(self._flat.tensors), strict=True
        ):
            for tensor, place in zip(row, places, strict=True):
                if tensor.data_ptr() != place.data_ptr():
                    place.copy_(tensor)

    @torch.no_grad()
    def _draw(self, scale: float, seed: int) -> None:
        """Draws a sample into its row."""
        if not 0.0 <= scale < math.inf:
            raise ValueError(f"scale: expected a number of at least 0, found {scale}")
        self._refuse_if_sampled("sample")
        n = self.n_averaged
        if n < 2:
            raise RuntimeError(f"sample: expected at least 2 iterates, found {n}")
        self._side_by_side()
        columns = min(n, self.k)
        # The same on all devices, because rows on several hold one sample.
        z2 = torch.randn(
            columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        z2 *= math.sqrt(scale / (columns - 1))
        for index, memory in enumerate(self._flat.tensors):
            generator = torch.Generator(memory.device).manual_seed(seed + (index + 1 << 32))
            weights = z2.to(memory.device, memory.dtype)
            for chunk in memory.split(_CHUNK, dim=1):
                mean, squares, sample = chunk[_MEAN], chunk[_SQUARES], chunk[-1]
                sample.normal_(generator=generator)
                sample.mul_((squares * (scale / n)).sqrt_())
                sample.addmv_(chunk[_DEVIATIONS : _DEVIATIONS + columns].t(), weights)
                sample.add_(mean)

    def sample(self, *, scale: float = 0.5, seed: int) -> dict[str, Tensor]:
        r"""A draw from the Gaussian, by the parameters' names,

        .. math:: \mu + \sqrt{s}\left(\sigma z_1 + \tfrac{1}{\sqrt{K - 1}} D z_2\right)

        with standard normal :math:`z_1` for each weight and :math:`z_2` for each of the
        :math:`K` columns there are.

        Args:
            scale: :math:`s`, at least 0: 1/2 is the paper's, 0 the mean.
            seed: of the draw. A device's numbers are its own: a GPU draws others than a CPU.

        Raises:
            ValueError: ``scale`` below 0.
            RuntimeError: fewer than 2 iterates, or a sample is in the model's place.
        """
        self._draw(scale, seed)
        return {name: tensor.clone() for name, tensor in self._row(-1).items()}

    def sampled(self, *, scale: float = 0.5, seed: int) -> contextlib.AbstractContextManager[None]:
        """Puts a :meth:`sample` into the live parameters for the time of a ``with`` block, in
        place; they are back afterwards, also by an exception."""

        def prepare() -> tuple[Storage, int]:
            self._draw(scale, seed)
            if not self._storage.holds():
                self._watched(self._current())
            return self._storage, _DEVIATIONS + self.k

        return applied(self._storage.lock, prepare, lambda: (self._current(), []), dict, True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs; plain values and tensors. The tensors are
        the rows, not copies: ``copy.deepcopy`` keeps a state in memory."""
        self._refuse_if_sampled("state_dict")
        self._storage.give_away()
        return self._state()

    def _state(self) -> dict[str, Any]:
        rows = {"mean": self._row(_MEAN), "squares": self._row(_SQUARES)}
        rows |= {f"deviation[{i}]": self._row(_DEVIATIONS + i) for i in range(self.k)}
        return {"format": 1, "k": self.k, "n_averaged": self.n_averaged, "rows": rows}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict` of a SWAG of the same parameters and ``k``.

        Raises:
            RuntimeError: a sample is in the model's place.
            ValueError: it does not fit; nothing is changed then.
        """
        self._refuse_if_sampled("load_state_dict")
        own = self._state()
        keys = [key for key in own if key not in state_dict]
        if keys or state_dict["format"] != 1 or state_dict["k"] != self.k:
            raise ValueError(
                f"state_dict: expected one of a SWAG in format 1 with k={self.k}, found "
                f"format {state_dict.get('format')}, k={state_dict.get('k')}, keys "
                f"{sorted(map(str, state_dict))}"
            )
        n = state_dict["n_averaged"]
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"state_dict: expected n_averaged of at least 0, found {n!r}")
        pairs = []
        for row, tensors in own["rows"].items():
            theirs = state_dict["rows"].get(row, {})
            for name in tensors.keys() | theirs.keys():
                ours, found = tensors.get(name), theirs.get(name)
                if (
                    not isinstance(ours, Tensor)
                    or not isinstance(found, Tensor)
                    or (ours.shape, ours.dtype) != (found.shape, found.dtype)
                ):
                    raise ValueError(
                        f"state_dict: {row} of {name} does not fit: expected {_kind(ours)}, found "
                        f"{_kind(found)}"
                    )
                pairs.append((ours, found))
        kept = [ours.clone() for ours, _ in pairs]
        counts = [part.engine.n_averaged for part in self._storage.parts]
        before = [count.clone() for count in counts]
        try:
            for ours, found in pairs:
                ours.copy_(found)
            for count in counts:
                count.fill_(n)
        except BaseException:
            for (ours, _), value in zip(pairs, kept, strict=True):
                ours.copy_(value)
            for count, value in zip(counts, before, strict=True):
                count.copy_(value)
            raise


def _kind(tensor: object) -> str:
    if isinstance(tensor, Tensor):
        return f"{tuple(tensor.shape)} {tensor.dtype}"
    return "nothing" if tensor is None else type(tensor).__name__


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Modes and BatchNorm's buffers are afterwards what they were."""
    modes = [(child, child.training) for child in module.modules()]
    buffers = [
        (buffer, buffer.clone())
        for child in module.modules()
        if isinstance(child, _BatchNorm)
        for buffer in child.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for child, mode in modes:
            child.training = mode


def _softmax(output: Tensor) -> Tensor:
    return output.softmax(-1)


@torch.no_grad()
def predict(
    swags: SWAG | Sequence[SWAG],
    loader: Iterable[Any],
    *,
    samples: int = 30,
    scale: float = 0.5,
    seed: int = 0,
    bn_loader: Iterable[Any] | None = None,
    tolerance: float | None = None,
    transform: Callable[[Tensor], Tensor] = _softmax,
    device: int | str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    r"""The mean of what samples of one or more SWAGs predict, :math:`\frac{1}{S}\sum_s p(y \mid x,
    w_s)`: Bayesian model averaging, and MultiSWAG with SWAGs of several runs.

    Args:
        swags: one, or several of modules that predict the same; each is sampled as often.
        loader: inputs, read anew for each sample and in the same order: tensors, or lists or tuples
            whose first element is the model's input.
        samples: of each SWAG, at least 1.
        scale: see :meth:`SWAG.sample`; with 0 the mean predicts.
        seed: sample ``i`` of each SWAG is drawn with ``seed + i``.
        bn_loader: batches from which :func:`~swa_fast.update_bn` estimates BatchNorm's statistics
            for every sample. Models with BatchNorm need it.
        tolerance: of that pass, which makes it short.
        transform: what is averaged of the model's output; a softmax over the last dimension.
        device: where inputs are moved before the forward; None leaves them.
        progress: show a progress bar (tqdm).

    Returns:
        [N, ...] on the CPU, in float32 or wider.

    Raises:
        ValueError: an argument outside its range, no batch, or BatchNorm without ``bn_loader``.
        RuntimeError: see :meth:`SWAG.sample`.

    Modes, BatchNorm's statistics and weights of the models are afterwards what they were.

    Source of several together: Wilson and Izmailov, "Bayesian Deep Learning and a Probabilistic
    Perspective of Generalization", NeurIPS 2020.
    """
    several = [swags] if isinstance(swags, SWAG) else list(swags)
    if samples < 1 or not several:
        raise ValueError(f"samples: expected 1 or more of 1 or more SWAGs, found {samples}")
    for swag in several:
        needs = any(
            isinstance(m, _BatchNorm) and m.running_mean is not None for m in swag.module.modules()
        )
        if needs and bn_loader is None:
            raise ValueError(
                "bn_loader: expected one for a model with BatchNorm, whose statistics are those "
                "of other weights; found None"
            )
    draws = [(swag, seed + i) for swag in several for i in range(samples)]
    shown: Iterable[tuple[SWAG, int]] = draws
    if progress:
        from tqdm import tqdm

        shown = tqdm(draws, desc="samples")
    where = device_of(device)
    total: Tensor | None = None
    for swag, number in shown:
        model = swag.module
        with _kept(model), swag.sampled(scale=scale, seed=number):
            if bn_loader is not None:
                update_bn(bn_loader, model, where, tolerance=tolerance)
            model.eval()
            outputs = []
            for batch in loader:
                x = batch[0] if isinstance(batch, list | tuple) else batch
                output = transform(model(move(x, where, False))).cpu()
                outputs.append(output if output.dtype == torch.float64 else output.float())
        if not outputs:
            raise ValueError("loader: expected at least one batch, found none")
        found = torch.cat(outputs)
        total = found if total is None else total + found
    assert total is not None
    return total / len(draws)
