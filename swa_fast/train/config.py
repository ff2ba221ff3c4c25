"""The settings of a training run: defaults, checks, and their form on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..schedules import first_capture
from .errors import TrainError
from .models import MODELS

__all__ = ["DEFAULTS", "TrainConfig", "option_name"]

#: Defaults that depend on the dataset. Those of ``digits`` let both runs end in about a minute on
#: two cores; those of ``images`` are the paper's for PreResNets on CIFAR-10.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "preresnet14",
        "width": 8,
        "epochs": 30,
        "batch_size": 32,
        "lr": 0.1,
        "swa_lr": 0.05,
        "weight_decay": 5e-4,
    },
    "images": {
        "model": "preresnet20",
        "width": 16,
        "epochs": 150,
        "batch_size": 128,
        "lr": 0.1,
        "swa_lr": 0.01,
        "weight_decay": 3e-4,
    },
}

AMP_CHOICES = ("none", "bf16", "fp16")


def option_name(field: str) -> str:
    """The command-line option that sets a field, for messages."""
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine the outcome of a run, checked on construction.

    Two runs with equal configurations, data and machine end in the same bits. ``device`` and
    ``threads`` are resolved (no "auto", no None), because results depend on them.

    Raises:
        TrainError: a value is out of its range; the message names the command-line option, the
            value found and what is expected.
    """

    dataset: str
    data_dir: str | None
    image_size: int | None
    model: str
    width: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    swa_lr: float
    swa_start: float
    seed: int
    device: str
    amp: str
    channels_last: bool
    threads: int
    eval_every: int
    backend: str | None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TrainConfig:
        """A configuration from the options given; the dataset's defaults for all others.

        Args:
            options: values by field name. Absent ones take their defaults, and ``device`` may be
                ``auto`` or ``cuda``.

        Raises:
            TrainError: as the class.
        """
        dataset = options.get("dataset", "digits")
        _expect_name("dataset", dataset, DEFAULTS)
        values: dict[str, Any] = {
            "dataset": dataset,
            "data_dir": None,
            "image_size": None,
            "momentum": 0.9,
            "swa_start": 0.75,
            "seed": 1,
            "device": "auto",
            "amp": "none",
            "channels_last": True,
            "threads": torch.get_num_threads(),
            "eval_every": 1,
            "backend": None,
            **DEFAULTS[dataset],
            **options,
        }
        values["device"] = resolve_device(values["device"])
        if values["data_dir"] is not None:
            values["data_dir"] = str(Path(values["data_dir"]).absolute())
        return cls(**values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            TrainError: settings are missing or unknown, or as the class.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(values) != expected:
            missing = ", ".join(sorted(expected - set(values))) or "none"
            unknown = ", ".join(sorted(set(values) - expected)) or "none"
            raise TrainError(
                f"expected the settings of this version; missing: {missing}; unknown: {unknown}"
            )
        return cls(**{**values, "device": resolve_device(values["device"])})

    def to_json(self) -> dict[str, Any]:
        """Settings by name, as JSON values."""
        return dataclasses.asdict(self)

    @property
    def swa_start_epoch(self) -> int:
        """The epoch, counted from 1, after which weights are averaged first."""
        return first_capture(self.epochs, self.swa_start)

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings that differ and matter; where the data lie does not (their content
        is compared by itself)."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name != "data_dir" and getattr(self, field.name) != getattr(other, field.name)
        ]

    def __post_init__(self) -> None:
        _expect_name("dataset", self.dataset, DEFAULTS)
        _expect_name("model", self.model, MODELS)
        _expect_name("amp", self.amp, AMP_CHOICES)
        for field in ("width", "epochs", "batch_size", "threads", "eval_every"):
            _expect(field, self, getattr(self, field) >= 1, "1 or more")
        for field in ("lr", "swa_lr"):
            value = getattr(self, field)
            _expect(field, self, math.isfinite(value) and value > 0, "a finite number above 0")
        _expect(
            "weight_decay",
            self,
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "a finite number of 0 or more",
        )
        _expect("momentum", self, 0 <= self.momentum < 1, "a number in [0, 1)")
        _expect("seed", self, 0 <= self.seed < 2**63, "an integer in [0, 2^63)")
        _expect("swa_start", self, 0 < self.swa_start <= 1, "a fraction of the epochs in (0, 1]")
        if self.swa_start_epoch > self.epochs:
            raise TrainError(
                f"--swa-start: expected a fraction that leaves an epoch to average, found "
                f"{self.swa_start}, i.e. a first average after epoch {self.swa_start_epoch} of "
                f"{self.epochs}"
            )
        if self.amp == "fp16" and torch.device(self.device).type != "cuda":
            raise TrainError(
                f"--amp: fp16 needs a CUDA device, found device {self.device}; expected none or "
                f"bf16 here"
            )
        if self.dataset == "images":
            if self.data_dir is None:
                raise TrainError(
                    "--data-dir: expected a folder with train/<class>/ and test/<class>/ for "
                    "--dataset images, found nothing"
                )
            if self.image_size is not None:
                _expect("image_size", self, self.image_size >= 8, "8 or more pixels")
        else:
            for field in ("data_dir", "image_size"):
                if getattr(self, field) is not None:
                    raise TrainError(
                        f"{option_name(field)}: expected only with --dataset images, found it with "
                        f"--dataset {self.dataset}"
                    )


def _expect(field: str, config: TrainConfig, holds: bool, expected: str) -> None:
    if not holds:
        raise TrainError(
            f"{option_name(field)}: expected {expected}, found {getattr(config, field)}"
        )


def _expect_name(field: str, found: str, known: Any) -> None:
    if found not in known:
        raise TrainError(
            f"{option_name(field)}: expected one of {', '.join(known)}, found {found!r}"
        )


def resolve_device(name: str) -> str:
    """``cpu`` or ``cuda:N`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        TrainError: another name, or a device that torch does not find.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (name == "cuda" or index.isdecimal()):
        raise TrainError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if not torch.cuda.is_available():
        raise TrainError(f"--device: torch finds no CUDA device, found {name!r}; expected cpu here")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise TrainError(
            f"--device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, found {name!r}"
        )
    return f"cuda:{number}"
