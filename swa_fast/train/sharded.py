"""Networks whose weights, gradients and momenta are divided among the processes (FSDP2).

The networks of the recipes are small beside a GPU, so the whole network is one group: its weights
are gathered once for a step, and once for an evaluation, in which processes may have different
numbers of batches. States are saved whole, so that any number of processes can go on from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["gather", "load_training", "shard", "training_state", "whole", "whole_weights"]


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Divides the parameters among all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh(device.type, (processes,)))


def gather(model: nn.Module) -> None:
    """Gathers the weights, until the next step or swap. All processes must call it."""
    unshard = getattr(model, "unshard", None)
    if unshard is not None:
        # What is gathered in inference mode could not be trained later.
        with torch.inference_mode(False):
            unshard()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that may be pieces, whole. All processes must call it, and all get them."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in tensors.items()
    }


def whole_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """The weights and buffers of a network. All processes must call it, and all get them."""
    return whole(model.state_dict())


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, portable: bool
) -> dict[str, Any]:
    """Weights, buffers and momenta. All processes must call it, and the first gets them.

    Args:
        portable: for any number of processes, and not for as many alone.
    """
    if not portable:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, momenta = get_state_dict(model, optimizer, options=_options())
    return {"model": weights, "optimizer": momenta}


def load_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], portable: bool
) -> None:
    """Goes on from a :func:`training_state`, which every process has read."""
    if not portable:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(),
    )
