"""The tensors of a model that belong to the averages, wherever they are now."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._modules import Selection, check_kind, is_loose
from .storage import Storage

__all__ = ["tensors_of"]


def tensors_of(
    selection: Selection,
    storage: Storage,
    aliases: Mapping[str, int],
    loose_names: Mapping[str, int],
    device: torch.device | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The model's tensors in the order of the slots, and the loose ones.

    Args:
        selection: of the model.
        storage: the averages.
        aliases: which slot has each name.
        loose_names: which of the loose tensors has each name.
        device: where the averages live, None: beside the model's tensors.

    Raises:
        ValueError, TypeError: they do not fit the averages; all that does not is named.
    """
    names, tensors, _ = selection.collect()
    ours = {**aliases, **loose_names}
    problems = [f"{n}: in the average, not in the model" for n in ours if n not in names]
    problems += [f"{n}: in the model, not in the average" for n in names if n not in ours]
    slots, averages = storage.slots, storage.averages[0]
    sources, loose = list(averages), list(storage.loose[0])
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, at in names.items():
        tensor = tensors[at]
        if name in loose_names:
            i = loose_names[name]
            own = loose[i]
            if not is_loose(tensor) or (own.layout, own.dtype) != (tensor.layout, tensor.dtype):
                problems.append(
                    f"{name}: {own.layout}, {own.dtype} in the average, {tensor.layout}, "
                    f"{tensor.dtype} in the model"
                )
            loose[i] = tensor
            continue
        i = aliases.get(name, -1)
        if i < 0:
            continue
        slot = slots[i]
        first = chosen.setdefault(i, (name, tensor))
        if first[1] is not tensor:
            problems.append(f"{name}: tied to {first[0]} in the average, not in the model")
            continue
        sources[i] = tensor
        check_kind(name, tensor)
        if tuple(tensor.shape) != slot.shape:
            problems.append(
                f"{name}: shape {slot.shape} in the average, {tuple(tensor.shape)} in the model"
            )
        expected = slot.dtype
        if not (
            tensor.dtype == expected or (tensor.is_floating_point() and expected.is_floating_point)
        ):
            problems.append(f"{name}: {expected} in the average, {tensor.dtype} in the model")
        where = averages[i].device
        if device is None and tensor.device != where:
            problems.append(
                f"{name}: the average is on {where}, the model on {tensor.device} (give "
                "device= to keep the averages elsewhere)"
            )
    if problems:
        raise ValueError("the model does not fit the averages\n  " + "\n  ".join(problems))
    return sources, loose
