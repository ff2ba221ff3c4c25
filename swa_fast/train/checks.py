"""Checks of settings: their ranges, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..schedules import first_capture
from .data import DATASETS, NORMALISATIONS, check_data_options
from .errors import TrainError
from .models import MODELS
from .options import METHODS, option_name

if TYPE_CHECKING:
    from .config import TrainConfig

__all__ = ["check_config", "expect_name"]

_NAMES: dict[str, Any] = {
    "dataset": DATASETS,
    "model": MODELS,
    "normalise": ("dataset", *NORMALISATIONS),
    "amp": ("none", "bf16", "fp16"),
    "lr_schedule": ("paper", "cosine", "steps", "constant"),
    "swa_from": ("scratch", "sgd"),
    "cycle_shape": ("linear", "cosine"),
    "bn_estimator": ("weighted", "torch", "pooled"),
}

# What is expected, whether a value is, and the fields of which it is expected.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "1 or more",
        lambda x: x >= 1,
        "width epochs batch_size threads eval_every swa_every",
    ),
    ("0 or more", lambda x: x >= 0, "workers"),
    (
        "a finite number above 0",
        lambda x: math.isfinite(x) and x > 0,
        "lr swa_lr fixed_lr cycle_lr_max cycle_lr_min fge_lr_max fge_lr_min ema_epochs",
    ),
    ("a finite number of 0 or more", lambda x: math.isfinite(x) and x >= 0, "weight_decay"),
    ("a number in [0, 1)", lambda x: 0 <= x < 1, "momentum"),
    ("an integer in [0, 2^63)", lambda x: 0 <= x < 2**63, "seed"),
    (
        "a fraction of 0 or more",
        lambda x: math.isfinite(x) and x >= 0,
        "swa_start fge_start fixed_start",
    ),
)


def check_config(config: TrainConfig) -> None:
    """Raises TrainError for a value out of its range and for settings that contradict each other;
    the message names the command-line option, the value found and what is expected."""
    for field, known in _NAMES.items():
        expect_name(field, getattr(config, field), known)
    for expected, holds, fields in _RANGES:
        for field in fields.split():
            _expect(field, config, holds(getattr(config, field)), expected)
    for field in ("cycle_lr", "fge_lr"):
        largest = getattr(config, f"{field}_max")
        holds_here = getattr(config, f"{field}_min") <= largest
        limit = f"{largest} ({option_name(field)}-max) at most"
        _expect(f"{field}_min", config, holds_here, limit)
    if config.nesterov:
        _expect("momentum", config, config.momentum > 0, "a number above 0 with --nesterov")
    _check_methods(config)
    _check_machine(config)
    check_data_options(config.dataset, config.data_dir, config.image_size, config.fraction)
    if config.pretrained == "torchvision" and MODELS[config.model].image_size != 224:
        raise TrainError(
            f"--pretrained: torchvision has weights of resnet50, resnet152 and densenet161, "
            f"found --model {config.model}"
        )


def _check_methods(config: TrainConfig) -> None:
    methods, budgets = config.methods, config.budgets
    if not methods or len(set(methods)) != len(methods):
        raise TrainError(
            f"--methods: expected different names of {', '.join(METHODS)}, found "
            f"{','.join(methods) or 'nothing'}"
        )
    for method in methods:
        expect_name("methods", method, METHODS)
    if "swa" in methods and config.swa_from == "scratch" and config.lr_schedule != "paper":
        # The authors' schedule of a run of its own belongs to their conventional one.
        raise TrainError(
            f"--swa-from: expected sgd with --lr-schedule {config.lr_schedule}, found scratch"
        )
    if not budgets or not all(math.isfinite(b) and 0 < b <= 100 for b in budgets):
        raise TrainError(
            f"--budgets: expected numbers in (0, 100], found "
            f"{', '.join(str(b) for b in budgets) or 'nothing'}"
        )
    _expect("budgets", config, list(budgets) == sorted(set(budgets)), "rising numbers")
    for field, method in (
        ("swa_start", "swa"),
        ("swa_start", "swa-cyclic"),
        ("fge_start", "fge"),
        ("fixed_start", "swa-fixed"),
    ):
        if method in methods:
            _check_start(config, field, method)
    if "swa-cyclic" in methods:
        _check_cycle(config)
    if "fge" in methods:
        even = config.fge_cycle >= 2 and config.fge_cycle % 2 == 0
        _expect("fge_cycle", config, even, "an even number of epochs")
        left = config.epochs - (first_capture(config.epochs, config.fge_start) - 1)
        limit = f"a half cycle within the {left} epochs that are left after --fge-start"
        _expect("fge_cycle", config, config.fge_cycle // 2 <= left, limit)


def _check_start(config: TrainConfig, field: str, method: str) -> None:
    start = getattr(config, field)
    first = first_capture(config.epochs, start)
    end = config.epochs if method == "fge" else config.last_epoch
    if first > end:
        raise TrainError(
            f"{option_name(field)}: expected a fraction that leaves an epoch to average, found "
            f"{start}, i.e. a first average after epoch {first} of {end} ({method})"
        )
    # These go on from the conventional run, which has `epochs` epochs.
    if method in ("swa-cyclic", "fge") or (method == "swa" and config.swa_from == "sgd"):
        _expect(field, config, start <= 1, f"1 at most for {method}, which continues the SGD run")


def _check_cycle(config: TrainConfig) -> None:
    cycle = config.cycle_epochs
    if cycle is None:
        raise TrainError("--cycle-epochs: expected with the method swa-cyclic, found none")
    _expect("cycle_epochs", config, cycle >= 1, "1 or more")
    if config.cycle_shape == "cosine":
        limit = f"at most half of the {config.epochs} epochs with --cycle-shape cosine"
        _expect("cycle_epochs", config, 2 * cycle <= config.epochs, limit)
    left = config.last_epoch - (first_capture(config.epochs, config.swa_start) - 1)
    limit = f"at most the {left} epochs that are left after --swa-start"
    _expect("cycle_epochs", config, cycle <= left, limit)


def _check_machine(config: TrainConfig) -> None:
    if torch.device(config.device).type == "cuda":
        return
    if config.amp == "fp16":
        raise TrainError(
            f"--amp: fp16 needs a CUDA device, found device {config.device}; expected none or "
            f"bf16 here"
        )
    if config.sync_bn:
        raise TrainError(
            f"--sync-bn: torch's SyncBatchNorm needs a CUDA device, found device {config.device}"
        )


def _expect(field: str, config: TrainConfig, holds: bool, expected: str) -> None:
    if not holds:
        raise TrainError(
            f"{option_name(field)}: expected {expected}, found {getattr(config, field)}"
        )


def expect_name(field: str, found: str, known: Any) -> None:
    """Raises TrainError unless a setting is one of the names that are known."""
    if found not in known:
        raise TrainError(
            f"{option_name(field)}: expected one of {', '.join(known)}, found {found!r}"
        )
