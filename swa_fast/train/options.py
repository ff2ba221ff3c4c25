"""Settings as command-line options: their help, how they are read, and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

__all__ = ["DEFAULTS", "METHODS", "PARSERS", "RESOLVED", "group", "option_name"]

#: Training methods by name, with the titles that tables give their results.
METHODS: dict[str, str] = {
    "sgd": "SGD",
    "ema": "EMA",
    "fge": "FGE",
    "swa": "SWA",
    "swa-cyclic": "SWA, cyclic",
    "swa-fixed": "SWA, fixed rate",
}

_SMALL: dict[str, Any] = {"width": 8, "lr": 0.1, "swa_lr": 0.05, "weight_decay": 5e-4}
_PAPER: dict[str, Any] = {
    "model": "preresnet20",
    "epochs": 150,
    "batch_size": 128,
    "lr": 0.1,
    "swa_lr": 0.01,
    "weight_decay": 3e-4,
}

#: Defaults that depend on the dataset. Those of ``digits`` and ``synthetic`` let two runs end in
#: about a minute on two cores; the others are the paper's, for PreResNets where it is about CIFAR.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {**_SMALL, "model": "preresnet14", "epochs": 30, "batch_size": 32},
    "synthetic": {**_SMALL, "model": "preresnet8", "epochs": 12, "batch_size": 128},
    "images": _PAPER,
    "cifar10": _PAPER,
    "cifar100": {**_PAPER, "swa_lr": 0.05},
    "fashion-mnist": _PAPER,
    "imagenet": {
        "model": "resnet50",
        "pretrained": "torchvision",
        "methods": ("swa-cyclic",),
        "epochs": 10,
        "batch_size": 256,
        "lr": 1e-3,
        "swa_lr": 1e-3,
        "weight_decay": 1e-4,
        "swa_start": 0.0,
        "cycle_epochs": 1,
        "cycle_lr_max": 1e-3,
        "cycle_lr_min": 1e-5,
        "budgets": (0.5, 1.0),
    },
}

#: The default of a setting that depends on others or on the machine; its help tells how.
RESOLVED = object()


def option_name(field: str) -> str:
    """The command-line option that sets a field, for messages."""
    return "--" + field.replace("_", "-")


def group(name: str) -> Callable[..., Any]:
    """Makes fields that are command-line options of one group of the help."""

    def option(metavar: str, help: str, default: Any = RESOLVED) -> Any:
        if default is not RESOLVED and default is not None:
            help = f"{help} (default: {_shown(default)})".lstrip()
        return dataclasses.field(
            metadata={"group": name, "metavar": metavar, "help": help, "default": default}
        )

    return option


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"expected numbers separated by commas, found {text!r}"
        raise argparse.ArgumentTypeError(message) from None


#: How the text of an option is read, by the type of the field. Other fields are switches.
PARSERS: dict[Any, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "tuple[str, ...]": _names,
    "tuple[float, ...]": _numbers,
}
