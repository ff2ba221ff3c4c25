"""Re-estimation of BatchNorm statistics for averaged weights."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module_globals
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import swa_utils
from torch.overrides import TorchFunctionMode

from . import _backends, _ops
from .averaging import AveragedModel, _inner

__all__ = ["BNReport", "update_bn"]

Call = Callable[[nn.Module, Any], Any]

_ESTIMATORS = ("torch", "weighted", "pooled")
# Rows of the accumulators, see _ops.batch_norm_merge_.
_VALUES, _SAMPLES, _BATCHES, _MEAN, _SPREAD, _MEAN_MEAN, _MEAN_M2, _VAR_MEAN, _VAR_M2 = range(9)
# A standard error estimated from fewer batches is itself off by half and more.
_MIN_BATCHES = 4
# Batches that run in full before the forward is cut off behind the last layer.
_FULL_BATCHES = 2

_log = logging.getLogger("swa_fast")


@dataclass(frozen=True)
class BNReport:
    """What :func:`update_bn` did. With ``group`` the numbers are those of all ranks together.

    Attributes:
        estimator: ``torch``, ``weighted`` or ``pooled``.
        backend: what computed the statistics; several names for a model on several devices.
        batches: batches read, K.
        samples: sum of the batches' sizes (dimension 0 of a batch's first tensor).
        layers: names of the layers whose statistics were written, as in
            ``model.named_modules()`` of the model without its wrappers.
        unused: names of layers that no forward came by; their statistics are as before.
        frozen: names of layers in eval mode inside a model in training mode; as before, too.
        mean_error: standard error of the mean, relative to the standard deviation, of the worst
            channel; None below two batches.
        var_error: standard error of the variance, relative to the variance, of the worst channel;
            None below two batches.
        converged: whether both errors are within the tolerance; None if none was asked for.
        seconds: time of the pass, loader included.
    """

    estimator: str
    backend: str
    batches: int
    samples: int
    layers: tuple[str, ...]
    unused: tuple[str, ...]
    frozen: tuple[str, ...]
    mean_error: float | None
    var_error: float | None
    converged: bool | None
    seconds: float

    def __str__(self) -> str:
        if not (self.layers or self.unused or self.frozen):
            return "update_bn: the model has no BatchNorm layers with running statistics"
        parts = [
            f"update_bn: {len(self.layers)} layers from {self.samples} samples in "
            f"{self.batches} batches, {self.seconds:.3g} s",
            f"estimator {self.estimator}, backend {self.backend}",
        ]
        if self.mean_error is not None and self.var_error is not None:
            reached = {None: "", True: ", within the tolerance", False: ", above the tolerance"}
            parts.append(
                f"largest standard error: mean {self.mean_error:.2g} standard deviations, "
                f"variance {self.var_error:.2g} of it{reached[self.converged]}"
            )
        for what, names in (("unused", self.unused), ("frozen", self.frozen)):
            if names:
                parts.append(f"{what}: {', '.join(names)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`update_bn`, checked."""

    device: torch.device | None = None
    estimator: str = "torch"
    unbiased: bool = True
    max_batches: int | None = None
    tolerance: float | None = None
    call: Call | None = None
    group: dist.ProcessGroup | None = None
    progress: bool = False
    backend: str | None = None
    channels_last: bool = False
    # For precise_bn: the whole batch is the model's input, and modes are left as they are.
    whole_batch: bool = False
    switch_mode: bool = True


# ------------------------------------------------------------------------------------- batches


def _move(item: Any, device: torch.device | None, channels_last: bool) -> Any:
    """A batch's tensors on ``device``, whatever they are nested in; images on the CPU, with
    ``channels_last``, in that memory format."""
    if isinstance(item, Tensor):
        if device is not None:
            # A copy to the CPU has to be waited for; nobody here reads any other on the host.
            item = item.to(device, non_blocking=device.type != "cpu")
        if channels_last and item.device.type == "cpu" and item.dim() == 4:
            item = item.contiguous(memory_format=torch.channels_last)
        return item
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_move(value, device, channels_last) for value in item))
    if isinstance(item, list | tuple):
        return type(item)(_move(value, device, channels_last) for value in item)
    if isinstance(item, dict):
        moved = {key: _move(value, device, channels_last) for key, value in item.items()}
        return moved if type(item) is dict else _like(item, moved)
    if device is not None and callable(getattr(item, "to", None)):
        return item.to(device)
    return item


def _like(original: dict[Any, Any], values: dict[Any, Any]) -> dict[Any, Any]:
    copy = original.copy()
    copy.update(values)
    return copy


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _tensors(value)
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)


def _describe(item: Any) -> str:
    if isinstance(item, Mapping) and item:
        kinds = sorted({type(value).__name__ for value in item.values()})
        return f"a {type(item).__name__} of {', '.join(kinds)}"
    if isinstance(item, list | tuple) and item:
        kinds = sorted({type(value).__name__ for value in item})
        return f"a {type(item).__name__} of {', '.join(kinds)}"
    if isinstance(item, list | tuple | Mapping):
        return f"an empty {type(item).__name__}"
    return type(item).__name__


# ------------------------------------------------------------------------------ model and layers


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside AveragedModel, torch.compile, DataParallel, DistributedDataParallel."""
    while True:
        inner = _inner(model)
        forward = type(inner).forward
        if forward is AveragedModel.forward or forward is swa_utils.AveragedModel.forward:
            assert isinstance(inner.module, nn.Module)
            inner = inner.module
        if inner is model:
            return model
        model = inner


def _has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())


def _has_hooks(modules: Iterable[nn.Module]) -> bool:
    return bool(
        _module_globals._global_forward_hooks or _module_globals._global_forward_pre_hooks
    ) or any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _gathers_weights(modules: Iterable[nn.Module]) -> bool:
    """Whether forwards leave something undone when an exception ends them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in modules
    )


def _synchronises(layer: _BatchNorm) -> bool:
    """Whether the layer's own forward normalises by a batch that several ranks share."""
    return (
        isinstance(layer, nn.SyncBatchNorm)
        and layer.running_mean is not None
        and layer.running_mean.device.type != "cpu"
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(layer.process_group) > 1
    )


class _Layer:
    """A BatchNorm layer in the pass, and its place in the statistics of its device."""

    def __init__(self, name: str, module: _BatchNorm, index: int) -> None:
        self.name = name or "(the model itself)"
        self.module = module
        self.index = index
        assert module.running_mean is not None
        self.channels = module.running_mean.numel()
        self.synchronises = _synchronises(module)
        # A subclass's forward may do more than BatchNorm (an activation, say), so it is run.
        self.own_forward = (
            self.synchronises
            or "forward" in module.__dict__
            or type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        )
        self.uses = 0  # in this forward
        self.order: float = math.inf  # among all layers in the first forward that used it
        self.statistics: _Statistics
        self.place: int  # among the layers on its device
        self.start: int  # of its channels in flat storage
        self.tickets: Tensor


class _Statistics:
    """Accumulators of all layers on one device, one after the other in flat storage."""

    def __init__(
        self, layers: Sequence[_Layer], device: torch.device, estimator: str, backend: str | None
    ) -> None:
        self.layers = layers
        self.device = device
        self.estimator = estimator
        self.backend = _backends.choose_backend(device, backend)
        start = 0
        for place, layer in enumerate(layers):
            layer.statistics = self
            layer.place = place
            layer.start = start
            start += layer.channels
        self.channels = start
        self.accumulators = torch.zeros(9, start, dtype=torch.float64, device=device)
        tickets = self.split(_ops.batch_norm_tickets(device, start))
        for layer in layers:
            layer.tickets = tickets[layer.place]
        # One for each time that a layer is used in one forward, so that nothing is merged before
        # the forward has come to its end.
        self.batches: list[Tensor] = []
        self.parts: list[Sequence[Tensor]] = []  # the same, by layer
        self.used = 0

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """The layers' parts, in their order. One call: a view takes as long as a small kernel."""
        sizes = [layer.channels for layer in self.layers]
        parts: Sequence[Tensor] = flat.split(sizes, dim=-1)
        return parts

    def batch(self, layer: _Layer) -> Tensor:
        """Where the layer's next use in this forward puts its statistics."""
        use = layer.uses
        if use == len(self.batches):
            flat = torch.zeros(4, self.channels, dtype=torch.float64, device=self.device)
            self.batches.append(flat)
            self.parts.append(self.split(flat))
        layer.uses = use + 1
        if use >= self.used:
            self.used = use + 1
        return self.parts[use][layer.place]

    def merge(self) -> None:
        for batch in self.batches[: self.used]:
            _ops.batch_norm_merge_(self.accumulators, batch, self.estimator, backend=self.backend)
        self.used = 0

    def discard(self) -> None:
        for batch in self.batches[: self.used]:
            batch[_VALUES].zero_()
        self.used = 0


def _variance(accumulators: Tensor, estimator: str, unbiased: bool) -> Tensor:
    if estimator != "pooled":
        return accumulators[_SPREAD]
    values = accumulators[_VALUES]
    return accumulators[_SPREAD] / (values - 1 if unbiased else values)


def _errors(accumulators: Tensor, estimator: str, eps: Tensor | float) -> Tensor:
    """[2]: the largest relative standard errors of mean and variance over the channels, NaN if any
    statistic is not finite. Channels seen in fewer than two batches are infinitely uncertain,
    those in none do not count."""
    batches = accumulators[_BATCHES]
    # As in the layer's own denominator: a dead channel's error matters to nobody.
    variance = _variance(accumulators, estimator, unbiased=False) + eps
    scale = (batches * (batches - 1)).clamp(min=0).reciprocal()
    errors = torch.stack([accumulators[_MEAN_M2], accumulators[_VAR_M2]])
    errors = (errors * scale).sqrt()
    errors = errors / torch.stack([variance.sqrt(), variance])
    errors = torch.where(batches == 1, math.inf, errors)
    errors = torch.where(batches == 0, 0.0, errors)
    return errors.amax(1)


# ------------------------------------------------------------------------------------ ReLU fusion

_RELU_IN_PLACE = frozenset({torch.relu_, F.relu_, Tensor.relu_})
_RELU = frozenset({F.relu, torch.relu, Tensor.relu}) | _RELU_IN_PLACE
# What an output tells about itself is the same before and after a ReLU.
_METADATA = frozenset(
    {
        Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.is_contiguous,
        Tensor.is_floating_point, Tensor.element_size,
        *(getattr(Tensor, name).__get__ for name in (
            "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu",
        )),
    }
)  # fmt: skip


class _Output:
    """Who has used the output of one BatchNorm call."""

    def __init__(self, key: tuple[int, int], fused: bool) -> None:
        self.key = key
        self.fused = fused
        self.relus = 0
        self.others = 0

    @property
    def only_relu(self) -> bool:
        return self.relus == 1 and self.others == 0


_SEQUENCES = (list, tuple)


def _tracked(arguments: Iterable[Any]) -> list[_Output]:
    # For every torch function in the pass, so it is quick about what it mostly sees: tensors that
    # are nobody's output, numbers, and the strides and paddings of convolutions.
    found: list[_Output] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            output = getattr(argument, "_swa_fast_output", None)
            if output is not None:
                found.append(output)
        elif isinstance(argument, _SEQUENCES):
            for item in argument:
                if type(item) is not int:
                    found += _tracked(argument)
                    break
        elif isinstance(argument, dict):
            found += _tracked(argument.values())
    return found


class _Consumers(TorchFunctionMode):
    """Sees every torch function that is handed the output of a BatchNorm layer, and answers a ReLU
    of an output that has been clamped already with that output."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if func in _METADATA:
            return func(*args, **kwargs)
        outputs = [*_tracked(args), *_tracked(kwargs.values())] if kwargs else _tracked(args)
        if not outputs:
            return func(*args, **kwargs)
        x = args[0] if args else None
        if func not in _RELU or getattr(x, "_swa_fast_output", None) is not outputs[0]:
            for output in outputs:
                output.others += 1
            return func(*args, **kwargs)
        assert isinstance(x, Tensor)
        (output,) = outputs
        output.relus += 1
        in_place = func in _RELU_IN_PLACE or (
            func is F.relu and bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
        )
        if in_place:
            # What comes after this sees the ReLU's result, as it would without fusion.
            del x._swa_fast_output  # type: ignore[attr-defined]
        if not output.fused:
            return func(*args, **kwargs)
        return x if in_place else x.detach()


# ------------------------------------------------------------------------------------------- pass


class _Stop(BaseException):
    """Leaves a forward whose last statistics have been taken. Not an Exception, because models
    catch those."""


class _Pass:
    """Runs forwards and collects the statistics of ``layers``."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        layers: Sequence[_Layer],
        options: _Options,
    ) -> None:
        self.model = model
        self.layers = layers
        self.estimator = options.estimator
        self.call = options.call
        by_device: dict[torch.device, list[_Layer]] = {}
        for layer in layers:
            assert layer.module.running_mean is not None
            by_device.setdefault(layer.module.running_mean.device, []).append(layer)
        self.statistics = [
            _Statistics(members, device, options.estimator, options.backend)
            for device, members in by_device.items()
        ]
        self.batches = 0
        self.samples = 0
        # The calls (layer, how often before in this forward) of the first batch, and of this one.
        self.sequence: list[tuple[int, int]] | None = None
        self.calls: list[tuple[int, int]] = []
        self.rows = 0
        plain = not _has_hooks(modules)
        self.may_fuse = plain
        self.fused: frozenset[tuple[int, int]] = frozenset()
        self.outputs: list[_Output] = []
        self.may_stop = plain and options.call is None and not _gathers_weights(modules)
        self.stopping = False  # the exception is on its way

    # ---- replaced forwards

    @contextlib.contextmanager
    def replaced_forwards(self) -> Iterator[None]:
        with contextlib.ExitStack() as restore:
            for layer in self.layers:
                attributes = layer.module.__dict__
                if "forward" in attributes:
                    restore.callback(attributes.__setitem__, "forward", attributes["forward"])
                else:
                    restore.callback(attributes.pop, "forward", None)
                if layer.own_forward:
                    attributes["forward"] = self._around(layer, layer.module.forward)
                    self._lend_buffers(layer.module, restore)
                else:
                    attributes["forward"] = self._instead(layer)
            yield

    @staticmethod
    def _lend_buffers(module: _BatchNorm, restore: contextlib.ExitStack) -> None:
        """With momentum 1 and buffers of its own, a layer's forward leaves its batch's statistics
        in them."""
        restore.callback(setattr, module, "momentum", module.momentum)
        restore.callback(module._buffers.update, dict(module._buffers))
        module.momentum = 1.0
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = buffer.clone()

    def _begin_call(self, layer: _Layer, x: Any) -> tuple[Tensor, bool]:
        """Checks the input; where its statistics go, and whether they are the last ones."""
        if not isinstance(x, Tensor):
            raise TypeError(f"layer {layer.name}: expected a tensor, found {type(x).__name__}")
        if x.dim() < 2 or x.shape[1] != layer.channels:
            raise ValueError(
                f"layer {layer.name}: expected [N, {layer.channels}, ...], found {tuple(x.shape)}"
            )
        values = x.numel() // layer.channels
        if values < (1 if self.estimator == "pooled" else 2):
            raise ValueError(
                f"layer {layer.name}: expected more than 1 value per channel, found input of shape "
                f"{tuple(x.shape)} in batch {self.batches}; leave out the last batch "
                "(drop_last=True) or use another batch size"
            )
        self.rows = self.rows or x.shape[0]
        layer.order = min(layer.order, len(self.calls))
        self.calls.append((layer.index, layer.uses))
        last = self.may_stop and self._nothing_follows()
        return layer.statistics.batch(layer), last

    def _instead(self, layer: _Layer) -> Callable[[Tensor], Tensor]:
        module = layer.module
        tickets = layer.tickets
        collect = getattr(torch.ops.swa_fast.batch_norm_collect, layer.statistics.backend)
        # The arguments whose check was passed last. Host time counts: on a GPU it is what a batch
        # of small layers takes.
        dtype: torch.dtype | None = None
        device: torch.device | None = None
        weight: Tensor | None = None
        bias: Tensor | None = None

        def forward(input: Tensor) -> Tensor:
            nonlocal dtype, device, weight, bias
            # Models and calls may turn the gradients on again.
            with torch._C.DisableTorchFunction(), torch.no_grad():
                module._check_input_dim(input)
                batch, last = self._begin_call(layer, input)
                if (
                    input.dtype is not dtype
                    or input.device != device
                    or module.weight is not weight
                    or module.bias is not bias
                    or input.layout is not torch.strided
                ):
                    _ops.check_batch_norm_collect(input, module.weight, module.bias, batch, tickets)
                    dtype, device = input.dtype, input.device
                    weight, bias = module.weight, module.bias
                key = self.calls[-1]
                fused = key in self.fused
                y = collect(
                    input if _ops.is_dense(input) else input.contiguous(),
                    weight if weight is None else weight.contiguous(),
                    bias if bias is None else bias.contiguous(),
                    module.eps,
                    fused,
                    not last,
                    batch,
                    tickets,
                )
                if last:
                    self.stopping = True
                    raise _Stop
                if self.may_fuse:
                    output = _Output(key, fused)
                    self.outputs.append(output)
                    y._swa_fast_output = output
                assert isinstance(y, Tensor)
                return y

        return forward

    def _around(self, layer: _Layer, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        module = layer.module

        def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with torch._C.DisableTorchFunction():
                batch, last = self._begin_call(layer, input)
            y = own(input, *args, **kwargs)
            with torch._C.DisableTorchFunction():
                if layer.synchronises and self.estimator == "pooled":
                    # The forward's statistics are those of all ranks' batches together.
                    _ops.batch_norm_collect(
                        input,
                        None,
                        None,
                        module.eps,
                        batch,
                        normalise=False,
                        tickets=layer.tickets,
                        backend=layer.statistics.backend,
                    )
                else:
                    values = input.numel() // layer.channels
                    batch[_VALUES].fill_(values)
                    batch[1].fill_(input.shape[0])
                    assert module.running_mean is not None and module.running_var is not None
                    batch[2].copy_(module.running_mean)
                    batch[3].copy_(module.running_var).mul_(values - 1)
            if last:
                self.stopping = True
                raise _Stop
            return y

        return forward

    # ---- forwards

    def _nothing_follows(self) -> bool:
        """Whether the call that has just begun is the last one that has to be computed.

        Only if the first forwards, which ran in full, and this one made the same calls, and each
        layer exactly one: then all that could follow are layers that have had their turn.
        """
        return (
            self.batches >= _FULL_BATCHES
            and self.sequence is not None
            and len(self.calls) == len(self.sequence) == len(self.layers)
            and self.calls == self.sequence
            and all(use == 0 for _, use in self.sequence)
        )

    def _begin(self) -> None:
        self.calls = []
        self.outputs = []
        self.rows = 0
        self.stopping = False
        for layer in self.layers:
            layer.uses = 0

    def _discard(self) -> None:
        for statistics in self.statistics:
            statistics.discard()

    def forward(self, batch: Any) -> None:
        """One batch's forward and the merge of its statistics.

        Repeated without early stop, or without fusion, if the model turns out not to bear it: no
        statistics have been merged then.
        """
        while True:
            self._begin()
            stopped = False
            try:
                with _Consumers() if self.may_fuse else contextlib.nullcontext():
                    if self.call is None:
                        self.model(batch)
                    else:
                        self.call(self.model, batch)
            except _Stop:
                stopped = True
            except Exception:
                self._discard()
                if not self.stopping:
                    raise
            if self.stopping and not stopped:  # the model caught it
                self.may_stop = False
                self._discard()
                continue
            wrong = {
                output.key
                for output in self.outputs
                if output.fused
                and not (output.only_relu or (stopped and output.relus + output.others == 0))
            }
            if wrong:
                self.fused -= wrong
                self._discard()
                continue
            break
        if self.sequence is None:
            self.sequence = self.calls
            self.fused = frozenset(output.key for output in self.outputs if output.only_relu)
            self.may_fuse = bool(self.fused)
        elif self.calls != self.sequence:
            self.may_stop = False
        for statistics in self.statistics:
            statistics.merge()
        self.batches += 1


# ----------------------------------------------------------------------- errors and convergence


def _eps(statistics: _Statistics, device: torch.device) -> Tensor | float:
    values = {layer.module.eps for layer in statistics.layers}
    if len(values) == 1:
        return float(values.pop())
    each = [torch.full((layer.channels,), float(layer.module.eps)) for layer in statistics.layers]
    return torch.cat(each).double().to(device, non_blocking=True)


class _Convergence:
    """Compares the standard errors with a tolerance, without waiting for a GPU: there a comparison
    is started behind one batch and its outcome found behind a later one."""

    def __init__(self, statistics: Sequence[_Statistics], tolerance: float) -> None:
        self.statistics = [(s, _eps(s, s.device)) for s in statistics]
        self.tolerance = tolerance
        self.pending: list[tuple[Tensor, torch.Event | None]] = []

    def reached(self) -> bool:
        if not self.pending:
            self.pending = [
                self._start(_errors(s.accumulators, s.estimator, eps)) for s, eps in self.statistics
            ]
        if any(event is not None and not event.query() for _, event in self.pending):
            return False
        errors = [error for found, _ in self.pending for error in found.tolist()]
        self.pending = []
        # What is not finite stays so: the pass may as well end, with the error that this is.
        return any(map(math.isnan, errors)) or max(errors) <= self.tolerance

    @staticmethod
    def _start(errors: Tensor) -> tuple[Tensor, torch.Event | None]:
        if errors.device.type != "cuda":
            return errors, None
        pinned = torch.empty(errors.shape, dtype=errors.dtype, pin_memory=True)
        pinned.copy_(errors, non_blocking=True)
        event = torch.Event(errors.device)
        event.record()
        return pinned, event


def _check_finite(accumulators: Sequence[Tensor], statistics: Sequence[_Statistics]) -> None:
    """
    Args:
        accumulators: one for each of ``statistics``, on the CPU.

    Raises:
        FloatingPointError: a mean or variance is not finite.
    """
    bad = []
    for values, part in zip(accumulators, statistics, strict=True):
        finite = values[_MEAN : _SPREAD + 1].isfinite().all(0)
        if not finite.all():
            each = zip(part.layers, part.split(finite), strict=True)
            bad += [layer for layer, channels in each if not channels.all()]
    if bad:
        first = min(bad, key=lambda layer: layer.order)
        raise FloatingPointError(
            f"layer {first.name}: expected finite activations, found a NaN or an infinity; it is "
            f"the first of {len(bad)} such layers in the order of the forward"
        )


# ------------------------------------------------------------------------------------------ ranks


def _process_group(group: dist.ProcessGroup | bool | None) -> dist.ProcessGroup | None:
    if group is None or group is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: expected an initialised torch.distributed, found none")
    if group is True:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: expected True or a process group of which this process is a member, found "
            f"{group!r}"
        )
    return group


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] on the CPU, from ``values`` of every rank."""
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    mine = values.to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).cpu()


def _agree(
    group: dist.ProcessGroup,
    layers: Sequence[_Layer],
    options: tuple[object, ...],
    problem: Exception | None,
) -> None:
    """Refuses, on all ranks, ranks that could not be merged.

    Raises:
        ValueError: their layers or options differ.
        RuntimeError: another rank has a ``problem``. This rank's own is raised as it is.
    """
    facts = repr(([(layer.name, layer.channels) for layer in layers], options))
    digest = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
    channels = sum(layer.channels for layer in layers)
    mine = torch.tensor([len(layers), channels, digest, problem is not None])
    everyone = _gather(mine, group).tolist()
    if problem is not None:
        raise problem
    failed = [rank for rank, row in enumerate(everyone) if row[3]]
    if failed:
        raise RuntimeError(f"group: rank {failed[0]} cannot take part, see its error")
    if any(row != everyone[0] for row in everyone):
        found = ", ".join(
            f"rank {rank}: {row[0]} layers, {row[1]} channels" for rank, row in enumerate(everyone)
        )
        raise ValueError(
            "group: expected the same BatchNorm layers, estimator and options on every rank, "
            f"found {found}"
            + (
                ""
                if len({tuple(r[:2]) for r in everyone}) > 1
                else ", with other names, sizes or options"
            )
        )


def _merge_ranks(ranks: Sequence[Tensor], estimator: str) -> Tensor:
    """Accumulators of all ranks together, merged in the order of the ranks."""
    merged = ranks[0]
    row = {"torch": _BATCHES, "weighted": _SAMPLES, "pooled": _VALUES}[estimator]
    for other in ranks[1:]:
        counts = merged[: _BATCHES + 1] + other[: _BATCHES + 1]
        share = other[: _BATCHES + 1] / counts.clamp(min=1)
        delta = other - merged
        moved = merged + share[_BATCHES] * delta
        moved[: _BATCHES + 1] = counts
        moved[_MEAN] = merged[_MEAN] + share[row] * delta[_MEAN]
        moved[_SPREAD] = merged[_SPREAD] + share[row] * delta[_SPREAD]
        for mean, m2, weight in (
            (_MEAN_MEAN, _MEAN_M2, _BATCHES),
            (_VAR_MEAN, _VAR_M2, _BATCHES),
            *([(_MEAN, _SPREAD, _VALUES)] if estimator == "pooled" else []),
        ):
            between = delta[mean].square() * merged[weight] * share[weight]
            moved[m2] = merged[m2] + other[m2] + between
        merged = moved
    return merged


# --------------------------------------------------------------------------------------- the pass


@contextlib.contextmanager
def _progress(loader: Iterable[Any], options: _Options) -> Iterator[Callable[[], object]]:
    if not options.progress:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True: tqdm is not installed: `pip install tqdm`") from error
    total = options.max_batches
    # A DataLoader over an iterable data set has a __len__ that raises.
    with contextlib.suppress(TypeError, AttributeError):
        total = len(loader)  # type: ignore[arg-type]
        total = total if options.max_batches is None else min(total, options.max_batches)
    with tqdm(total=total, desc="BatchNorm statistics", unit="batch") as bar:
        yield bar.update


def _select(named: Iterable[tuple[str, nn.Module]]) -> tuple[list[_Layer], tuple[str, ...]]:
    """The layers to re-estimate, and the names of those that are frozen."""
    layers: list[_Layer] = []
    frozen = []
    for name, module in named:
        if not isinstance(module, _BatchNorm) or not module.track_running_stats:
            continue
        if module.running_mean is None or module.running_var is None:
            continue
        if module.training:
            layers.append(_Layer(name, module, len(layers)))
        else:
            frozen.append(name)
    return layers, tuple(frozen)


def _refuse_shared(layers: Sequence[_Layer], options: _Options) -> None:
    """
    Raises:
        ValueError: a layer that normalises by the batches of all ranks cannot be served.
    """
    shared = next((layer for layer in layers if layer.synchronises), None)
    if shared is None:
        return
    if options.estimator != "torch" and options.group is None:
        raise ValueError(
            f"layer {shared.name}: SyncBatchNorm that normalises over several ranks needs group= "
            f"with estimator={options.estimator!r}: a rank alone does not know the others' samples"
        )
    if options.tolerance is not None:
        raise ValueError(
            f"layer {shared.name}: SyncBatchNorm that normalises over several ranks needs the same "
            "number of forwards on each, which tolerance= does not give"
        )


class _Loader:
    """The batches of the pass as the model's inputs."""

    def __init__(self, loader: Iterable[Any], options: _Options) -> None:
        self.iterator = iter(loader)
        self.options = options
        self.channels_last = options.channels_last

    def __iter__(self) -> Iterator[Any]:
        # Not one batch more than is used: a generator would have lost it.
        return itertools.islice(self.iterator, self.options.max_batches)

    def first(self) -> Any:
        """The first batch, which is read again afterwards."""
        batch = next(self.iterator, self)
        if batch is self:
            raise ValueError(_EMPTY)
        self.iterator = itertools.chain([batch], self.iterator)
        return batch

    def input_of(self, batch: Any, index: int) -> Any:
        """What the model, or the user's call, is handed."""
        options = self.options
        item = batch
        if options.call is None and not options.whole_batch and isinstance(batch, list | tuple):
            item = batch[0] if batch else None
        if (
            options.call is None
            and not hasattr(item, "to")
            and not any(True for _ in _tensors(item))
        ):
            raise TypeError(
                "loader: expected batches whose input is a tensor or contains one, found "
                f"{_describe(batch)} in batch {index}"
            )
        return _move(item, options.device, self.channels_last)


_EMPTY = "loader: expected at least one batch, found none"


def _run(collector: _Pass, loader: _Loader, options: _Options, step: Callable[[], object]) -> None:
    """The pass."""
    statistics = collector.statistics
    convergence = None
    if options.tolerance is not None:
        convergence = _Convergence(statistics, options.tolerance)
    # On the CPU a look costs nothing. Ranks find it out together at the end.
    look = options.group is None and all(s.device.type == "cpu" for s in statistics)
    for batch in loader:
        try:
            collector.forward(loader.input_of(batch, collector.batches))
        except RuntimeError:
            if not loader.channels_last:
                raise
            # Models flatten activations by view(), which the other memory format does not allow.
            loader.channels_last = False
            retry = True
        else:
            retry = False
        if retry:
            collector.forward(loader.input_of(batch, collector.batches))
        first = next(_tensors(batch), None)
        collector.samples += collector.rows if first is None or not first.dim() else len(first)
        step()
        if look and not all(
            math.isfinite(s.accumulators[_MEAN : _SPREAD + 1].sum()) for s in statistics
        ):
            _check_finite([s.accumulators for s in statistics], statistics)
        if convergence is not None and collector.batches >= _MIN_BATCHES and convergence.reached():
            break


# Parameters of glibc's mallopt, and what they are in a process that works with large tensors: the
# thresholds are dynamic until they are set, and this is where they end.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LIMITS = ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))


@functools.cache
def _libc() -> str:
    return platform.libc_ver()[0]  # reads the interpreter's file


@contextlib.contextmanager
def _kept_memory(on: bool) -> Iterator[None]:
    """Has glibc's malloc keep what is freed, instead of returning every large block to the system.

    Otherwise each activation is a fresh mapping, and clearing its pages takes as long as computing
    it: half of the time of a PreResNet-164. The memory is returned at the end. Environment
    variables by which the user sets malloc are respected.

    The setting is the process's: mallopt has no narrower one, most of the memory is that of torch's
    own operators, and what was set before cannot be asked for. ``SWA_FAST_KEEP_MEMORY=0`` leaves
    malloc alone.
    """
    keep = os.environ.get("SWA_FAST_KEEP_MEMORY", "1")
    if keep not in ("0", "1"):
        raise ValueError(f"SWA_FAST_KEEP_MEMORY: expected 0 or 1, found {keep!r}")
    chosen = (
        keep == "0"
        or any(name.startswith("MALLOC_") for name in os.environ)
        or ("malloc" in os.environ.get("GLIBC_TUNABLES", ""))
    )
    if not on or chosen or _libc() != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _LIMITS:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _initialise_lazy(model: nn.Module, loader: _Loader, options: _Options) -> None:
    """Gives lazy modules their shapes by a forward of the first batch that estimates nothing."""
    model.eval()
    batch = loader.input_of(loader.first(), 0)
    if options.call is None:
        model(batch)
    else:
        options.call(model, batch)


def _together(
    collector: _Pass, group: dist.ProcessGroup, failed: bool
) -> tuple[list[Tensor], int, int]:
    """Accumulators on the CPU, batches and samples of all ranks, from one collective.

    Raises:
        RuntimeError: another rank has ``failed``.
    """
    # One after the other on the CPU: the ranks may keep their layers on different devices.
    parts = [s.accumulators.cpu().reshape(-1) for s in collector.statistics]
    head = torch.tensor([failed, collector.batches, collector.samples], dtype=torch.float64)
    everyone = _gather(torch.cat([head, *parts]), group)
    broken = [rank for rank, row in enumerate(everyone) if row[0]]
    if broken:
        raise RuntimeError(f"group: update_bn failed on rank {broken[0]}, see its error")
    batches, samples = (int(total) for total in everyone[:, 1:3].sum(0))
    merged = []
    start = len(head)
    for part, s in zip(parts, collector.statistics, strict=True):
        ranks = everyone[:, start : start + len(part)].unflatten(1, (9, s.channels))
        merged.append(_merge_ranks(list(ranks), s.estimator))
        start += len(part)
    return merged, batches, samples


def _write(
    collector: _Pass, accumulators: Sequence[Tensor], used: Sequence[_Layer], options: _Options
) -> None:
    """The result into the layers' buffers."""
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for part, merged in zip(collector.statistics, accumulators, strict=True):
        ours = part.accumulators if options.group is None else merged.to(part.device)
        means = part.split(ours[_MEAN])
        variances = part.split(_variance(ours, part.estimator, options.unbiased))
        batches = part.split(ours[_BATCHES])
        for layer in used:
            if layer.statistics is not part:
                continue
            module = layer.module
            assert module.running_mean is not None and module.running_var is not None
            targets += [module.running_mean, module.running_var]
            values += [means[layer.place], variances[layer.place]]
            if module.num_batches_tracked is not None:
                targets.append(module.num_batches_tracked)
                values.append(batches[layer.place][0])
    # One call, which a KeyboardInterrupt cannot divide.
    torch._foreach_copy_(targets, values)


def _has_lazy_tensors(modules: Iterable[nn.Module]) -> bool:
    return any(
        is_lazy(tensor)
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )


def _prepare(
    loader: Iterable[Any],
    model: nn.Module,
    named: Sequence[tuple[str, nn.Module]],
    options: _Options,
) -> tuple[_Pass | None, tuple[str, ...], _Loader | None]:
    """Modes and layers, agreed upon by all ranks: the pass (None without layers), the frozen layers
    and, if it had to be read, the loader. ``named`` are the model's modules."""
    modules = [module for _, module in named]
    modes = [module.training for module in modules]
    group = options.group
    source = None
    problem: Exception | None = None
    if any(isinstance(module, _BatchNorm) for module in modules) and _has_lazy_tensors(modules):
        if group is None:
            source = _Loader(loader, options)
            _initialise_lazy(model, source, options)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
        else:
            problem = ValueError(
                "group: expected an initialised model, found lazy modules; run a forward of it "
                "first"
            )
    if options.switch_mode and not model.training:
        model.train()
    layers: list[_Layer] = []
    frozen: tuple[str, ...] = ()
    collector = None
    if problem is None:
        try:
            layers, frozen = _select(named)
            _refuse_shared(layers, options)
            collector = _Pass(model, modules, layers, options) if layers else None
        except Exception as error:
            problem = error
    if group is not None:
        _agree(group, layers, (options.estimator, options.unbiased), problem)
    elif problem is not None:
        raise problem
    return collector, frozen, source


def _used(collector: _Pass, accumulators: Sequence[Tensor], options: _Options) -> list[_Layer]:
    """The layers that a forward has come by, in the order of the model.

    Raises:
        ValueError: the variance of one of them is not defined.
    """
    used = []
    for part, merged in zip(collector.statistics, accumulators, strict=True):
        starts = [layer.start for layer in part.layers]
        batches, values = merged[[_BATCHES, _VALUES]][:, starts].tolist()
        for layer, batch_count, value_count in zip(part.layers, batches, values, strict=True):
            if batch_count == 0:
                continue
            if options.unbiased and value_count < 2:
                raise ValueError(
                    f"layer {layer.name}: expected more than 1 value per channel in the whole "
                    "pass, found 1"
                )
            used.append(layer)
    return sorted(used, key=lambda layer: layer.index)


def _reestimate(loader: Iterable[Any], wrapped: nn.Module, options: _Options) -> BNReport:
    started = time.perf_counter()
    model = _unwrap(wrapped)
    # Once: names of a deep model take longer than a small batch.
    named = list(model.named_modules())
    modes = [(module, module.training) for _, module in named]
    group = options.group
    # Compiled code would not see that forwards are replaced. torch._dynamo is long in coming, so it
    # is not imported for models that cannot be compiled.
    eager: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:
        eager = torch.compiler.set_stance("force_eager")
    try:
        with eager:
            collector, frozen, source = _prepare(loader, model, named, options)
            if collector is not None:
                try:
                    batches = source or _Loader(loader, options)
                    on_cpu = any(s.device.type == "cpu" for s in collector.statistics)
                    with (
                        _kept_memory(on_cpu),
                        collector.replaced_forwards(),
                        _progress(loader, options) as step,
                    ):
                        _run(collector, batches, options, step)
                except Exception:
                    if group is not None:
                        # The others wait for this rank.
                        with contextlib.suppress(Exception):
                            _together(collector, group, failed=True)
                    raise
    finally:
        for module, mode in modes:
            module.training = mode
    if collector is None:
        if frozen:
            _log.warning(
                "update_bn: nothing to do: all %d BatchNorm layers are in eval mode inside a model "
                "in training mode, so they count as frozen",
                len(frozen),
            )
        seconds = time.perf_counter() - started
        return BNReport(options.estimator, "", 0, 0, (), (), frozen, None, None, None, seconds)

    statistics = collector.statistics
    if group is None:
        read, samples = collector.batches, collector.samples
        accumulators = [s.accumulators.cpu() for s in statistics]
    else:
        accumulators, read, samples = _together(collector, group, failed=False)
    if read == 0:
        raise ValueError(_EMPTY + ("" if group is None else " on all ranks"))
    _check_finite(accumulators, statistics)
    used = _used(collector, accumulators, options)
    seen = set(used)
    _write(collector, accumulators, used, options)

    errors = [
        _errors(merged, part.estimator, _eps(part, merged.device))
        for part, merged in zip(statistics, accumulators, strict=True)
    ]
    mean_error, var_error = torch.stack(errors).amax(0).tolist()
    converged = None
    if options.tolerance is not None:
        converged = max(mean_error, var_error) <= options.tolerance
    return BNReport(
        estimator=options.estimator,
        backend=", ".join(sorted({s.backend for s in statistics})),
        batches=read,
        samples=samples,
        layers=tuple(layer.name for layer in used),
        unused=tuple(layer.name for layer in collector.layers if layer not in seen),
        frozen=frozen,
        mean_error=mean_error if math.isfinite(mean_error) else None,
        var_error=var_error if math.isfinite(var_error) else None,
        converged=converged,
        seconds=time.perf_counter() - started,
    )


def _checked(
    model: nn.Module,
    device: int | str | torch.device | None,
    estimator: str,
    unbiased: bool,
    max_batches: int | None,
    tolerance: float | None,
    call: Call | None,
    group: dist.ProcessGroup | bool | None,
    progress: bool,
    backend: str | None,
    channels_last: bool | None,
) -> _Options:
    if estimator not in _ESTIMATORS:
        raise ValueError(
            f"estimator: expected one of {', '.join(_ESTIMATORS)}, found {estimator!r}"
        )
    if not unbiased and estimator != "pooled":
        raise ValueError(
            "unbiased=False: expected estimator='pooled', whose variance has both conventions, "
            f"found {estimator!r}, which averages unbiased variances"
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: expected 1 or more, found {max_batches}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number, found {tolerance}")
    if call is not None and not callable(call):
        raise TypeError(f"call: expected a function, found {type(call).__name__}")
    if backend is not None and backend not in _backends.BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(_backends.BACKENDS)}, found {backend!r}"
        )
    if device is not None:
        device = torch.empty(0, device=device).device
    elif any(
        isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        for module in model.modules()
    ):
        # The wrapper would have moved the batch; the pass uses the module inside.
        first = next(itertools.chain(model.parameters(), model.buffers()), None)
        if first is not None and first.device.type != "cpu":
            device = first.device
    if channels_last is None:
        channels_last = _has_convolutions(model)
    return _Options(
        device=device,
        estimator=estimator,
        unbiased=unbiased,
        max_batches=max_batches,
        tolerance=tolerance,
        call=call,
        group=_process_group(group),
        progress=progress,
        backend=backend,
        channels_last=channels_last,
    )


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: int | str | torch.device | None = None,
    *,
    estimator: str = "torch",
    unbiased: bool = True,
    max_batches: int | None = None,
    tolerance: float | None = None,
    call: Call | None = None,
    group: dist.ProcessGroup | bool | None = None,
    progress: bool = False,
    backend: str | None = None,
    channels_last: bool | None = None,
) -> BNReport:
    r"""Replaces the running statistics of every BatchNorm layer by those of one pass over
    ``loader``. Drop-in for ``torch.optim.swa_utils.update_bn``.

    With the batches' sizes :math:`b_k`, numbers of values per channel :math:`m_k`, means
    :math:`\mu_k`, biased variances :math:`\sigma_k^2` and unbiased ones
    :math:`s_k^2 = \sigma_k^2 m_k / (m_k - 1)`, over :math:`K` batches, :math:`N = \sum b_k` and
    :math:`M = \sum m_k`:

    ========  =====================================================================================
    torch     :math:`\mu = \frac1K \sum \mu_k` and :math:`\sigma^2 = \frac1K \sum s_k^2`, what
              torch's function computes: a short last batch weighs as much as a full one
    weighted  :math:`\mu = \sum \frac{b_k}{N} \mu_k` and
              :math:`\sigma^2 = \sum \frac{b_k}{N} s_k^2`, the rule of the SWA paper's authors
    pooled    :math:`\mu = \sum \frac{m_k}{M} \mu_k` and
              :math:`\sigma^2 = \sum \frac{m_k}{M} (\sigma_k^2 + (\mu_k - \mu)^2)`, times
              :math:`M/(M-1)` if ``unbiased``: exactly the statistics of all values together, also
              where the batches' means differ (small batches, data in order)
    ========  =====================================================================================

    As in training each layer normalises by the statistics of its batch. Statistics are merged in
    float64 and written once, at the end.

    **Cost.** A layer reads its input once for the statistics, and is fused with a ReLU that alone
    uses its output. One launch per batch merges all layers. The device is never waited for during
    the pass, and once at its end, to raise on values that are not finite. A forward is left behind
    the last layer where that is safe: neither ``call`` nor a forward hook anywhere in the model nor
    FSDP, each layer is used exactly once in a forward, and the first two batches, which ran in
    full, and this one used the layers in the same order. State that modules behind that layer keep
    by themselves is then not updated. ReLUs are fused as the first batch shows, if no module has a
    forward hook; a later batch that does otherwise is repeated without. Which operations use an
    output is seen for everything that goes through torch functions, but not for extension code
    that is handed tensors without them.

    **The best setting** for the pass is the one of the training: call this inside the same
    ``torch.autocast``. On the CPU, images are handed to models with convolutions in channels-last
    memory format, which is faster, unless the model cannot bear it (or ``channels_last=False``;
    random masks such as dropout's are then drawn in another order). With glibc, malloc keeps large
    blocks for the time of the pass instead of returning them to the system, because clearing fresh
    pages takes as long as the computation; the setting is the whole process's, and afterwards it is
    what glibc arrives at by itself in a process that works with large tensors. A process that sets
    malloc by environment variables, or ``SWA_FAST_KEEP_MEMORY=0``, is left alone. Most of a pass
    over a large data set is spent on precision that nobody needs: see ``tolerance``.

    **Modes.** A model in eval mode is put into training mode. A model in training mode is left as
    it is, submodules in eval mode included. BatchNorm layers that are in eval mode then are frozen:
    they keep their statistics and normalise by them. Modes are those of the model inside
    AveragedModel, ``torch.compile``, DataParallel and DistributedDataParallel, and the pass calls
    that model, uncompiled. All modes are restored.

    **Layers.** Without running statistics: left alone. Used several times in a forward: each use
    counts as a batch, as for torch. Not used: statistics stay (torch resets them). Subclasses with
    a forward of their own: it is run. Lazy modules are initialised by a forward of the first batch.
    SyncBatchNorm that normalises over several ranks keeps doing so; unless the estimator is
    ``torch`` it needs ``group``, and it cannot have ``tolerance``. On the CPU, where it cannot
    synchronise, it is BatchNorm.

    Whatever raises, forwards, modes and momenta are restored, and no statistics have changed.

    Args:
        loader: batches: a tensor; a list or tuple, whose first element is the model's input; or
            anything else that contains tensors (a dict, say), which is the model's input as it is.
        model: the model; one without layers to estimate is left alone and ``loader`` is not read.
        device: where tensors are moved before the forward, in nested lists, tuples and dicts too;
            pinned ones asynchronously. None leaves them.
        estimator: ``torch``, ``weighted`` or ``pooled``, see above.
        unbiased: for pooled, whether the variance is divided by :math:`M - 1` or :math:`M`.
        max_batches: read no more than this many batches.
        tolerance: stop when the standard errors of all channels are below it: of the mean, relative
            to the standard deviation :math:`\sqrt{\sigma^2 + \epsilon}`, and of the variance,
            relative to :math:`\sigma^2 + \epsilon`. They are estimated from the scatter of the
            batches' statistics, :math:`\sqrt{\sum_k (\mu_k - \bar\mu)^2 / (K (K - 1))}`, for at
            least 4 batches, which have to be independent: the loader must shuffle. On a GPU the
            comparison lags behind by a batch or more. With ``group``, each rank stops by itself.
        call: ``call(model, batch)`` runs the forward, for models with other inputs; it is handed
            the whole batch, on ``device``, and the model without its wrappers.
        group: a process group, or True for the default one: every rank reads its own share of the
            data, of any length, and all end with the same statistics, those of all shares together.
            Ranks compare their layers before the pass and exchange statistics in one collective
            after it. A rank that fails makes all raise; one that is interrupted does not.
        progress: show a progress bar (tqdm).
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device.
        channels_last: hand 4-dimensional tensors on the CPU over in channels-last memory format;
            None does for models with 2-d convolutions.

    Returns:
        What was done, see :class:`BNReport`.

    Raises:
        ValueError: ``loader`` yields no batch; a batch has one value per channel in some layer
            (with pooled that is allowed, and such a layer puts out its bias); an argument outside
            its range; ranks whose layers differ.
        TypeError: a batch without a tensor.
        FloatingPointError: activations that are not finite; the message names the first layer.
        ImportError: ``progress`` without tqdm.
        RuntimeError: another rank has failed.

    Sources: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", ICML 2015; Izmailov et al., "Averaging Weights Leads to Wider Optima
    and Better Generalization", UAI 2018; Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    arXiv 2105.07576.
    """
    options = _checked(
        model,
        device,
        estimator,
        unbiased,
        max_batches,
        tolerance,
        call,
        group,
        progress,
        backend,
        channels_last,
    )
    return _reestimate(loader, model, options)
