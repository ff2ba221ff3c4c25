"""The BatchNorm layers of a model that take part in a pass."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as _module_globals
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import swa_utils

from .._modules import inner
from ..averaged_model import AveragedModel
from .options import Options

REFUSED_SCRIPT = (
    "layer {}: expected layers of Python, found one of TorchScript, whose statistics cannot be "
    "collected; call update_bn before torch.jit.script or torch.jit.trace"
)

if TYPE_CHECKING:
    from .lent import Lent
    from .statistics import Statistics


def unwrap(model: nn.Module) -> nn.Module:
    """Takes AveragedModel, torch.compile, DataParallel and DistributedDataParallel off a model."""
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            return model  # without the attributes that are asked for
        found = inner(model)
        forward = type(found).forward
        if forward is AveragedModel.forward or forward is swa_utils.AveragedModel.forward:
            assert isinstance(found.module, nn.Module)
            found = found.module
        if found is model:
            return model
        model = found


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    return bool(
        _module_globals._global_forward_hooks or _module_globals._global_forward_pre_hooks
    ) or any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def gathers_weights(modules: Iterable[nn.Module]) -> bool:
    """Whether forwards leave something undone when an exception ends them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in modules
    )


def has_lazy_tensors(modules: Iterable[nn.Module]) -> bool:
    return any(
        is_lazy(tensor)
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
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


class Layer:
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
        # What stands in for the module's forward, if that is BatchNorm's; it can clamp at 0, too.
        self.compute: Callable[..., Tensor]
        # Whether a forward that updates the buffers by itself does so with the module's momentum.
        self.honours_momentum = False
        # What lend sets: the buffers lent to the module, the tensors whose memory they are, the
        # version counters of these as they were last seen, the values that they were given, and at
        # which moment of the pass (batches, uses in this one).
        self.lent: tuple[Lent, Lent]
        self.plain: tuple[Tensor, Tensor]
        self.versions: tuple[int, int]
        self.known: tuple[Tensor | float, Tensor | float]
        self.shown: tuple[int, int] | None
        # How often the present forward has used the layer.
        self.uses = 0
        # The layer's position among the calls of the first forward that used it.
        self.order: float = math.inf
        # What Statistics sets: itself, the layer's position among the layers on its device, and the
        # position of its first channel in their flat storage.
        self.statistics: Statistics
        self.place: int
        self.start: int
        self.tickets: Tensor


def select(named: Iterable[tuple[str, nn.Module]]) -> tuple[list[Layer], tuple[str, ...]]:
    """Lists the layers to re-estimate, and the names of those that are frozen."""
    layers: list[Layer] = []
    frozen = []
    for name, module in named:
        if not isinstance(module, _BatchNorm) or not module.track_running_stats:
            continue
        if module.running_mean is None or module.running_var is None:
            continue
        if module.training:
            layers.append(Layer(name, module, len(layers)))
        else:
            frozen.append(name)
    return layers, tuple(frozen)


def _has_statistics(module: nn.Module) -> bool:
    return any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))


def scripted_layers(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """BatchNorm layers in training mode that are TorchScript, whose forward cannot be replaced. A
    traced one is as it was when it was traced, whatever its mode."""
    traced: list[str] = []
    found: list[tuple[str, nn.Module]] = []
    for name, module in named:
        if not isinstance(module, torch.jit.ScriptModule):
            continue
        if isinstance(module, torch.jit._trace.TopLevelTracedModule):
            traced.append(name)
        inside = any(name == top or not top or name.startswith(f"{top}.") for top in traced)
        if not inside and module.training and _has_statistics(module):
            found.append((name, module))
    return found


@contextlib.contextmanager
def kept_scripts(named: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keeps the running statistics of TorchScript modules, scripted or traced.

    Raises:
        ValueError: the block has changed some.
    """
    kept = [
        (name, buffer, buffer.clone())
        for name, module in named
        if isinstance(module, torch.jit.ScriptModule) and _has_statistics(module)
        for buffer in module.buffers(recurse=False)
    ]
    changed: list[str] = []
    try:
        yield
    finally:
        for name, buffer, values in kept:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
                changed.append(name)
    if changed:
        raise ValueError(REFUSED_SCRIPT.format(changed[0]))


def refuse_shared(layers: Sequence[Layer], options: Options) -> None:
    """Checks that layers which normalise over several ranks can be served.

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
