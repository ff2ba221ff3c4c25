"""Runs a model's forwards and collects the statistics of its BatchNorm layers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _ops
from .._layout import VALUES
from .graph import CapturedForward, Signature, signature_of, waiting_told
from .layers import Layer, gathers_weights, has_hooks
from .options import Options
from .relu import Consumers, Output
from .statistics import Statistics

# Batches that run in full before the forward is cut off behind the last layer.
_FULL_BATCHES = 2

_log = logging.getLogger("swa_fast")


class _Stop(BaseException):
    """Leaves a forward whose last statistics have been taken. A BaseException, because models
    catch every Exception."""


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
        plain = not has_hooks(modules)
        self.may_fuse = plain
        self.fused: frozenset[tuple[int, int]] = frozenset()
        self.outputs: list[Output] = []
        self.may_stop = plain and options.call is None and not gathers_weights(modules)
        self.stopping = False  # whether _Stop has been raised in this forward
        # Why the forward is not captured, empty while it may yet be; and the captured one.
        self.not_captured = ""
        if not options.graph or all(s.device.type == "cpu" for s in self.statistics):
            self.not_captured = "not asked for"
        elif reason := self._never_captured(plain):
            self._refuse_capture(reason)
        self.captured: CapturedForward | None = None
        self.replayed = 0
        self.signature: Signature | None = None  # of the last batch

    def _never_captured(self, plain: bool) -> str:
        if len(self.statistics) > 1:
            devices = ", ".join(str(statistics.device) for statistics in self.statistics)
            return f"there are layers on several devices: {devices}"
        if not plain:
            return "a module has a forward hook"
        if self.call is not None:
            return "call= runs the forward"
        if not self.may_stop:
            return "FSDP gathers weights within the forward"
        if any(layer.synchronises for layer in self.layers):
            return "SyncBatchNorm exchanges statistics within the forward"
        return ""

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
        """Gives a layer momentum 1 and copies of its buffers for the time of the pass, so that its
        own forward leaves the statistics of the batch in them."""
        restore.callback(setattr, module, "momentum", module.momentum)
        restore.callback(module._buffers.update, dict(module._buffers))
        module.momentum = 1.0
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = buffer.clone()

    def _begin_call(self, layer: Layer, x: Any) -> tuple[Tensor, bool]:
        """Checks the input ``x`` of a layer.

        Returns:
            The storage of its statistics, and whether they are the last ones of the forward.

        Raises:
            TypeError, ValueError: ``x`` is not an input of the layer, or has too few values.
        """
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

    def _instead(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        module = layer.module
        tickets = layer.tickets
        collect = getattr(torch.ops.swa_fast.batch_norm_collect, layer.statistics.backend)
        # Arguments like those that passed the last check are not checked again: on a GPU a batch of
        # small layers takes as long as the host needs for it.
        dtype: torch.dtype | None = None
        device: torch.device | None = None
        weight: Tensor | None = None
        bias: Tensor | None = None

        def estimate(input: Tensor) -> Tensor:
            nonlocal dtype, device, weight, bias
            module._check_input_dim(input)
            batch, last = self._begin_call(layer, input)
            # nn.Module looks parameters up slowly, so once.
            scale, shift = module.weight, module.bias
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
            key = self.calls[-1]
            fused = key in self.fused
            y = collect(
                input if _ops.is_dense(input) else input.contiguous(),
                scale if scale is None else scale.contiguous(),
                shift if shift is None else shift.contiguous(),
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
                output = Output(key, fused)
                self.outputs.append(output)
                y._swa_fast_output = output
            assert isinstance(y, Tensor)
            return y

        def forward(input: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                if not torch.is_grad_enabled():
                    return estimate(input)
                # The model, or the user's call, has turned gradients on again.
                with torch.no_grad():
                    return estimate(input)

        return forward

    def _around(self, layer: Layer, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
                    batch[VALUES].fill_(values)
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
        """Tells whether the call that has just begun is the last one that has to be computed.

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

    def _run(self, batch: Any) -> bool:
        """One forward; True if it was left behind its last layer."""
        self._begin()
        try:
            with Consumers() if self.may_fuse else contextlib.nullcontext():
                if self.call is None:
                    self.model(batch)
                else:
                    self.call(self.model, batch)
        except _Stop:
            return True
        except Exception:
            self._discard()
            if not self.stopping:
                raise
        return False

    def _misjudged(self, stopped: bool) -> set[tuple[int, int]]:
        """Outputs that were fused with a ReLU and have been used by something else, too."""
        return {
            output.key
            for output in self.outputs
            if output.fused
            and not (output.only_relu or (stopped and output.relus + output.others == 0))
        }

    def _merge(self) -> None:
        for statistics in self.statistics:
            statistics.merge()

    def forward(self, batch: Any) -> None:
        """Runs the forward of a batch and merges its statistics.

        Repeated without early stop, or without fusion, if the model turns out not to bear it: no
        statistics have been merged then.
        """
        signature = None
        if self.captured is not None or not self.not_captured:
            signature = signature_of(batch)
        if self._replays(batch, signature):
            self._replay(batch)
        elif self.not_captured or self.batches != _FULL_BATCHES:
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
        while True:
            stopped = self._run(batch)
            if self.stopping and not stopped:  # the model caught it
                self.may_stop = False
                self._discard()
                continue
            if wrong := self._misjudged(stopped):
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
        if self.not_captured or self.batches <= _FULL_BATCHES:
            return False
        if signature is None:
            self._refuse_capture("a batch's input is not one tensor on a CUDA device")
            return False
        # A batch of its own size, such as a last one, is not worth it.
        return signature == self.signature and self._capture(batch)

    def _capture(self, batch: Tensor) -> bool:
        """Captures the forward of a batch, which computes nothing; False if that did not work."""

        def run(batch: Tensor) -> None:
            stopped = self._run(batch)
            if self.stopping and not stopped:
                raise _NotCaptured("the model catches what ends a forward behind its last layer")
            if self.calls != self.sequence:
                raise _NotCaptured("batches use the layers in different orders")
            if self._misjudged(stopped):
                raise _NotCaptured("batches use the layers' outputs differently")
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
