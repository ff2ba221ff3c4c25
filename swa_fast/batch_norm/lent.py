"""Buffers that are lent to a layer for the time of a pass, and notice what is done with them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .layers import Layer

RUNNING = ("running_mean", "running_var")
_RESET = (0.0, 1.0)

_SIGNATURE = inspect.signature(F.batch_norm)
# torch.batch_norm takes what F.batch_norm takes in another order.
_ORDER = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")

# What tells nothing about the values.
_METADATA = frozenset(
    {
        Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.is_contiguous,
        Tensor.is_floating_point, Tensor.element_size, Tensor.type, Tensor.get_device,
        *(getattr(Tensor, name).__get__ for name in (
            "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu",
            "grad", "grad_fn", "is_leaf", "_version",
        )),
    }
)  # fmt: skip
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class BatchNormCall(NamedTuple):
    """Arguments of a call of BatchNorm in training mode on the buffers of a layer."""

    layer: Layer
    input: Any
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Lent(Tensor):
    """A running mean or variance during a pass. torch functions that are handed it, from whichever
    thread, come by here first: BatchNorm's is answered by the pass, whoever calls it; others find
    the values that they would find in a pass of torch's."""

    layer: Layer
    answer: Callable[[BatchNormCall], Tensor]
    refresh: Callable[[Layer], None]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm or func is torch.batch_norm:
            call = _call_of(func, args, kwargs)
            if call is not None:
                mean = call.layer.lent[0]
                return mean.answer(call)
        with torch._C.DisableTorchFunctionSubclass():
            if func is _DATA:
                # With a version counter of its own nobody would notice that it is written to.
                return args[0].detach()
            if func not in _METADATA:
                for lent in _lent_in((*args, *kwargs.values())):
                    lent.refresh(lent.layer)
            return func(*args, **kwargs)


def _lent_in(values: Iterable[Any]) -> Iterable[Lent]:
    for value in values:
        if isinstance(value, Lent):
            yield value
        elif isinstance(value, list | tuple):
            yield from _lent_in(value)


def _call_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> BatchNormCall | None:
    """None for a call that normalises by the buffers, or by parts of them, or by those of several
    layers."""
    if func is F.batch_norm:
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        found = bound.arguments
    else:
        found = {**dict(zip(_ORDER, args, strict=False)), **kwargs}
    mean, variance = found["running_mean"], found["running_var"]
    if not found["training"] or not isinstance(mean, Lent) or not isinstance(variance, Lent):
        return None
    if mean is not mean.layer.lent[0] or variance is not mean.layer.lent[1]:
        return None
    return BatchNormCall(
        mean.layer, found["input"], found["weight"], found["bias"], float(found["eps"])
    )


def lend(
    layer: Layer,
    answer: Callable[[BatchNormCall], Tensor],
    refresh: Callable[[Layer], None],
    restore: contextlib.ExitStack,
) -> None:
    """Gives a layer buffers as they are after ``reset_running_stats``, until ``restore``."""
    module = layer.module
    restore.callback(module._buffers.update, dict(module._buffers))
    # Under inference_mode they would have no version counters.
    with torch.inference_mode(False), torch.no_grad():
        found = []
        for name, value in zip(RUNNING, _RESET, strict=True):
            buffer = module._buffers[name]
            assert buffer is not None
            plain = torch.full_like(buffer, value, memory_format=torch.contiguous_format)
            found.append(plain)
        if (counter := module._buffers.get("num_batches_tracked")) is not None:
            module._buffers["num_batches_tracked"] = torch.zeros_like(counter)
    layer.plain = (found[0], found[1])
    if layer.synchronises:
        layer.lent = cast(Any, layer.plain)
    else:
        lent = []
        for plain in found:
            buffer = plain.as_subclass(Lent)
            buffer.layer, buffer.answer, buffer.refresh = layer, answer, refresh
            lent.append(buffer)
        layer.lent = (lent[0], lent[1])
    give_back(layer)


def give_back(layer: Layer) -> None:
    """Puts the lent buffers (back) in their places, reset."""
    layer.module._buffers.update(zip(RUNNING, layer.lent, strict=True))
    for plain, value in zip(layer.plain, _RESET, strict=True):
        plain.data.fill_(value)
    layer.known, layer.shown = _RESET, None
    layer.versions = (layer.plain[0]._version, layer.plain[1]._version)


def replaced(layer: Layer) -> bool:
    """Whether others are in the places of the lent buffers, or an operation has written to them
    that says so. torch's own BatchNorm does not."""
    buffers, (mean, variance), (first, second) = layer.module._buffers, layer.lent, layer.plain
    return (
        buffers["running_mean"] is not mean
        or buffers["running_var"] is not variance
        or (first._version, second._version) != layer.versions
    )


def changed(layers: Sequence[Layer]) -> Layer | None:
    """The first of ``layers`` whose lent buffers hold other values than they were given. Waits for
    each device once."""
    by_device: dict[torch.device, list[Layer]] = {}
    for layer in layers:
        by_device.setdefault(layer.plain[0].device, []).append(layer)
    for members in by_device.values():
        # Each tensor by itself would take as long as a small kernel.
        differences = [
            torch.cat([layer.plain[k] for layer in members])
            != (
                value
                if all(layer.known[k] is value for layer in members)
                else torch.cat(
                    [layer.plain[k].new_zeros(layer.channels) + layer.known[k] for layer in members]
                )
            )
            for k, value in enumerate(_RESET)
        ]
        if torch.stack(differences).any():
            sizes = [layer.channels for layer in members]
            parts = torch.stack(differences).split(sizes, dim=1)
            return next(x for x, part in zip(members, parts, strict=True) if part.any())
    return None


def written_by(layer: Layer) -> tuple[Tensor, Tensor]:
    """The values of what is in the places of the buffers now."""
    mean, variance = (layer.module._buffers[name] for name in RUNNING)
    if mean is None or variance is None:
        raise ValueError(f"layer {layer.name}: its forward has removed its running statistics")
    return mean.detach(), variance.detach()


def show(layer: Layer, when: tuple[int, int], values: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Writes ``values`` into the lent buffers, unnoticed, unless that was done at the same moment
    of the pass: then who has read them may be writing to them."""
    if layer.shown == when or replaced(layer):
        return
    layer.shown = when
    mean, variance = (
        value.to(plain.dtype) for value, plain in zip(values(), layer.plain, strict=True)
    )
    layer.known = (mean, variance)
    for plain, value in zip(layer.plain, layer.known, strict=True):
        plain.data.copy_(value)
