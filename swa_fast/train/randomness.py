"""Everything random of a run as a function of its seed and the epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A seed in [0, 2^63) for one purpose ("init", "train", "augment", "bn") in one epoch.

    The first 8 bytes of SHA-256 over "seed/purpose/epoch", without the top bit: neighbouring seeds
    and epochs give unrelated streams.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    # Loading a checkpoint has moved them to the device; generators want them on the CPU.
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
