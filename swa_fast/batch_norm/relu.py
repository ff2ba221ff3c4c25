"""Fusion of a BatchNorm layer with the ReLU that alone uses its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RELU_IN_PLACE = frozenset({torch.relu_, F.relu_, Tensor.relu_})
_RELU = frozenset({F.relu, torch.relu, Tensor.relu}) | _RELU_IN_PLACE
# Functions whose result is the same before and after a ReLU of the output.
_METADATA = frozenset(
    {
        Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.is_contiguous,
        Tensor.is_floating_point, Tensor.element_size,
        *(getattr(Tensor, name).__get__ for name in (
            "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu",
        )),
    }
)  # fmt: skip


class Output:
    """Counts the users of the output of one BatchNorm call."""

    __slots__ = ("fused", "key", "others", "relus")

    def __init__(self, key: tuple[int, int], fused: bool) -> None:
        self.key = key
        self.fused = fused
        self.relus = 0
        self.others = 0

    @property
    def only_relu(self) -> bool:
        return self.relus == 1 and self.others == 0


_SEQUENCES = (list, tuple)
_NEVER_OUTPUTS = frozenset({int, bool, float, str, type(None), nn.Parameter, torch.dtype})


def _tracked(arguments: Iterable[Any]) -> list[Output]:
    # This runs for every torch function in the pass, so it has to be quick about the most frequent
    # arguments: other tensors, numbers, and the strides and paddings of convolutions.
    found: list[Output] = []
    for argument in arguments:
        if type(argument) in _NEVER_OUTPUTS:
            continue
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


class Consumers(TorchFunctionMode):
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
            # Later users of x see the ReLU's result, as they would without fusion.
            del x._swa_fast_output  # type: ignore[attr-defined]
        if not output.fused:
            return func(*args, **kwargs)
        return x if in_place else x.detach()
