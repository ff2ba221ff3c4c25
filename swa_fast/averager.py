"""Averages of a model's weights without a copy of the model: :class:`Averager`."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends, _ops
from ._layout import MAX_AVERAGES
from ._modules import Filter, Selection, check_kind
from ._watch import Watch
from .engine import Engine, Slot, dense_strides
from .hooks import Attachable, Gate
from .rules import BUILT_IN, Rule, describe_rule, row_names, why_it_stands_still, with_members
from .storage import FlatMemory, Storage

__all__ = ["Averager"]


class Averager(Attachable):
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
            :class:`~swa_fast.Power`, :class:`~swa_fast.Window` (which counts as ``k + 1``), or a
            function ``(averages, sources, n_averaged) -> None`` that changes lists of tensors in
            place, called for each device and dtype. The function is called at every update; the
            first update then copies the sources over its result.
        dtype: of the averages of floating-point tensors: float32, float64, bfloat16 or float16.
            A float64 tensor's average is float64 all the same, complex tensors keep their dtype,
            and None keeps every tensor's own.
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

    Raises:
        TypeError: a dtype or tensor that cannot be averaged.
        ValueError: an argument outside its range, no tensor left, or an EMA that could not move
            because ``1 - decay`` is below the resolution of ``dtype``.

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
    ) -> None:
        for name, rule in averages.items():
            if not isinstance(rule, BUILT_IN) and not callable(rule):
                raise TypeError(
                    f"averages[{name!r}]: expected SWA, EMA, Power, Window or a function, found "
                    f"{type(rule).__name__}"
                )
        rows = with_members(list(averages.values()))
        if not rows or len(rows) > MAX_AVERAGES:
            raise ValueError(
                f"averages: expected 1 to {MAX_AVERAGES} rules, found {len(rows)}"
                + (" (a Window counts as k + 1)" if len(rows) > len(averages) else "")
            )
        if dtype is not None and dtype not in _ops.AVERAGE_DTYPES:
            raise TypeError(f"dtype: expected None or one of {_ops.AVERAGE_DTYPES}, found {dtype}")
        _backends.check_name(backend)
        for argument, value, expected in (
            ("buffers", buffers, ("copy", "average", "skip")),
            ("rounding", rounding, ("nearest", "stochastic")),
            ("on_nonfinite", on_nonfinite, (None, "skip", "raise")),
        ):
            if value not in expected:
                raise ValueError(f"{argument}: expected one of {expected}, found {value!r}")
        if rounding == "stochastic" and dtype != torch.bfloat16:
            raise ValueError(f"rounding='stochastic': expected dtype torch.bfloat16, found {dtype}")
        if on_nonfinite is not None and any(
            not isinstance(rule, BUILT_IN) for rule in averages.values()
        ):
            raise ValueError(
                "on_nonfinite: expected None beside a user's function, which runs before the "
                f"check; found {on_nonfinite!r}"
            )

        self._rules = dict(averages)
        if len(set(row_names(self._rules))) < len(rows):
            raise ValueError(
                "averages: expected names other than those of a window's rows, such as NAME[0]; "
                f"found {', '.join(row_names(self._rules))}"
            )
        self._rounding = rounding
        self._seed = seed
        self._on_nonfinite = on_nonfinite
        self._dtype = dtype
        self._device = None if device is None else torch.empty(0, device=device).device
        self._selection = Selection(
            params_or_module, buffers != "skip", trainable_only, filter, unwrap
        )
        names, tensors, is_parameter = self._selection.collect()
        if not tensors:
            found, left_out = self._selection.what_leaves_nothing()
            raise ValueError(
                f"{found}: expected at least one tensor to average, found none{left_out}"
            )
        self._aliases = names
        first_names: dict[int, str] = {}
        for name, at in names.items():
            first_names.setdefault(at, name)
        slots = []
        for i, (tensor, parameter) in enumerate(zip(tensors, is_parameter, strict=True)):
            name = first_names[i]
            check_kind(name, tensor)
            numeric = tensor.is_floating_point() or tensor.is_complex()
            averaged = (parameter or buffers == "average") and numeric
            slots.append(
                Slot(
                    name,
                    averaged,
                    self._average_dtype(tensor),
                    tuple(tensor.shape),
                    dense_strides(tensor),
                )
            )
            for average, rule in averages.items():
                reason = why_it_stands_still(rule, slots[-1].dtype) if averaged else None
                if reason and rounding == "nearest":
                    raise ValueError(
                        f"averages[{average!r}]: {reason}; use dtype=torch.float32 or, for "
                        "bfloat16, rounding='stochastic'"
                    )
        devices = [self._device or tensor.device for tensor in tensors]
        self._storage = Storage(
            slots,
            FlatMemory(slots, devices, len(rows)),
            rows,
            backend=backend,
            seed=seed if rounding == "stochastic" else None,
            skip_nonfinite=on_nonfinite is not None,
        )
        # What a traced update reads and writes.
        self._memory, self._counts = self._storage.memory.tensors, self._storage.counts
        self._bind(tensors)
        with torch.no_grad():
            for row in self._storage.averages:
                for own, tensor in zip(row, tensors, strict=True):
                    own.copy_(tensor)
        self._known_updated: set[str] = set()
        self._reported = 0
        self._seen = [self._mirror(part.engine) for part in self._storage.parts]
        self._handle = str(id(self))
        _ops.averagers[self._handle] = self

    def _average_dtype(self, tensor: Tensor) -> torch.dtype:
        if self._dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor.dtype
        return self._dtype

    def _bind(self, tensors: list[Tensor]) -> None:
        module = self._selection.module
        self._storage.bind(tensors, [] if module is None else Watch.dictionaries_of(module))

    def _current(self) -> list[Tensor]:
        """The model's tensors in the order of the slots, wherever they are now.

        Raises:
            ValueError: they do not fit the averages; all that does not is named.
        """
        names, tensors, _ = self._selection.collect()
        problems = [
            f"{n}: in the average, not in the model" for n in self._aliases if n not in names
        ]
        problems += [
            f"{n}: in the model, not in the average" for n in names if n not in self._aliases
        ]
        slots, averages = self._storage.slots, self._storage.averages[0]
        sources: list[Tensor] = [torch.empty(0)] * len(slots)
        chosen: dict[int, str] = {}
        for name, at in names.items():
            i = self._aliases.get(name)
            if i is None:
                continue
            slot, tensor = slots[i], tensors[at]
            if i in chosen and sources[i] is not tensor:
                problems.append(f"{name}: tied to {chosen[i]} in the average, not in the model")
                continue
            chosen[i], sources[i] = name, tensor
            if tuple(tensor.shape) != slot.shape:
                problems.append(
                    f"{name}: shape {slot.shape} in the average, {tuple(tensor.shape)} in the model"
                )
            expected = slot.dtype
            if not (
                tensor.dtype == expected
                or (tensor.is_floating_point() and expected.is_floating_point)
            ):
                problems.append(f"{name}: {expected} in the average, {tensor.dtype} in the model")
            where = averages[i].device
            if self._device is None and tensor.device != where:
                problems.append(
                    f"{name}: the average is on {where}, the model on {tensor.device} (give "
                    "device= to keep the averages elsewhere)"
                )
        if problems:
            raise ValueError("the model does not fit the averages\n  " + "\n  ".join(problems))
        return sources

    @staticmethod
    def _mirror(engine: Engine) -> Tensor:
        """Where the count of skipped updates arrives without anyone waiting for it."""
        if engine.device.type != "cuda":
            return engine.skipped
        return torch.zeros((), dtype=torch.int64, pin_memory=True)

    def _raise_if_nonfinite(self, wait: bool = False) -> None:
        if self._on_nonfinite != "raise":
            return
        skipped = self.skipped_updates if wait else max(int(seen) for seen in self._seen)
        if skipped > self._reported:
            found = skipped - self._reported
            self._reported = skipped
            bad = [
                slot.name
                for slot, source in zip(self._storage.slots, self._storage.live, strict=True)
                if slot.averaged and not bool(source.isfinite().all())
            ]
            raise FloatingPointError(
                f"{found} update(s) met an infinity or NaN and changed nothing; not finite now: "
                f"{', '.join(bad) or 'none'}"
            )

    def update(self) -> None:
        """Takes the current values of all tensors into every average.

        Raises:
            RuntimeError: an average is applied at the moment.
            ValueError: tensors are missing, extra, reshaped, retyped or on another device; all are
                named in one message.
            FloatingPointError: see ``on_nonfinite``.

        Nothing is written if it raises.
        """
        if torch.compiler.is_compiling():
            _ops.refresh_averager(self._handle)
            _ops.update_averager(self._memory, self._counts, self._storage.live, self._handle)
        else:
            self._update()

    def _refresh(self) -> None:
        self._storage.settle()
        if not self._storage.holds():
            self._bind(self._current())

    def _update_with(
        self, averages: list[Tensor], counts: list[Tensor], sources: list[Tensor]
    ) -> None:
        self._update((averages, counts, sources))

    @torch.no_grad()
    def _update(
        self,
        given: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None,
        gate: Gate | None = None,
    ) -> None:
        """``given``: memory, counters and sources to use instead of the averager's own."""
        self._refuse_if_applied("update")
        if self._on_nonfinite == "raise":
            self._raise_if_nonfinite()
        if given is None:
            self._refresh()
            self._storage.update(gate)
        else:
            self._storage.update_with(*given)
        if self._on_nonfinite == "raise":
            for part, seen in zip(self._storage.parts, self._seen, strict=True):
                if seen.is_pinned():
                    seen.copy_(part.engine.skipped, non_blocking=True)
            if all(not seen.is_pinned() for seen in self._seen):
                self._raise_if_nonfinite()

    def _refuse_if_applied(self, what: str) -> None:
        if self._storage.swapped is not None:
            raise RuntimeError(
                f"{what}: the average {list(self._rules)[self._storage.swapped]!r} is applied, so "
                "the live weights are in its place; leave applied() first"
            )

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}={rule!r}" for name, rule in self._rules.items())
        slots = self._storage.slots
        elements = sum(slot.numel for slot in slots)
        devices = ", ".join(str(part.engine.device) for part in self._storage.parts)
        return (
            f"{type(self).__name__}({rules}; {len(slots)} tensors of {elements:,} elements "
            f"on {devices}, backend {', '.join(self._storage.backends)})"
        )

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        """The averages by name; each maps tensor names to the averages themselves, not copies.
        Before the first update they hold the values at construction."""
        return self._by_name(list(self._rules))

    def _by_name(self, rows: list[str]) -> dict[str, dict[str, Tensor]]:
        self._storage.settle()
        result: dict[str, dict[str, Tensor]] = _ByName()
        for row, tensors in zip(rows, self._storage.averages, strict=False):
            result[row] = {name: tensors[at] for name, at in self._aliases.items()}
        return result

    @property
    def n_averaged(self) -> dict[str, int]:
        """Updates that each average has seen. Waits for the device."""
        return dict(zip(self._rules, self._counts[0].tolist(), strict=False))

    @property
    def skipped_updates(self) -> int:
        """Updates skipped by ``on_nonfinite``. Waits for the device."""
        return max(int(part.engine.skipped) for part in self._storage.parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs: rules with their warm-ups, counters (which
        are also the position in the random numbers), seed, and the averages themselves.

        Only plain values and tensors, so that ``torch.load(weights_only=True)`` reads it.
        """
        self._raise_if_nonfinite(wait=True)
        return {
            "format": 1,
            "rules": {name: describe_rule(rule) for name, rule in self._rules.items()},
            "n_averaged": self.n_averaged,
            "rounding": self._rounding,
            "seed": self._seed,
            "skipped_updates": self.skipped_updates,
            "averages": dict(self._by_name(row_names(self._rules))),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict` of an averager with the same rules and tensors.

        Raises:
            RuntimeError: an average is applied at the moment.
            ValueError: it does not fit; all differences are named, and nothing is changed.
        """
        self._refuse_if_applied("load_state_dict")
        keys = ("n_averaged", "rounding", "rules", "seed", "skipped_updates", "averages")
        if state_dict.get("format") != 1 or any(key not in state_dict for key in keys):
            raise ValueError(
                "state_dict: expected one of an Averager in format 1, found the keys "
                f"{sorted(map(str, state_dict))}"
            )
        problems = []
        rules = {name: describe_rule(rule) for name, rule in self._rules.items()}
        expected_settings: dict[str, Any] = {"rules": rules, "rounding": self._rounding}
        if self._rounding == "stochastic":
            expected_settings["seed"] = self._seed
        for key, expected in expected_settings.items():
            if state_dict[key] != expected:
                problems.append(f"{key}: expected {expected}, found {state_dict[key]}")
        own = self._by_name(row_names(self._rules))
        for average, tensors in own.items():
            theirs = state_dict["averages"].get(average, {})
            for name in tensors.keys() | theirs.keys():
                if name not in theirs or name not in tensors:
                    where = "missing" if name not in theirs else "unknown"
                    problems.append(f"averages[{average!r}]: {name} is {where}")
                elif (theirs[name].shape, theirs[name].dtype) != (
                    tensors[name].shape,
                    tensors[name].dtype,
                ):
                    problems.append(
                        f"averages[{average!r}]: {name} expected {tuple(tensors[name].shape)} "
                        f"{tensors[name].dtype}, found {tuple(theirs[name].shape)} "
                        f"{theirs[name].dtype}"
                    )
        if problems:
            raise ValueError("state_dict does not fit\n  " + "\n  ".join(sorted(problems)))
        self._known_updated.clear()
        for average, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(state_dict["averages"][average][name])
        count = state_dict["n_averaged"]
        counters = torch.tensor([count.get(n, count.get(n.rpartition("[")[0])) for n in own])
        self._reported = int(state_dict["skipped_updates"])
        for part, seen in zip(self._storage.parts, self._seen, strict=True):
            part.engine.n_averaged.copy_(counters)
            part.engine.skipped.fill_(self._reported)
            seen.fill_(self._reported)

    @contextlib.contextmanager
    def applied(self, name: str) -> Iterator[None]:
        """Puts an average into the live tensors for the time of a ``with`` block.

        Live values and average are swapped in place, without a third copy, where their dtypes
        agree; where they do not (an fp32 average of bf16 weights) the live values are kept in a
        copy. Parameters stay the same objects at the same addresses, so optimizers, tied weights,
        compiled code and captured graphs are not disturbed. The swap is undone when the block
        ends, also by an exception.

        Args:
            name: of an average.

        Raises:
            KeyError: there is no average of that name.
            RuntimeError: it has not been updated yet, an average is already applied, or an average
                was written inside the block (which would have been to the live values).
        """
        if name not in self._rules:
            raise KeyError(f"expected one of {', '.join(self._rules)}, found {name!r}")
        if self._storage.swapped is not None:
            applied = list(self._rules)[self._storage.swapped]
            raise RuntimeError(f"applied: the average {applied!r} is already applied")
        self._raise_if_nonfinite(wait=True)
        # Counters only grow, but for load_state_dict: the device is asked once.
        if name not in self._known_updated:
            if self.n_averaged[name] == 0:
                raise RuntimeError(f"applied: the average {name!r} has not been updated yet")
            self._known_updated.add(name)
        with torch.no_grad():
            self._refresh()
        with self._storage.applied(list(self._rules).index(name), self._current):
            yield


class _ByName(dict[str, dict[str, Tensor]]):
    """Averages by name. Pickled as a type that ``torch.load(weights_only=True)`` allows."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __missing__(self, name: object) -> dict[str, Tensor]:
        raise KeyError(f"averages: expected one of {', '.join(self)}, found {name!r}")
