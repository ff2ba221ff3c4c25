"""Averages of a model's weights without a copy of the model: :class:`Averager`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import _ops
from ._applied import applied
from ._arguments import check_averages, check_overlap, check_settings
from ._cadence import Cadence
from ._changes import Changes
from ._decays import Decays
from ._fit import tensors_of
from ._lent import Lent, Source
from ._memory import FlatMemory, SeparateMemory, Slot, average_dtype, dense_strides
from ._modules import Filter, Selection, check_kind, is_loose, warn_of_packed
from ._overlap import Overlap
from ._pointers import kind_of
from ._saved import Saved
from ._view import Views
from ._watch import Watch
from .by_name import check_patterns, grouped
from .engine import Engine
from .hooks import Attachable, Gate, Given
from .rules import Rule, with_members
from .storage import Storage

__all__ = ["Averager"]


class Averager(Saved, Decays, Changes, Views, Attachable):
    r"""Running averages of a model's weights, several at once, without a copy of the model.

    .. math::
        a_j \leftarrow a_j + w_j(n)\,(b - a_j) \quad\text{for each average } j, \qquad
        n \leftarrow n + 1

    with the weight :math:`w_j` of the average's rule, and :math:`w_j(0) = 1` but for ultralytics'
    warm-up. One launch per device updates all tensors of all averages, buffers and counters
    included, and reads every source once: :math:`4 + 8k` bytes per fp32 parameter for :math:`k`
    averages. An update does not wait for the device and can be captured in a CUDA graph or compiled
    by ``torch.compile(fullgraph=True)``.

    Sources are read where they are. A parameter that was moved, replaced or changed to another
    floating type is noticed at the next update.

    Args:
        params_or_module: a module, whose averages are named like its ``state_dict``; or tensors; or
            pairs of name and tensor. A tensor that appears under several names is averaged once.
        averages: rules by name, 1 to 16 of them: :class:`~swa_fast.SWA`, :class:`~swa_fast.EMA`,
            :class:`~swa_fast.Power`, :class:`~swa_fast.Window` (which counts as ``k + 1``),
            :class:`~swa_fast.ByName` for several of them in one average, or a function
            ``(averages, sources, n_averaged) -> None`` that changes lists of tensors in place,
            called for each device and dtype. The function is called at every update; the first
            update then copies the sources over its result.
        dtype: of the averages of floating-point tensors: float32, float64, bfloat16 or float16.
            A float64 tensor's average is float64 all the same, complex tensors keep their dtype,
            and None keeps every tensor's own. float64 is worth its memory where steps are small
            beside the weights and updates many; :class:`~swa_fast.AveragedModel` has the figures.
        device: where the averages live; None keeps each beside its tensor. On the CPU, an update of
            a model on a GPU waits once, for the copy of its tensors, which takes as much pinned
            memory and up to 256 MiB of the GPU's.
        buffers: ``copy`` keeps the last values, ``average`` averages floating-point buffers and
            copies integers and booleans, ``skip`` leaves buffers out.
        filter: which parameters and buffers to keep: a predicate of name and tensor, or a regular
            expression to be found in the name.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device.
        trainable_only: leave out parameters that do not require a gradient.
        unwrap: average the model inside DataParallel, DistributedDataParallel or torch.compile, so
            that names do not carry their prefixes.
        rounding: ``nearest``, or ``stochastic`` for bfloat16 averages: up with the probability of
            the distance from the next lower number, so that small steps are not lost on average.
        seed: of the stochastic rounding. Its random bits depend on the seed, the average, the
            element and the update alone, not on device, backend or the order of work.
        on_nonfinite: what happens when an averaged tensor holds an infinity or NaN: None averages
            it, ``skip`` leaves all averages and counters as they are, ``raise`` does the same and
            raises FloatingPointError: on the CPU at once, on a GPU, which is not waited for, at
            the first later ``update``, ``applied`` or ``state_dict`` that finds it.
        update_every: calls of :meth:`update` from one that updates to the next, at least 1.
        start: calls of :meth:`update` before the first that counts, at least 0. Updates happen in
            the calls ``start + update_every``, ``start + 2 update_every``, ...; the others leave
            averages and counters alone. How many there were is part of the state; replays of a
            captured CUDA graph are calls, too. (``start`` of a
            rule counts updates instead, and copies until then.)
        count_initial: count the values at construction as the first update, so that averages begin
            at the initial weights, with ``n_averaged`` at 1, as those of timm, torch-ema and
            diffusers do. False: the first update copies.
        excluded: what becomes of tensors that ``filter`` or ``trainable_only`` leave out: ``skip``
            leaves them out of the averages, too; ``copy`` keeps their last values there, which
            every update then copies, so that a filtered average is a whole model's weights.
        overlap: with ``device="cpu"`` and :meth:`attach`, the copies of a model on a GPU are made
            during the next forward and backward, and a thread of the host brings the averages up to
            date: the training waits for neither. Takes twice the model's size in pinned memory.
            Whatever reads the averages waits for them first, as :meth:`flush` does.

    Raises:
        TypeError: a dtype or tensor that cannot be averaged.
        ValueError: an argument outside its range, no tensor left, or an average that would stand
            still, rounded to nearest: an EMA because ``1 - decay`` is below the resolution of
            ``dtype``, equal weights in bfloat16.

    Copies and pickles of an averager bring their model with them; several threads may use one.

    DTensor parameters (FSDP2, tensor parallelism) are averaged piece by piece, without
    communication; functions get the pieces. For FSDP1 and ZeRO-3 see :mod:`swa_fast.sharding`.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018.
    """

    def __init__(
        self,
        params_or_module: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        averages: Mapping[str, Rule],
        *,
        dtype: torch.dtype | None = torch.float32,
        device: int | str | torch.device | None = None,
        buffers: str = "copy",
        filter: Filter | None = None,
        backend: str | None = None,
        trainable_only: bool = False,
        unwrap: bool = True,
        rounding: str = "nearest",
        seed: int = 0,
        on_nonfinite: str | None = None,
        update_every: int = 1,
        start: int = 0,
        count_initial: bool = False,
        excluded: str = "skip",
        overlap: bool = False,
    ) -> None:
        check_settings(dtype, backend, buffers, rounding, on_nonfinite, excluded)
        check_averages(averages, on_nonfinite)
        self._overlaps = check_overlap(overlap, device, averages, on_nonfinite)
        cadence = Cadence(update_every, start, "update_every")
        self._cadence = cadence if (update_every, start) != (1, 0) else None
        self._initial = bool(count_initial)
        self._rules = dict(averages)
        self._rounding = rounding
        self._seed = seed
        self._on_nonfinite = on_nonfinite
        self._dtype = dtype
        self._backend = backend
        self._device = None if device is None else torch.empty(0, device=device).device
        self._selection = Selection(
            params_or_module,
            buffers != "skip",
            trainable_only,
            filter,
            unwrap,
            excluded == "copy",
        )
        if self._selection.module is not None:
            warn_of_packed("Averager", self._selection.module)
        names, tensors, is_parameter = self._selection.collect()
        if len(self._selection.copied) == len(tensors):
            found, left_out = self._selection.what_leaves_nothing()
            raise ValueError(
                f"{found}: expected at least one tensor to average, found none{left_out}"
            )
        self._selection.check_nonfinite(on_nonfinite)
        first_names: dict[int, str] = {}
        for name, at in names.items():
            first_names.setdefault(at, name)
        loose = [
            i for i, t in enumerate(tensors) if isinstance(t, Tensor) and is_loose(t)
            and (not is_parameter[i] or i in self._selection.copied)
        ]  # fmt: skip
        place_of_loose = {at: i for i, at in enumerate(loose)}
        plain = [i for i in range(len(tensors)) if i not in place_of_loose]
        place_of = {at: i for i, at in enumerate(plain)}
        # Names, and which slot or which of the loose tensors has each of them.
        self._aliases = {name: place_of[at] for name, at in names.items() if at in place_of}
        self._loose = {
            name: place_of_loose[at] for name, at in names.items() if at in place_of_loose
        }
        slots = []
        for i in plain:
            name, tensor = first_names[i], tensors[i]
            check_kind(name, tensor)
            numeric = tensor.is_floating_point() or tensor.is_complex()
            averaged = (is_parameter[i] or buffers == "average") and numeric
            averaged = averaged and i not in self._selection.copied
            slots.append(
                Slot(
                    name,
                    averaged,
                    average_dtype(tensor, dtype),
                    tuple(tensor.shape),
                    dense_strides(tensor),
                )
            )
        check_patterns(self._rules, slots)
        self._check_that_all_move(self._rules, slots)
        sources = [tensors[i] for i in plain]
        devices = [self._device or tensor.device for tensor in sources]
        # Also where this is called in inference mode, whose tensors could not be changed later.
        with torch.inference_mode(False), torch.no_grad():
            rows = with_members(list(averages.values()))
            memory = FlatMemory(slots, devices, len(rows))
            copies = [[tensors[i].detach().clone() for i in loose] for _ in rows]
            self._build(slots, memory, copies)
            for row in self._storage.averages:
                for own, tensor in zip(row, sources, strict=True):
                    own.copy_(tensor)
            if self._initial:
                for part in self._storage.parts:
                    part.engine.n_averaged.fill_(1)
                self._calls = None
        self._bind(sources, [tensors[i] for i in loose])

    def _build(
        self, slots: list[Slot], memory: FlatMemory | SeparateMemory, loose: list[list[Tensor]]
    ) -> None:
        slots, rules = grouped(list(self._rules.values()), slots)
        self._storage = Storage(
            slots,
            memory,
            [with_members(each) for each in rules],
            backend=self._backend,
            seed=self._seed if self._rounding == "stochastic" else None,
            skip_nonfinite=self._on_nonfinite is not None,
            loose=loose,
        )
        if self._overlaps:
            self._storage.overlap = Overlap(self._storage)
        # Updates done or tried, which schedules of the decay go by; None: to be asked for.
        self._calls: int | None = 0
        self._find_schedules()
        self._known_updated: set[str] = set()
        self._reported = 0
        self._seen = [self._mirror(part.engine) for part in self._storage.parts]
        self._lent: Lent | None = None
        self._name_memory()
        self._handle = str(id(self))
        _ops.averagers[self._handle] = self

    def _name_memory(self) -> None:
        # What a traced update reads and writes.
        self._memory, self._counts = self._storage.memory.tensors, self._storage.counts

    def _bind(self, tensors: list[Tensor], loose: list[Tensor]) -> None:
        module = self._selection.module
        places = [] if module is None else Watch.places_of(module)
        self._storage.bind(tensors, places, loose, self._selection.sharded)
        self._name_memory()

    def _current(self, selection: Selection | None = None) -> tuple[list[Tensor], list[Tensor]]:
        selection = self._selection if selection is None else selection
        return tensors_of(selection, self._storage, self._aliases, self._loose, self._device)

    @staticmethod
    def _mirror(engine: Engine) -> Tensor:
        """Where the count of skipped updates arrives without anyone waiting for it."""
        if engine.device.type != "cuda":
            return engine.skipped
        return torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=True)

    def _raise_if_nonfinite(
        self, wait: bool = False, sources: Sequence[Tensor] | None = None
    ) -> None:
        if self._on_nonfinite != "raise":
            return
        skipped = self.skipped_updates if wait else max(int(seen) for seen in self._seen)
        if skipped > self._reported:
            found = skipped - self._reported
            self._reported = skipped
            live = self._storage.live
            bad = [
                slot.name
                for slot, source in zip(self._storage.slots, sources or live, strict=False)
                if slot.averaged and not bool(source.isfinite().all())
            ]
            raise FloatingPointError(
                f"{found} update(s) met an infinity or NaN and changed nothing; not finite now: "
                f"{', '.join(bad) or 'none'}"
            )

    def update(
        self,
        *,
        decay: float | Mapping[str, float] | None = None,
        source: Source | None = None,
    ) -> None:
        """Takes the current values of all tensors into every average.

        Args:
            decay: of the exponential averages in this update alone: one for all of them, or by
                name. None uses their rules'.
            source: what is averaged in this call instead of the averager's own model: a module
                with tensors of the same names, or tensors or pairs as for the constructor. The
                averager stays bound to its own. A module that is given again costs no new table.

        Raises:
            RuntimeError: an average is applied at the moment; or an argument in compiled code.
            ValueError: tensors are missing, extra, reshaped, retyped or on another device, all
                named in one message; or a decay outside [0, 1].
            FloatingPointError: see ``on_nonfinite``.

        Nothing is written if it raises.

        Compiled code may contain updates, without a break of its graph. One that is compiled by
        itself takes longer than one that is not, because all tensors are arguments of what the
        compiler makes: several times longer on a CPU, by some half a microsecond for each tensor.
        """
        # An exporter that traces without Dynamo is one of those who listen.
        if not is_dynamo_compiling() and self._plain and decay is None and source is None:
            storage = self._storage
            if storage.at_once is not None:
                self._calls = None
                if storage.update_at_once(storage):
                    return
        if not torch.compiler.is_compiling():
            self._call(None, decay, source)
        elif decay is not None or source is not None:
            raise RuntimeError("update: no decay or source can be given to a compiled update")
        else:
            _ops.refresh_averager(self._handle)
            _ops.update_averager(self._memory, self._counts, self._storage.live, self._handle)

    def _refresh(self) -> None:
        self._storage.settle()
        if not self._storage.holds():
            self._bind(*self._current())

    def _update_with(
        self, averages: list[Tensor], counts: list[Tensor], sources: list[Tensor]
    ) -> None:
        self._call((averages, counts, sources))

    def _update(
        self,
        given: Given | None = None,
        gate: Gate | None = None,
        decay: float | Mapping[str, float] | None = None,
        source: Source | None = None,
    ) -> None:
        """``given``: memory, counters and sources to use instead of the averager's own."""
        with self._storage.lock:
            self._refuse_if_applied("update")
            if self._on_nonfinite == "raise":
                self._raise_if_nonfinite()
            if given is not None and self._storage.is_own(*given):
                given = None
            lent = None if source is None else self._borrow(source)
            if decay is None and not self._scheduled:
                self._take(given, gate, lent)
            else:
                rules = self._rules_now(decay)
                try:
                    for row, rule in rules.items():
                        self._storage.set_rule(row, rule)
                    self._take(given, gate, lent)
                finally:
                    for row in rules:
                        self._storage.set_rule(row, list(self._rules.values())[row])
            if self._on_nonfinite == "raise":
                for part, seen in zip(self._storage.parts, self._seen, strict=True):
                    if seen.is_pinned():
                        seen.copy_(part.engine.skipped, non_blocking=True)
                if all(not seen.is_pinned() for seen in self._seen):
                    self._raise_if_nonfinite(sources=None if lent is None else lent.live)

    def _borrow(self, source: Source) -> Lent:
        self._storage.settle()
        selection = self._selection.of(source)
        if self._lent is None or not self._lent.serves(self._storage, selection.module):
            self._lent = Lent(self._storage, selection, *self._current(selection))
        return self._lent

    def _take(self, given: Given | None, gate: Gate | None, lent: Lent | None) -> None:
        storage = self._storage
        calls, self._calls = self._calls, None  # not known while it is on the way
        if lent is not None:
            storage.update_from(lent, gate)
        elif given is not None or gate is not None or not storage.update_at_once(storage):
            self._refresh()
            if given is None:
                storage.update(gate)
            else:
                storage.update_with(*given, gate)
        if calls is not None and gate is None:
            self._calls = calls + 1

    def _refuse_if_applied(self, what: str) -> None:
        if self._storage.applied is not None:
            raise RuntimeError(
                f"{what}: the average {list(self._rules)[self._storage.applied.row]!r} is applied, "
                "so the live weights are in its place; leave applied() first"
            )

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}={rule!r}" for name, rule in self._rules.items())
        slots = self._storage.slots
        elements = sum(slot.numel for slot in slots)
        devices = ", ".join(str(part.engine.device) for part in self._storage.parts)
        return (
            f"{type(self).__name__}({rules}; {len(slots) + len(set(self._loose.values()))} tensors "
            f"of {elements:,} elements on {devices}"
            + "".join(f", backend {name}" for name in self._storage.backends)
            + ")"
        )

    def _updated(self, name: str) -> bool:
        # Counters only grow, but for load_state_dict: the device is asked once.
        if name not in self._known_updated and self.n_averaged[name] > 0:
            self._known_updated.add(name)
        return name in self._known_updated

    def applied(self, name: str, by: str = "value") -> AbstractContextManager[None]:
        """Puts an average into the live tensors for the time of a ``with`` block.

        Live values and average are swapped in place, without a third copy, where their dtypes
        agree; where they do not (an fp32 average of bf16 weights), where tensors share memory and
        with the reference backend the live values are kept in a copy. Parameters stay the same
        objects at the same addresses, so optimizers, tied weights, compiled code and captured
        graphs are not disturbed. Everything is undone when the block ends, also by an exception or
        Ctrl-C, at whatever moment; so are changes of buffers that are not averaged.

        Inside the block updates are refused. A ``state_dict``, copy or pickle made there, and what
        ``averages`` gives, holds the average; a tensor that was taken from ``averages`` before
        holds the live values meanwhile. What the block changes in the live tensors is a change of
        the average, as BatchNorm statistics that ``update_bn`` finds.

        By pointer no byte is moved: the live tensors are set to the average's memory (``.data``)
        and back, in a time that depends on how many they are and not on their sizes. That is for
        the eager evaluation of large models: addresses change within the block, so captured graphs
        and what shares memory with live tensors go on with the live values; what is taken from live
        tensors inside stays the average; ``averages`` hold it throughout, and may be written.

        Args:
            name: of an average.
            by: ``value`` or ``pointer``.

        Raises:
            KeyError: there is no average of that name.
            RuntimeError: it has not been updated yet, an average is already applied, or an average
                was written inside the block (by value it would have been to the live values); by
                pointer, a CUDA graph is being captured.
            ValueError: ``by`` is neither; or, by pointer, an average has another dtype, device or
                strides than the live tensor, or that shares its memory or was made for inference.
            TypeError: by pointer, parameters are sharded.
        """
        kind = kind_of(by)

        def prepare() -> tuple[Storage, int]:
            if name not in self._rules:
                raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
            if self._storage.applied is not None:
                now = list(self._rules)[self._storage.applied.row]
                raise RuntimeError(f"applied: the average {now!r} is already applied")
            self._raise_if_nonfinite(wait=True)
            if not self._updated(name):
                raise RuntimeError(f"applied: the average {name!r} has not been updated yet")
            self._refresh()
            return self._storage, list(self._rules).index(name)

        lock, chosen = self._storage.lock, self._selection
        return applied(lock, prepare, self._current, chosen.left_out_buffers, True, chosen, kind)
