"""Walking, naming and matching the tensors of modules."""

from __future__ import annotations

import copy
import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import sharding

__all__ = [
    "Filter",
    "Selection",
    "apart",
    "check_kind",
    "copied",
    "inner",
    "is_loose",
    "match_modules",
    "state_tensors",
    "warn_of_packed",
]

_log = logging.getLogger("swa_fast")

Filter = Callable[[str, Tensor], bool] | str | re.Pattern[str]


def inner(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        # Asked for by type: other wrappers forward the attributes of what they wrap.
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif _is_compiled(model):
            compiled = model._modules["_orig_mod"]
            assert compiled is not None
            model = compiled
        else:
            return model


def copied(
    model: nn.Module,
    device: int | str | torch.device | None,
    dtype: torch.dtype | None,
    unwrap: bool,
) -> nn.Module:
    """A copy of a model, or of the one inside of wrappers, moved and converted where that is asked
    for."""
    # Also where this is called in inference mode, whose tensors could not be changed later.
    with torch.inference_mode(False), torch.no_grad():
        module = copy.deepcopy(inner(model) if unwrap else model)
        if device is not None:
            module = module.to(device)
        if dtype is not None:
            # Not Module.to(dtype): that would drop the imaginary part of complex tensors.
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return module


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # which nothing compiled comes without
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it is a parameter, in the order and with the names of the model's
    state_dict: tied tensors under each of their names, without non-persistent buffers."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        unsaved = getattr(module, "_non_persistent_buffers_set", ())  # a scripted module has none
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in unsaved:
                yield dot + name, buffer, False


class Selection:
    """Which tensors of a module or a list are averaged. They are found anew at each call, because
    modules change. Which names are chosen and which are left out is decided once, at the first
    call, for each name: a parameter that is frozen for a while stays averaged.

    Args:
        params_or_module: a module; or tensors, or pairs of name and tensor.
        buffers: whether buffers are among them.
        trainable_only: leave out parameters that do not require a gradient.
        filter: a predicate of name and tensor, or a regular expression to be found in the name.
        unwrap: look into DataParallel, DistributedDataParallel or torch.compile.
        copies: choose what ``trainable_only`` and ``filter`` leave out all the same, to be copied.

    Attributes:
        module: whose tensors they are, or None.
        shards: by name, how a process' piece of a DTensor belongs to the whole.
        sharded: the DTensors, as they were found last.
        copied: indices of the last call's tensors that are copied because none of their names is
            to be averaged.
    """

    copied: frozenset[int] = frozenset()
    _copies, _unwrap = False, True
    _left_out: set[str] | frozenset[str] = frozenset()

    def __init__(
        self,
        params_or_module: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        buffers: bool,
        trainable_only: bool,
        filter: Filter | None,
        unwrap: bool,
        copies: bool = False,
    ) -> None:
        self._buffers = buffers
        self._copies, self._unwrap = copies, unwrap
        self._left_out = set()
        self._trainable_only = trainable_only
        self._keeps: Callable[[str, Tensor], object] | None = None
        if isinstance(filter, str | re.Pattern):
            pattern = re.compile(filter)
            self._keeps = lambda name, _: pattern.search(name)
        elif filter is not None:
            self._keeps = filter
        self._decided: dict[str, bool] = {}
        self._look_at(params_or_module)

    def _look_at(
        self, params_or_module: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
    ) -> None:
        self.module: nn.Module | None = None
        self._listed: list[tuple[str, Tensor, bool]] = []
        self.shards: dict[str, sharding.Shard] = {}
        self.sharded: list[Tensor] = []
        self._front = isinstance(params_or_module, sharding.Front)
        self._publish = getattr(params_or_module, "publish", None)
        if isinstance(params_or_module, nn.Module):
            self.module = inner(params_or_module) if self._unwrap else params_or_module
            sharding.check_not_flat(self.module)
        else:
            for i, item in enumerate(params_or_module):
                name, tensor = item if isinstance(item, tuple) else (str(i), item)
                self._listed.append((name, tensor, True))

    def of(
        self, params_or_module: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
    ) -> Selection:
        """The tensors of the same names elsewhere."""
        other = copy.copy(self)
        other._look_at(params_or_module)
        other.shards = self.shards  # what it is compared with
        return other

    def _all(self) -> Iterable[tuple[str, Tensor, bool]]:
        return self._listed if self.module is None else state_tensors(self.module)

    def collect(self) -> tuple[dict[str, int], list[Tensor], list[bool]]:
        """Index of every name, and of every index the tensor, or this process' piece of a DTensor,
        and whether it is a parameter.

        Raises:
            ValueError: two tensors have one name, or a parameter is sharded in another way than
                before.
            TypeError, ValueError: see :meth:`Shard.of`.
            RuntimeError: parameters are gathered for a forward that is running.
        """
        if self.module is not None:
            sharding.reshard(self.module)
        names: dict[str, int] = {}
        tensors: list[Tensor] = []
        is_parameter: list[bool] = []
        index: dict[int, int] = {}
        decided: dict[str, bool] = {}
        shards: dict[str, sharding.Shard] = {}
        sharded: list[Tensor] = []
        for name, tensor, parameter in self._all():
            chosen = self._decided.get(name)
            if chosen is None:
                chosen = self._chooses(name, tensor, parameter)
            decided[name] = chosen
            if not chosen:
                continue
            if name in names:
                raise ValueError(f"params_or_module: found the name {name} twice")
            own = tensor
            if sharding.is_dtensor(tensor):
                shards[name], own = sharding.Shard.of(name, tensor)
            if id(tensor) not in index:
                index[id(tensor)] = len(tensors)
                tensors.append(own)
                is_parameter.append(parameter)
                if own is not tensor:
                    sharded.append(tensor)
            names[name] = index[id(tensor)]
        if self._decided:
            for name in names:
                if shards.get(name) != self.shards.get(name):
                    raise ValueError(
                        f"{name}: expected it sharded as {self.shards.get(name)}, found "
                        f"{shards.get(name)}"
                    )
        self._decided = self._decided or decided
        self.shards, self.sharded = shards, sharded
        averaged = {at for name, at in names.items() if name not in self._left_out}
        self.copied = frozenset(range(len(tensors))) - averaged
        return names, tensors, is_parameter

    def reshard(self, force: bool = False) -> None:
        """Makes sure that what is written to the pieces of sharded parameters will be seen.

        Args:
            force: also in the middle of a forward, which has failed.

        Raises:
            RuntimeError: that cannot be done.
        """
        if not self.shards:
            return  # asked at every block and blend: a walk over many modules takes as long as they
        reason = sharding.out_of_reach(self.module, self.shards)
        if reason is not None:
            raise RuntimeError(f"FSDP may go on with parameters that it has gathered, and {reason}")
        if self.module is not None:
            sharding.reshard(self.module, force)

    def publish(self) -> None:
        """What was written to pieces reaches the forward."""
        if self._publish is not None:
            self._publish()

    def check_nonfinite(self, on_nonfinite: str | None) -> None:
        """Refuses what each process would decide by its own pieces.

        Raises:
            ValueError: tensors are sharded, and an update may be skipped.
        """
        if on_nonfinite is not None and (self.shards or self._front):
            raise ValueError(
                f"on_nonfinite: expected None for sharded parameters, found {on_nonfinite!r}: one "
                "process would skip what the others do; let a GradScaler skip the step, see attach"
            )

    def check_whole(self, what: str) -> None:
        """Refuses parameters of which this process has a piece.

        Raises:
            TypeError: there are some.
        """
        if self.shards or self._front:
            raise TypeError(f"{what}: expected whole parameters, found sharded ones")

    def not_chosen(self) -> Iterator[tuple[str, Tensor]]:
        """The other tensors of the module, buffers that are not saved among them."""
        if self.module is not None:
            chosen = {id(tensor) for name, tensor, _ in self._all() if self._decided.get(name)}
            named = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
            yield from ((name, tensor) for name, tensor in named if id(tensor) not in chosen)

    def agree(self, fine: bool) -> bool:
        """Whether all processes that hold pieces are fine: collective where there are pieces."""
        return sharding.agree(self.shards, fine) if self.shards else fine

    def _chooses(self, name: str, tensor: Tensor, parameter: bool) -> bool:
        if not parameter and not self._buffers:
            return False
        frozen = parameter and self._trainable_only and not tensor.requires_grad
        if not frozen and (self._keeps is None or self._keeps(name, tensor)):
            return True
        if self._copies:
            self._left_out = {*self._left_out, name}
        return self._copies

    def left_out_buffers(self) -> dict[str, Tensor]:
        """The buffers of the model that are not averaged, by name."""
        if all(self._decided.values()):
            return {}
        return {
            name: tensor
            for name, tensor, parameter in self._all()
            if not parameter and not self._decided.get(name)
        }

    def __getstate__(self) -> dict[str, Any]:
        # A predicate may be local to a function; what it has chosen stays chosen.
        if self._publish is not None:
            raise TypeError(
                "an Averager of pieces that FSDP1 or DeepSpeed hold cannot be copied or pickled; "
                "save its state_dict"
            )
        return {**self.__dict__, "_keeps": None}

    def what_leaves_nothing(self) -> tuple[str, str]:
        """Which argument leaves no tensor to average, and of how many."""
        named = list(self._all())
        if not named:
            return "params_or_module", ""
        trains = any(tensor.requires_grad for _, tensor, parameter in named if parameter)
        if trains or not self._trainable_only:
            if self._keeps is not None:
                return "filter", f" among {len(named)} (the first is {named[0][0]!r})"
            return "buffers='skip'", f" among {len(named)}, which are all buffers"
        return "trainable_only", f" among {len(named)}, none of which requires a gradient"


def is_loose(tensor: Tensor) -> bool:
    """Sparse, quantised or nested: torch can copy it, but it has no memory that could be read by
    address."""
    return tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized


def apart(items: Sequence[Any], loose: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Items that are not loose, and those that are."""
    pairs = list(zip(items, loose, strict=True))
    return [item for item, is_it in pairs if not is_it], [item for item, is_it in pairs if is_it]


def warn_of_packed(who: str, module: nn.Module) -> None:
    """Says that the weights of torch.ao's quantised modules, which are no tensors of theirs, are
    not averaged."""
    found = [
        name
        for name, child in module.named_modules()
        if type(child).__module__.startswith("torch.ao.nn.quantized")
        and (hasattr(child, "_packed_params") or hasattr(child, "_all_weight_values"))
        and not name.endswith("_packed_params")  # a module of its own in some
    ]
    if found:
        _log.warning(
            "%s: %s is a quantised module, whose packed weights are not averaged%s",
            who,
            found[0] or "the model",
            f" ({len(found)} in all)" if len(found) > 1 else "",
        )


def check_kind(name: str, tensor: object) -> None:
    """Refuses what has no memory of its own to be averaged.

    Raises:
        TypeError: no plain strided tensor.
        ValueError: a tensor without values.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if (reason := sharding.why_partitioned(tensor)) is not None:
        raise TypeError(f"{name}: {reason}")
    if is_lazy(tensor):
        raise ValueError(f"{name}: not initialised yet; run a forward of the model first")
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{name}: found a {type(tensor).__name__}, expected a plain tensor"
            + ("; Averager takes sharded models" if sharding.is_dtensor(tensor) else "")
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: found layout {tensor.layout}, expected torch.strided")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: it is on the meta device and has no values")
    if tensor.is_quantized:
        raise TypeError(f"{name}: found a quantised tensor, expected a plain one")
    if tensor.numel() > 0:
        try:
            address, held = tensor.data_ptr(), tensor.untyped_storage().nbytes()
        except RuntimeError:  # of a tensor subclass, or within a transformation such as vmap
            address = held = 0
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        end = (tensor.storage_offset() + last + 1) * tensor.element_size()
        if address == 0 or end > held:
            raise ValueError(
                f"{name}: its {type(tensor).__name__} of shape {tuple(tensor.shape)} needs {end} "
                f"bytes of memory, of which it has {held}"
            )


def _strip_wrappers(name: str) -> str:
    """``name`` without what wrappers put into it: ``module.`` in front (DataParallel and
    DistributedDataParallel), ``_orig_mod.`` anywhere (torch.compile, also of a submodule)."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def match(
    kind: str, averages: Iterable[tuple[str, Tensor]], model: Iterable[tuple[str, Tensor]]
) -> tuple[list[Tensor], list[str]]:
    """Finds the tensor of a model for each tensor of its average, by name.

    Args:
        kind: "parameter" or "buffer", for messages.
        averages: named tensors of the average, each tensor once.
        model: named tensors of the model, tied ones under each of their names.

    Returns:
        The model's tensors in the order of the average's, and what does not fit, a line each.
    """
    pairs, named = list(averages), list(model)
    sources = dict(named)
    if not all(name in sources for name, _ in pairs):
        stripped = [(_strip_wrappers(name), tensor) for name, tensor in named]
        # A child may be called as a wrapper is: names that would become one stay apart.
        if len(dict(stripped)) == len(sources):
            pairs = [(_strip_wrappers(name), tensor) for name, tensor in pairs]
            named, sources = stripped, dict(stripped)

    found, problems = [], []
    unused = {id(tensor): name for name, tensor in reversed(named)}
    for name, average in pairs:
        source = sources.get(name)
        if source is None:
            problems.append(f"{kind} {name}: in the average, not in the model")
            continue
        unused.pop(id(source), None)
        if source.shape != average.shape:
            problems.append(
                f"{kind} {name}: shape {tuple(average.shape)} in the average, "
                f"{tuple(source.shape)} in the model"
            )
            continue
        found.append(source)
    problems += [f"{kind} {name}: in the model, not in the average" for name in unused.values()]
    return found, problems


def match_modules(average: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[str]]:
    """The model's parameters and buffers in the order of the average's, and what does not fit."""
    parameters, problems = match(
        "parameter",
        average.named_parameters(),
        model.named_parameters(remove_duplicate=False),
    )
    buffers, more = match(
        "buffer",
        average.named_buffers(),
        model.named_buffers(remove_duplicate=False),
    )
    return parameters + buffers, problems + more
