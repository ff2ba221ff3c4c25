"""Runs a model's forwards and collects the statistics of its BatchNorm layers."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _ops
from .._layout import VALUES
from .derivatives import differentiated, without_derivatives
from .graph import CapturedForward, Signature, signature_of, waiting_told
from .layers import Layer, gathers_weights, has_hooks
from .lent import BatchNormCall, changed, give_back, lend, replaced, show, written_by
from .options import Options
from .relu import fusing_forward, is_plain_sequential
from .statistics import Statistics

# Batches that are run before one is run for its graph.
_BATCHES_BEFORE_GRAPH = 2

_WRITTEN = (
    "layer {}: expected running statistics that are updated by F.batch_norm or by the layer's own "
    "forward, found that something else in the model's forward writes to them, such as a scripted "
    "function, or puts others in their place"
)

_log = logging.getLogger("swa_fast")


class _NotCaptured(Exception):
    """Ends a capture: the forward does not do what it did before."""


class Collector:
    """Runs forwards and collects the statistics of ``layers``."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        layers: Sequence[Layer],
        options: Options,
    ) -> None:
        self.model = model
        self.layers = layers
        self.estimator = options.estimator
        self.unbiased = options.unbiased
        self.call = options.call
        by_device: dict[torch.device, list[Layer]] = {}
        for layer in layers:
            assert layer.module.running_mean is not None
            by_device.setdefault(layer.module.running_mean.device, []).append(layer)
        self.statistics = [
            Statistics(members, device, options.estimator, options.backend)
            for device, members in by_device.items()
        ]
        self.batches = 0
        self.samples = 0
        # The calls (layer, how often before in this forward) of the first batch, and of this one.
        self.sequence: list[tuple[int, int]] | None = None
        self.calls: list[tuple[int, int]] = []
        self.rows = 0
        hooked = has_hooks(modules)
        # Modules whose forward is replaced by one that fuses layers with ReLUs.
        self.sequentials = [] if hooked else [m for m in modules if is_plain_sequential(m)]
        # Why the forward is not captured, empty while it may yet be; and the captured one.
        self.not_captured = ""
        if not options.graph or all(s.device.type == "cpu" for s in self.statistics):
            self.not_captured = "not asked for"
        elif reason := self._never_captured(modules, hooked):
            self._refuse_capture(reason)
        self.captured: CapturedForward | None = None
        self.replayed = 0
        self.signature: Signature | None = None  # of the last batch

    def _never_captured(self, modules: Sequence[nn.Module], hooked: bool) -> str:
        if len(self.statistics) > 1:
            devices = ", ".join(str(statistics.device) for statistics in self.statistics)
            return f"there are layers on several devices: {devices}"
        if hooked:
            return "a module has a forward hook"
        if self.call is not None:
            return "call= runs the forward"
        if gathers_weights(modules):
            return "FSDP gathers weights within the forward"
        if any(layer.synchronises for layer in self.layers):
            return "SyncBatchNorm exchanges statistics within the forward"
        return ""

    # ---- replaced forwards

    @contextlib.contextmanager
    def replaced_forwards(self) -> Iterator[None]:
        with contextlib.ExitStack() as restore:

            def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
                attributes = module.__dict__
                if "forward" in attributes:
                    restore.callback(attributes.__setitem__, "forward", attributes["forward"])
                else:
                    restore.callback(attributes.pop, "forward", None)
                attributes["forward"] = forward

            fusible: dict[nn.Module, Layer] = {}
            for layer in self.layers:
                module = layer.module
                lend(layer, self._answer, self._refresh, restore)
                if layer.own_forward:
                    # Then a forward that updates the buffers by itself leaves the batch's
                    # statistics in them.
                    restore.callback(setattr, module, "momentum", module.momentum)
                    module.momentum = 1.0
                    replace(module, self._around(layer, module.forward))
                else:
                    layer.compute = self._instead(layer)
                    fusible[module] = layer
                    replace(module, layer.compute)
            for sequential in self.sequentials:
                assert isinstance(sequential, nn.Sequential)
                if any(module in fusible for module in sequential):
                    replace(sequential, fusing_forward(sequential, fusible))
            yield

    def _begin_call(self, layer: Layer, x: Any) -> Tensor:
        """Checks the input ``x`` of a layer.

        Returns:
            The storage of its statistics.

        Raises:
            TypeError, ValueError: ``x`` is not an input of the layer, or has too few values.
        """
        if not isinstance(x, Tensor):
            raise TypeError(
                f"layer {layer.name}: expected a tensor, found {type(x).__name__}; a model that is "
                "called with something else than a batch's first element needs call="
            )
        if x.dim() < 2 or x.shape[1] != layer.channels:
            raise ValueError(
                f"layer {layer.name}: expected [N, {layer.channels}, ...], found {tuple(x.shape)}"
            )
        self._check_values(layer, x)
        return self._next_use(layer, x)

    def _check_values(self, layer: Layer, x: Tensor) -> None:
        if x.numel() // layer.channels < (1 if self.estimator == "pooled" else 2):
            raise ValueError(
                f"layer {layer.name}: expected more than 1 value per channel, found input of shape "
                f"{tuple(x.shape)} in batch {self.batches}; leave out the last batch "
                "(drop_last=True) or use another batch size"
            )

    def _next_use(self, layer: Layer, x: Tensor) -> Tensor:
        self.rows = self.rows or x.shape[0]
        layer.order = min(layer.order, len(self.calls))
        self.calls.append((layer.index, layer.uses))
        return layer.statistics.batch(layer)

    def _instead(self, layer: Layer) -> Callable[..., Tensor]:
        module = layer.module
        tickets = layer.tickets
        collect = getattr(torch.ops.swa_fast.batch_norm_collect, layer.statistics.backend)
        # Arguments like those that passed the last check are not checked again: on a GPU a batch of
        # small layers takes as long as the host needs for it.
        dtype: torch.dtype | None = None
        device: torch.device | None = None
        weight: Tensor | None = None
        bias: Tensor | None = None

        def forward(input: Tensor, relu: bool = False) -> Tensor:
            nonlocal dtype, device, weight, bias
            with torch._C.DisableTorchFunction():
                module._check_input_dim(input)
                # nn.Module looks parameters up slowly, so once.
                scale, shift = module.weight, module.bias
                if differentiated(input, scale, shift):
                    z = self._differentiable(layer, input, scale, shift, module.eps)
                    return z.relu() if relu else z
                batch = self._begin_call(layer, input)
                if (
                    input.dtype is not dtype
                    or input.device != device
                    or scale is not weight
                    or shift is not bias
                    or input.layout is not torch.strided
                ):
                    _ops.check_batch_norm_collect(input, scale, shift, batch, tickets)
                    dtype, device = input.dtype, input.device
                    weight, bias = scale, shift
                y: Tensor = collect(
                    input if _ops.is_dense(input) else input.contiguous(),
                    scale if scale is None else scale.contiguous(),
                    shift if shift is None else shift.contiguous(),
                    module.eps,
                    relu,
                    True,
                    batch,
                    tickets,
                )
                return y

        return forward

    def _differentiable(
        self, layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """BatchNorm by torch, for a forward that takes gradients of it."""
        values = without_derivatives(x, layer.name)
        batch = self._begin_call(layer, values)
        self._collect(layer, values, batch, eps)
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, cudnn)

    def _collect(self, layer: Layer, x: Tensor, batch: Tensor, eps: float) -> None:
        _ops.batch_norm_collect(
            x, None, None, eps, batch, normalise=False, tickets=layer.tickets,
            backend=layer.statistics.backend,
        )  # fmt: skip

    def _answer(self, call: BatchNormCall) -> Tensor:
        """Answers F.batch_norm on a layer's buffers, whoever has called it: a subclass's forward,
        perhaps on parts of a batch or side by side, or the model."""
        layer, x = call.layer, call.input
        with torch._C.DisableTorchFunction():
            if differentiated(x, call.weight, call.bias):
                return self._differentiable(layer, x, call.weight, call.bias, call.eps)
            batch = self._begin_call(layer, x)
            y = _ops.batch_norm_collect(
                x, call.weight, call.bias, call.eps, batch, tickets=layer.tickets,
                backend=layer.statistics.backend,
            )  # fmt: skip
            assert y is not None
            return y

    def _refresh(self, layer: Layer) -> None:
        """Shows who reads a layer's buffers what torch's pass would have in them."""
        with torch.no_grad():
            show(
                layer,
                (self.batches, layer.uses),
                lambda: layer.statistics.so_far(layer, self.unbiased),
            )

    def _around(self, layer: Layer, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            answered = layer.uses
            y = own(*args, **kwargs)
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if layer.uses == answered:
                    if layer.synchronises or replaced(layer) or changed([layer]):
                        self._take_written(layer, own, args, kwargs)
                elif replaced(layer):
                    raise ValueError(
                        f"layer {layer.name}: expected running statistics that are updated by "
                        "F.batch_norm or by the layer's forward, found one that does both"
                    )
            return y

        return forward

    def _take_written(
        self, layer: Layer, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Takes the statistics that a layer's forward has written into its buffers by itself. With
        momentum 1 they are those of the batch.

        Raises:
            ValueError: they are not, because the forward does not ask for the momentum.
        """
        found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if found is None:
            raise ValueError(
                f"layer {layer.name}: expected a forward that is handed a tensor, found none"
            )
        x = without_derivatives(found, layer.name)
        self._check_values(layer, x)
        mean, variance = (tensor.clone() for tensor in written_by(layer))
        if not (layer.synchronises or layer.honours_momentum):
            self._check_momentum(layer, own, args, kwargs, (mean, variance))
        batch = self._next_use(layer, x)
        if layer.synchronises and self.estimator == "pooled":
            # The forward's statistics are those of all ranks' batches together.
            self._collect(layer, x, batch, layer.module.eps)
        else:
            values = x.numel() // layer.channels
            batch[VALUES].fill_(values)
            batch[1].fill_(x.shape[0])
            batch[2].copy_(mean)
            batch[3].copy_(variance).mul_(values - 1)
        give_back(layer)

    def _check_momentum(
        self,
        layer: Layer,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: tuple[Tensor, Tensor],
    ) -> None:
        """Runs the forward again from other buffers: what it writes may not depend on them.

        Once in a pass, and only for a layer that does not hand its buffers to F.batch_norm.
        """
        give_back(layer)
        for plain, other in zip(layer.plain, (7.0, 13.0), strict=True):
            plain.data.fill_(other)
        layer.shown = (self.batches, layer.uses)
        devices = {x.get_device() for x in args if isinstance(x, Tensor) and x.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            own(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        for first, second in zip(written, written_by(layer), strict=True):
            coarse = 1e-2 if first.dtype.itemsize < 4 else 1e-3
            if not torch.allclose(first, second, rtol=coarse, atol=coarse, equal_nan=True):
                raise ValueError(
                    f"layer {layer.name}: expected a forward that updates its running statistics "
                    f"with self.momentum, found that {type(layer.module).__name__} uses a momentum "
                    "of its own: what it leaves is no batch's statistics"
                )
        layer.honours_momentum = True

    # ---- forwards

    def _begin(self) -> None:
        self.calls = []
        self.rows = 0
        for layer in self.layers:
            layer.uses = 0

    def _discard(self) -> None:
        for statistics in self.statistics:
            statistics.discard()

    def _run(self, batch: Any) -> None:
        """One forward."""
        self._begin()
        try:
            if self.call is None:
                self.model(batch)
            else:
                self.call(self.model, batch)
        except Exception:
            self._discard()
            for layer in self.layers:
                if replaced(layer):
                    give_back(layer)
            raise
        for layer in self.layers:
            if replaced(layer):
                raise ValueError(_WRITTEN.format(layer.name))

    def check_untouched(self) -> None:
        """
        Raises:
            ValueError: something has updated a layer's running statistics that the pass has not
                seen.
        """
        if layer := changed(self.layers):
            raise ValueError(_WRITTEN.format(layer.name))

    def _merge(self) -> None:
        for statistics in self.statistics:
            statistics.merge()

    def forward(self, batch: Any) -> None:
        """Runs the forward of a batch and merges its statistics."""
        signature = None
        if self.captured is not None or not self.not_captured:
            signature = signature_of(batch)
        if self._replays(batch, signature):
            self._replay(batch)
        elif self.not_captured or self.batches != _BATCHES_BEFORE_GRAPH:
            self._forward(batch)
        else:
            # The first that is run as those that follow will be.
            with waiting_told() as waited:
                self._forward(batch)
            if waited():
                self._refuse_capture("the forward waits for the device")
        self.signature = signature
        self.batches += 1

    def _forward(self, batch: Any) -> None:
        self._run(batch)
        if self.sequence is None:
            self.sequence = self.calls
        elif self.calls != self.sequence:
            self._refuse_capture("batches use the layers in different orders")
        self._merge()

    # ---- the forward as a graph

    def _refuse_capture(self, reason: str) -> None:
        if not self.not_captured:
            self.not_captured = reason
            _log.warning("update_bn: graph=True: no forward is captured: %s", reason)

    def _replays(self, batch: Any, signature: Signature | None) -> bool:
        """Whether the batch is one for the graph, which is captured if it is time for that."""
        if self.captured is not None:
            return signature == self.captured.signature
        if self.not_captured or self.batches <= _BATCHES_BEFORE_GRAPH:
            return False
        if signature is None:
            self._refuse_capture("a batch's input is not one tensor on a CUDA device")
            return False
        # A batch of its own size, such as a last one, is not worth it.
        return signature == self.signature and self._capture(batch)

    def _capture(self, batch: Tensor) -> bool:
        """Captures the forward of a batch, which computes nothing; False if that did not work."""

        def run(batch: Tensor) -> None:
            self._run(batch)
            if self.calls != self.sequence:
                raise _NotCaptured("batches use the layers in different orders")
            self._merge()

        try:
            self.captured = CapturedForward(run, batch)
        except Exception as error:
            self._discard()
            self._refuse_capture(f"{type(error).__name__}: {error}".splitlines()[0])
            return False
        return True

    def _replay(self, batch: Tensor) -> None:
        assert self.captured is not None
        self.rows = len(batch)
        self.captured(batch)
        self.replayed += 1
