"""A model of averaged weights: :class:`AveragedModel`, the drop-in for torch's class."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import _backends, _by_torch, _ops, sharding
from ._applied import applied
from ._cadence import Cadence
from ._kept import all_or_nothing
from ._memory import SeparateMemory, Slot, dense_strides
from ._modules import apart, check_kind, copied, is_loose, match_modules, warn_of_packed
from ._pointers import kind_of
from ._watch import Watch
from .avg_fns import AvgFn, MultiAvgFn, rule_of
from .hooks import Attachment, Gate, attach
from .rules import EMA, SWA, Power, Rule, why_it_stands_still
from .storage import Storage

__all__ = ["AveragedModel"]

_log = logging.getLogger("swa_fast")


def _no_model() -> None:
    """The model of an average that has not been updated."""


class AveragedModel(nn.Module):
    r"""A copy of a model whose parameters are running averages. Drop-in for
    ``torch.optim.swa_utils.AveragedModel``: same arguments, attributes and state_dict keys.

    .. math::
        \bar w \leftarrow \begin{cases} w & n = 0 \\ \bar w + (w - \bar w)/(n + 1) & \text{SWA} \\
        d\,\bar w + (1 - d)\,w & \text{EMA} \end{cases} \qquad n \leftarrow n + 1

    One launch per device updates all parameters, buffers and the counter. The tensors of ``module``
    are a model's own: they may be written, loaded, moved, shared, copied and pickled, and what was
    moved or replaced is noticed at the next update.

    Where it differs from torch's class, on purpose:

    * tensors are paired by name, and a model that does not fit is refused as a whole, instead of
      being paired by position;
    * with ``use_buffers=True`` the built-in rules copy integer buffers (``num_batches_tracked``)
      instead of averaging them into a truncated number;
    * ``n_averaged`` lives on the device of the model's first parameter when ``device`` is None, so
      that an update never waits for the device;
    * ``dtype`` keeps the average in another precision than the model;
    * a model of lazy modules is copied again at the first update after its first forward.

    DTensors and other wrappers are averaged by torch's own operators.

    Args:
        model: the model to average. It is deep-copied.
        device: where the average lives; None keeps each tensor where it is.
        avg_fn: average of one tensor, ``(averaged, current, n_averaged) -> Tensor``.
        multi_avg_fn: average of lists of tensors in place, ``(averaged_list, current_list,
            n_averaged) -> None``, called once per device and dtype. At most one of the two; neither
            means equal weights.
        use_buffers: average the buffers like the parameters; False copies them at every update.
        dtype: dtype of the average's floating-point parameters and buffers, such as
            ``torch.float32`` for a bfloat16 model; None keeps the model's. float32, float64,
            bfloat16 or float16. float64 is for long runs whose weights change little at the end:
            float32 moves by :math:`2^{-23}` of itself or not at all. Equal weights are then off by
            1e-5 of the weights after 1e5 updates (float64: 1e-13), and an EMA stands still within
            :math:`2^{-24}/(1 - d)` of them: ``EMA(0.9999)`` goes 40 % of a way of 1e-3.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device. Not saved.
        unwrap: copy the model inside DataParallel, DistributedDataParallel or torch.compile
            instead of the wrapper.
        rule: instead of a function, :class:`~swa_fast.SWA`, :class:`~swa_fast.EMA` or
            :class:`~swa_fast.Power` with any of their options. Not saved.

    Raises:
        AssertionError: both functions are given (as torch does), or one and ``rule``.
        TypeError: ``dtype`` is none of the four, or ``rule`` no such rule.
        ValueError: no such backend.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018.
    """

    n_averaged: Tensor
    # Of objects that were pickled before there was any of this, too.
    _copied_how: tuple[Any, torch.dtype | None, bool] = (None, None, False)
    _swapped = False  # by torch
    _odd: str | None = None  # a tensor that torch alone can average

    def __init__(
        self,
        model: nn.Module,
        device: int | str | torch.device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        unwrap: bool = False,
        rule: SWA | EMA | Power | None = None,
    ) -> None:
        super().__init__()
        if (avg_fn is not None) + (multi_avg_fn is not None) + (rule is not None) > 1:
            raise AssertionError("avg_fn, multi_avg_fn, rule: expected at most one of them")
        if rule is not None and not isinstance(rule, SWA | EMA | Power):
            raise TypeError(f"rule: expected SWA, EMA or Power, found {type(rule).__name__}")
        if dtype is not None and dtype not in _ops.AVERAGE_DTYPES:
            raise TypeError(f"dtype: expected one of {_ops.AVERAGE_DTYPES}, found {dtype}")
        _backends.check_name(backend)
        if rule is not None and getattr(rule, "schedule", None) is not None:
            raise TypeError("rule: a decay that is a function is called by Averager alone")
        sharding.check_whole(
            model, "AveragedModel", "it cannot be copied; Averager needs no copy and takes it"
        )
        self._copied_how = device, dtype, unwrap
        self.module = copied(model, *self._copied_how)
        if device is None:
            first = next(self.module.parameters(), None)
            device = None if first is None else first.device
        with torch.inference_mode(False):
            self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.rule = rule
        self.use_buffers = use_buffers
        self.backend = backend
        # Made for a model at its first update, and again whenever something moved.
        self._storage: Storage | None = None
        self._key: tuple[object, ...] = ()
        self._followed: Rule | None = None  # what the storage goes by
        self._model: Callable[[], nn.Module | None] = _no_model
        self._origin: Callable[[], nn.Module | None] = weakref.ref(model)
        # The counter that an update has left behind.
        self._counted: tuple[int, int] | None = None
        self._handle = ""
        self._lock = threading.RLock()
        self._warn_of_stagnation()

    def _built_in(self) -> Rule | None:
        """The rule, or None for a user's function."""
        return self.rule or rule_of(self.multi_avg_fn or self.avg_fn)

    def _warn_of_stagnation(self) -> None:
        warn_of_packed("AveragedModel", self.module)
        rule = self._built_in()
        for dtype in {p.dtype for p in self.module.parameters()}:
            if rule is not None and (reason := why_it_stands_still(rule, dtype)):
                _log.warning("AveragedModel: %s; use dtype=torch.float32", reason)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's forward."""
        return self.module(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Addresses and watches are of this process and of these tensors.
        return {
            **self.__dict__,
            "_storage": None,
            "_key": (),
            "_model": _no_model,
            "_origin": _no_model,
            "_counted": None,
            "_swapped": False,
            "_handle": "",
            "_lock": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_lock": threading.RLock()})  # type: ignore[no-untyped-call]

    def _own(self) -> list[tuple[str, Tensor, bool]]:
        """Name and tensor of each part of the average, and whether it is a parameter."""
        parameters = ((name, t, True) for name, t in self.module.named_parameters())
        return [*parameters, *((name, t, False) for name, t in self.module.named_buffers())]

    def _match(self, model: nn.Module) -> list[Tensor]:
        """The model's tensors in the order of the average's.

        Raises:
            ValueError: the model does not fit.
        """
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if is_lazy(tensor):
                check_kind(name, tensor)
        if any(map(is_lazy, itertools.chain(self.module.parameters(), self.module.buffers()))):
            # The copy of a model that was not initialised yet has no values to lose.
            self.module = copied(model, *self._copied_how)
        found, problems = match_modules(self.module, model)
        if problems:
            raise ValueError(
                "update_parameters: the model does not fit the average\n  " + "\n  ".join(problems)
            )
        return found

    def _bind(self, model: nn.Module) -> Storage | None:
        """Reads from ``model`` from now on. None: only torch can.

        Raises:
            ValueError, TypeError: the model does not fit; nothing has changed then.
        """
        found, every = self._match(model), self._own()
        loose = [not parameter and is_loose(tensor) for _, tensor, parameter in every]
        live, loose_live = apart(found, loose)
        own, loose_own = apart(every, loose)
        if self._go_by_torch(_by_torch.odd_one(own, live)):
            return None
        for (name, tensor, _), source in zip(loose_own, loose_live, strict=True):
            if (tensor.layout, tensor.dtype) != (source.layout, source.dtype):
                raise ValueError(
                    f"buffer {name}: {tensor.layout}, {tensor.dtype} in the average, "
                    f"{source.layout}, {source.dtype} in the model"
                )
        slots = []
        for name, tensor, parameter in own:
            check_kind(name, tensor)
            numeric = tensor.is_floating_point() or tensor.is_complex()
            averaged = (parameter or self.use_buffers) and numeric
            slots.append(
                Slot(name, averaged, tensor.dtype, tuple(tensor.shape), dense_strides(tensor))
            )
        rule = self._built_in()
        storage = Storage(
            slots,
            SeparateMemory([[tensor for _, tensor, _ in own]]),
            [[SWA() if rule is None else rule]],
            counter=self.n_averaged,
            backend=self.backend,
            loose=[[tensor for _, tensor, _ in loose_own]],
            lock=self._lock,
        )
        places = itertools.chain(
            [(self.__dict__, "_buffers"), (self.__dict__, "_modules")],
            Watch.places_of(self.module),
            Watch.places_of(model),
        )
        storage.bind(live, places, loose_live)
        # The model's tensors are held no longer than the model itself.
        self._model = weakref.ref(model, lambda _: storage.unbind())
        self._storage, self._key, self._followed = storage, self._options(), rule
        self._handle = str(id(self))
        _ops.averagers[self._handle] = self
        return storage

    def _go_by_torch(self, odd: str | None) -> bool:
        if odd is not None and self._odd is None:
            _log.warning(
                "AveragedModel: %s, which no kernel reads: updates are torch's own arithmetic, "
                "tensor by tensor",
                odd,
            )
        self._odd = odd
        if odd is not None:
            self._storage, self._key, self._model = None, (), _no_model
        return odd is not None

    def _options(self) -> tuple[object, ...]:
        rule = self._built_in()
        # Another decay needs no other table.
        kind = EMA if isinstance(rule, EMA) else rule or self.multi_avg_fn or self.avg_fn
        return self.backend, self.use_buffers, kind

    def _bound(self, model: nn.Module) -> Storage | None:
        storage = self._known(model)
        return self._bind(model) if storage is None or not storage.holds() else storage

    def _known(self, model: nn.Module) -> Storage | None:
        """What was bound to this model, wherever its tensors are now."""
        storage = self._storage
        if storage is None or self._model() is not model or self._key != self._options():
            return None
        rule = self._built_in()
        if rule is not None and rule != self._followed:
            storage.set_rule(0, rule)
            self._followed = rule
        return storage

    def _refuse_if_applied(self, what: str) -> None:
        if self._swapped or (self._storage is not None and self._storage.applied is not None):
            raise RuntimeError(
                f"{what}: the average is applied, so it is in the model's place; leave applied() "
                "first"
            )

    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's current weights into the average.

        Args:
            model: a model with the parameters and buffers of the one given to the constructor, on
                any device; it may be wrapped by DataParallel, DistributedDataParallel or
                torch.compile.

        Raises:
            ValueError: parameters or buffers that are missing, extra or of another shape, all
                named in one message.
            TypeError: a dtype that the built-in rules do not average.
            RuntimeError: the average is applied to a model at the moment.

        Nothing is written before everything has been checked. Under ``torch.compile`` the model is
        the one of the last update, of which there must have been one. (Compiled by itself an update
        takes longer, see :meth:`swa_fast.Averager.update`.)
        """
        if torch.compiler.is_compiling():
            self._trace_update(model)
        else:
            self._update(model)

    def _trace_update(self, model: nn.Module) -> None:
        if self._odd is not None:
            raise RuntimeError(
                f"update_parameters: {self._odd}, which compiled code cannot average; call this "
                "outside of the compiled function"
            )
        if self._storage is None or self._model() is not model:
            raise RuntimeError(
                "update_parameters: run one update of this model before compiling it"
            )
        if self._built_in() is None:
            raise RuntimeError(
                "update_parameters: a user's averaging function cannot be compiled; call this "
                "outside of the compiled function"
            )
        _ops.refresh_averager(self._handle)
        storage = self._storage
        with torch.no_grad():
            _ops.update_averager(storage.memory.tensors, storage.counts, storage.live, self._handle)

    def _refresh(self) -> None:
        model = self._model()
        if model is not None:
            self._bound(model)

    def _update_with(
        self, averages: list[Tensor], counts: list[Tensor], sources: list[Tensor]
    ) -> None:
        with self._lock:
            self._refuse_if_applied("update_parameters")
            assert self._storage is not None
            if self._storage.is_own(averages, counts, sources):
                self._refresh()
                self._storage.update()
            else:
                self._storage.update_with(averages, counts, sources)

    def _update(self, model: nn.Module, gate: Gate | None = None) -> None:
        with self._lock:
            self._refuse_if_applied("update_parameters")
            rule = self._built_in()
            storage = None if rule is None else self._known(model)
            if storage is not None and gate is None and storage.update_at_once(storage):
                return
            storage = None if rule is None else self._bound(model)
            if storage is None:
                self._update_by_torch(model)
                return
            storage.update(gate)
            # Whether a gate let it through only the device knows; the CPU can always be asked.
            if gate is None and self._storage is not None and self._storage.counts[0].is_cuda:
                self._counted = self._counter_seen()

    def _counter_seen(self) -> tuple[int, int] | None:
        """Which counter, written how often by others: what an update leaves the same is above 0."""
        counter = self.n_averaged
        return None if counter.is_inference() else (counter.data_ptr(), counter._version)

    def _update_by_torch(self, model: nn.Module) -> None:
        # As torch does: functions see every tensor, integers included.
        sources = [source.detach() for source in self._match(model)]
        names, own, parameter = zip(*self._own(), strict=True)
        averaged = sum(is_one or self.use_buffers for is_one in parameter)
        how = _by_torch.averaging(
            self._built_in(), self.avg_fn, self.multi_avg_fn, names[:averaged], self.n_averaged
        )
        _by_torch.update_([t.detach() for t in own], sources, averaged, self.n_averaged, how)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        every: int = 1,
        start: int = 0,
    ) -> Attachment:
        """Updates after an optimiser's steps, as :meth:`swa_fast.Averager.attach` does.

        Args:
            optimizer: as there.
            model: as for :meth:`update_parameters`; None takes the one given to the constructor,
                which must still exist.
            every: as there.
            start: as there.

        Raises:
            TypeError, ValueError: as there.
            RuntimeError: there is no model.
        """
        followed = self._origin() if model is None else model
        if followed is None:
            raise RuntimeError("attach: give the model; the one of the constructor is not there")
        return attach(
            optimizer,
            lambda gate: self._update(followed, gate),
            lambda: self._storage,
            Cadence(every, start),
        )

    def applied(self, model: nn.Module, by: str = "value") -> AbstractContextManager[None]:
        """Puts the average into ``model`` for the time of a ``with`` block.

        The model's values are kept in a copy meanwhile, and this AveragedModel stays what it is, so
        that it may be saved and copied inside the block. On the CPU the copy's memory is kept for
        the next time, up to 256 MiB, until the model or the average moves or goes. Everything is
        undone when the block ends, also by an exception or Ctrl-C, at whatever moment.

        By pointer the model's tensors are set to the average's memory instead, with what
        :meth:`swa_fast.Averager.applied` says of it: what they are changed to changes the average.

        Args:
            model: as for :meth:`update_parameters`.
            by: ``value`` or ``pointer``.

        Raises:
            RuntimeError: the average has not been updated yet, or is already applied.
            ValueError, TypeError: as :meth:`update_parameters` and ``Averager.applied``.
        """

        def check() -> None:
            if self._swapped or (self._storage is not None and self._storage.applied is not None):
                raise RuntimeError("applied: the average is already applied")
            # Else the device has to be waited for.
            known = self._counted is not None and self._counted == self._counter_seen()
            if not known and self.n_averaged == 0:
                raise RuntimeError("applied: the average has not been updated yet")

        def prepare() -> tuple[Storage, int]:
            check()
            storage = self._bound(model)
            if storage is None:
                raise RuntimeError(f"applied: {self._odd} since the last update; update once more")
            return storage, 0

        def find() -> tuple[list[Tensor], list[Tensor]]:
            tensors = self._match(model)
            loose = [not parameter and is_loose(tensor) for _, tensor, parameter in self._own()]
            return apart(tensors, loose)

        def pairs() -> tuple[list[Tensor], list[Tensor]]:
            check()
            return self._match(model), [tensor for _, tensor, _ in self._own()]

        if self._storage is None:
            self._go_by_torch(_by_torch.odd_one(self._own()))
        kind = kind_of(by, self._odd)
        if self._odd is not None:
            swapped = _by_torch.Swapped(
                self._lock, pairs, lambda now: setattr(self, "_swapped", now)
            )
            return _by_torch.applied(swapped)
        return applied(self._lock, prepare, find, dict, False, kind=kind)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``torch.nn.Module.load_state_dict``, but all of it or nothing: where torch raises with
        a part of the tensors written, these are what they were. A copy of the average is kept for
        the time of the call.

        Raises:
            RuntimeError: it does not fit, as torch says, or the average is applied.
        """
        with self._lock:
            self._refuse_if_applied("load_state_dict")
            with all_or_nothing(self):
                return super().load_state_dict(state_dict, strict=strict, assign=assign)
