"""What is seen and saved of an :class:`~swa_fast.Averager`, and how it goes on from there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharding
from ._memory import FlatMemory, SeparateMemory, Slot
from ._modules import Selection
from ._state import FORMAT, Differences, read_state, read_weights
from .rules import EMA, Rule, describe_rule, row_names

if TYPE_CHECKING:
    from ._cadence import Cadence
    from .engine import Engine
    from .storage import Storage

__all__ = ["Saved"]


class Saved:
    """The averages by name, and their state."""

    _rules: dict[str, Rule]
    _storage: Storage
    _selection: Selection
    _cadence: Cadence | None
    _aliases: dict[str, int]
    _loose: dict[str, int]
    _counts: list[Tensor]
    _seen: list[Tensor]
    _known_updated: set[str]
    _reported: int
    _calls: int | None
    _rounding: str
    _seed: int

    def _build(
        self, slots: list[Slot], memory: FlatMemory | SeparateMemory, loose: list[list[Tensor]]
    ) -> None:
        raise NotImplementedError

    @staticmethod
    def _mirror(engine: Engine) -> Tensor:
        raise NotImplementedError

    def _name_memory(self) -> None:
        raise NotImplementedError

    def _refuse_if_applied(self, what: str) -> None:
        raise NotImplementedError

    def _raise_if_nonfinite(self, wait: bool = False) -> None:
        raise NotImplementedError

    def _tried(self) -> int:
        """Updates done or skipped. Waits for the device where that is not known here."""
        if self._calls is None:
            self._calls = max(self.n_averaged.values()) + self.skipped_updates
        return self._calls

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, a pickle or another process needs; within ``applied`` the averages are those
        that are applied."""
        storage = self._storage
        storage.settle()
        left_out = (
            "_storage", "_memory", "_counts", "_seen", "_handle", "_calls", "_known_updated",
            "_lent",
        )  # fmt: skip
        return {
            **{key: value for key, value in self.__dict__.items() if key not in left_out},
            "slots": storage.slots,
            "averages": [storage.values_of(row) for row in range(len(storage.averages))],
            "loose": storage.loose,
            "counters": [(part.engine.n_averaged, part.engine.counters) for part in storage.parts],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        slots, averages = list(state.pop("slots")), state.pop("averages")
        loose, counters = state.pop("loose"), state.pop("counters")
        self.__dict__.update(state)
        reported = self._reported
        # Where they are: other processes may see them.
        self._build(slots, SeparateMemory(averages), loose)
        for part, (n_averaged, of_device) in zip(self._storage.parts, counters, strict=True):
            part.engine.n_averaged, part.engine.counters = n_averaged, of_device
        self._seen = [self._mirror(part.engine) for part in self._storage.parts]
        self._reported, self._calls = reported, None
        self._name_memory()

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        """The averages by name; each maps tensor names to the averages themselves, not copies.
        Before the first update they hold the values at construction. Each tensor has a storage of
        its own length, and may be saved, copied or moved to shared memory.

        Sharded parameters have DTensors, with the parameter's mesh, placements, shape and stride.
        Within :meth:`applied` the applied average is a copy of what the live tensors hold."""
        return self._by_name(list(self._rules))

    def _by_name(self, rows: list[str], whole: bool = True) -> dict[str, dict[str, Tensor]]:
        """``whole``: pieces of sharded parameters in DTensors."""
        self._storage.settle()
        self._storage.give_away()
        result: dict[str, dict[str, Tensor]] = _ByName()
        for at, row in enumerate(rows):
            result[row] = self._named(self._storage.values_of(at), at, whole)
        return result

    def _named(self, tensors: Sequence[Tensor], row: int, whole: bool = True) -> dict[str, Tensor]:
        names = {name: tensors[at] for name, at in self._aliases.items()}
        if whole:
            names |= {
                name: shard.wrap(names[name]) for name, shard in self._selection.shards.items()
            }
        return names | {name: self._storage.loose[row][at] for name, at in self._loose.items()}

    @torch.no_grad()
    def full_averages(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: int | str | torch.device = "cpu",
        rank: int = 0,
    ) -> dict[str, Tensor] | None:
        """Copies of an average's tensors, whole, in one process: what a ``load_state_dict`` of the
        model that is not sharded takes. Where parameters are sharded all their processes have to
        call it; one tensor is gathered at a time.

        Args:
            name: of an average.
            dtype: of the floating-point tensors, rounded before they are sent; None keeps theirs.
            device: where to.
            rank: of the process that gets them, in the default process group.

        Returns:
            The tensors by name; None in the other processes.

        Raises:
            KeyError: there is no average of that name.
            ValueError: ``rank`` does not hold a piece.
            RuntimeError: another process failed.
        """
        if name not in self._rules:
            raise KeyError(f"name: expected one of {', '.join(self._rules)}, found {name!r}")
        self._raise_if_nonfinite(wait=True)
        with self._storage.lock:
            tensors = self._by_name(list(self._rules), whole=False)[name]
            return sharding.gather(
                tensors, self._selection.shards, dtype, torch.empty(0, device=device).device, rank
            )

    @property
    def n_averaged(self) -> dict[str, int]:
        """Updates that each average has seen. Waits for the device."""
        self._storage.settle()
        return dict(zip(self._rules, self._counts[0].tolist(), strict=False))

    @property
    def skipped_updates(self) -> int:
        """Updates skipped by ``on_nonfinite``. Waits for the device."""
        self._storage.settle()
        return max(int(part.engine.skipped) for part in self._storage.parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs: rules with their warm-ups, counters (which
        are also the position in the random numbers), seed, and the averages themselves.

        Only plain values and tensors, so that ``torch.load(weights_only=True)`` reads it. The
        tensors are the averages, not copies: to keep a state in memory while averaging goes on,
        ``copy.deepcopy`` it. Within :meth:`applied` the applied average is a copy. Those of sharded
        parameters are DTensors, which ``torch.distributed.checkpoint`` saves, loads and reshards:
        ``dcp.save({"averager": averager})``.
        """
        self._raise_if_nonfinite(wait=True)
        cadence = self._settled_cadence()
        return {
            "format": FORMAT,
            "rules": {name: describe_rule(rule) for name, rule in self._rules.items()},
            "n_averaged": self.n_averaged,
            "rounding": self._rounding,
            "seed": self._seed,
            "skipped_updates": self.skipped_updates,
            "averages": dict(self._by_name(row_names(self._rules))),
            **({} if cadence is None else {"cadence": cadence.describe()}),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> Differences:
        """Continues from a :meth:`state_dict` of an averager with the same rules and tensors.

        Args:
            state_dict: what was saved. For a sharded parameter it may hold a DTensor sharded in the
                same way, or the whole tensor, of which each process takes its piece.
            strict: False goes on by this averager's rules, rounding and seed whatever the state's
                were, converts between floating-point types, leaves averages that the state does not
                hold as they are, and ignores averages that this averager does not have. The tensors
                have to be the same all the same.

        Returns:
            The differences of the two, none if strict.

        Raises:
            RuntimeError: an average is applied at the moment.
            ValueError: it does not fit; all differences are named, and nothing is changed.
        """
        with self._storage.lock:
            self._refuse_if_applied("load_state_dict")
            rules = {name: describe_rule(rule) for name, rule in self._rules.items()}
            settings: dict[str, Any] = {"rules": rules, "rounding": self._rounding}
            if self._rounding == "stochastic":
                settings["seed"] = self._seed
            cadence = self._settled_cadence()
            if cadence is not None:
                settings["cadence"] = {"every": cadence.every, "start": cadence.start}
            own = self._by_name(row_names(self._rules), whole=False)
            loaded = read_state(
                state_dict, own, settings, strict=strict, shards=self._selection.shards
            )
            self._write(loaded.pairs, loaded.counts, loaded.skipped, loaded.calls)
        return loaded.differences

    @torch.no_grad()
    def load_average(
        self,
        name: str,
        weights: Mapping[str, Tensor] | Sequence[Tensor],
        *,
        n_averaged: int | None = None,
    ) -> None:
        """Starts an average from weights of another library: a state dict of its averaged model, of
        an ``AveragedModel``, or a list of its averaged parameters in the model's order.

        Args:
            name: of the average.
            weights: by their names in the model, with ``module.`` before all of them or without; or
                a list with one tensor for each that is averaged. Buffers may be missing.
            n_averaged: updates that went into them; None takes the state dict's ``n_averaged``, or
                1 for an average that is exponential.

        Raises:
            KeyError: there is no average of that name.
            RuntimeError: an average is applied at the moment.
            ValueError: the weights do not fit, or the count is missing or negative; nothing is
                changed.
        """
        if name not in self._rules:
            raise KeyError(f"name: expected one of {', '.join(self._rules)}, found {name!r}")
        with self._storage.lock:
            self._refuse_if_applied("load_average")
            self._settled_cadence()
            own = self._by_name(list(self._rules), whole=False)[name]
            slots = self._storage.slots
            averaged = [n for n, at in self._aliases.items() if slots[at].averaged]
            pairs, found = read_weights(weights, own, averaged, self._selection.shards)
            count = found if n_averaged is None else n_averaged
            if count is None and isinstance(self._rules[name], EMA):
                count = 1
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"n_averaged: expected the number of updates, found {count!r}")
            self._write(pairs, {name: count}, None)

    def _settled_cadence(self) -> Cadence | None:
        if self._cadence is not None:
            self._cadence.settle(self._tried)
        return self._cadence

    def _write(
        self,
        pairs: list[tuple[Tensor, Tensor]],
        counts: dict[str, int],
        skipped: int | None,
        calls: int | None = None,
    ) -> None:
        """All of it or, where it is interrupted, nothing."""
        parts = self._storage.parts
        counters = [part.engine.n_averaged for part in parts]
        if skipped is not None:
            counters += [part.engine.skipped for part in parts]
        written = [*(own for own, _ in pairs), *counters]
        before = [tensor.detach().clone() for tensor in written]
        calls_before = None if self._cadence is None else self._cadence.calls
        new = []
        for count in counters[: len(parts)]:
            values = count.tolist()
            for row, name in enumerate(row_names(self._rules)):
                values[row] = counts.get(name, values[row])
            new.append(torch.tensor(values, dtype=torch.int64, device="cpu"))
        self._known_updated.clear()
        self._calls = None
        try:
            for own, value in pairs:
                own.copy_(value)
            for count, of_count in zip(counters, new, strict=False):
                count.copy_(of_count)
            if skipped is not None:
                for part, seen in zip(parts, self._seen, strict=True):
                    part.engine.skipped.fill_(skipped)
                    seen.fill_(skipped)
                self._reported = skipped
            if calls is not None and self._cadence is not None:
                self._cadence.calls = calls
        except BaseException:
            if calls_before is not None and self._cadence is not None:
                self._cadence.calls = calls_before
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
            raise


class _ByName(dict[str, dict[str, Tensor]]):
    """Averages by name. Pickled as a type that ``torch.load(weights_only=True)`` allows."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __missing__(self, name: object) -> dict[str, Tensor]:
        raise KeyError(f"averages: expected one of {', '.join(self)}, found {name!r}")
