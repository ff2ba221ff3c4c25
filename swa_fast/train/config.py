"""The settings of a training run, and their form on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..schedules import budget_epoch
from .checks import check_config, expect_name
from .data import DATASETS, NORMALISATIONS
from .errors import TrainError
from .models import MODELS
from .options import DEFAULTS, METHODS, RESOLVED, group

__all__ = ["TrainConfig", "resolve_device", "with_absolute_paths"]

_data, _recipe, _averaging = group("data"), group("recipe"), group("averaging")
_machine, _output = group("machine"), group("output")


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine the outcome of a run, checked on construction.

    Two runs with equal configurations, data and machine end in the same bits. ``device`` and
    ``threads`` are resolved (no "auto", no None), because results depend on them. Each field is a
    command-line option, with the name of its value, its help and its default.

    Raises:
        TrainError: as :func:`~swa_fast.train.checks.check_config`.
    """

    dataset: str = _data(
        "NAME", f"one of {', '.join(DATASETS)} (default: digits, part of scikit-learn)"
    )
    data_dir: str | None = _data(
        "DIR",
        "where the data lie or, for torchvision's datasets, are downloaded to (default: "
        "data/<dataset>); for images a folder with train/<class>/ and test/<class>/; for imagenet "
        "one with train/<class>/ and val/<class>/",
        None,
    )
    image_size: int | None = _data(
        "N", "resize all images to NxN (default: as they are; imagenet: 224)", None
    )
    normalise: str = _data(
        "NAME",
        f"pixel mean and deviation: dataset (measured) or one of {', '.join(NORMALISATIONS)} "
        "(default: the paper's for the model on cifar10, cifar100 and imagenet, else dataset)",
    )
    fraction: float = _data("F", "share of every class that is used", 1.0)
    workers: int = _data(
        "N", "processes that decode images, for imagenet (default: as many as cores, 4 at most)"
    )
    model: str = _recipe("NAME", f"one of {', '.join(MODELS)} (default: by dataset)")
    width: int = _recipe("N", "width of the model, in the unit of its paper (default: its paper's)")
    pretrained: str | None = _recipe(
        "FILE",
        "initial weights: torchvision, or a file with a state_dict (default: random; imagenet: "
        "torchvision)",
        None,
    )
    methods: tuple[str, ...] = _recipe(
        "NAMES", f"what to compare, separated by commas: {', '.join(METHODS)}", ("sgd", "swa")
    )
    epochs: int = _recipe("N", "budget of a conventional run (default: by dataset)")
    budgets: tuple[float, ...] = _recipe(
        "LIST", "budgets after which averages are reported, separated by commas", (1.0,)
    )
    batch_size: int = _recipe("N", "over all processes (default: by dataset)")
    lr: float = _recipe("RATE", "initial rate (default: by dataset)")
    lr_schedule: str = _recipe(
        "NAME", "of the conventional run: paper, cosine, steps, constant", "paper"
    )
    momentum: float = _recipe("M", "", 0.9)
    nesterov: bool = _recipe("", "Nesterov's momentum", False)
    weight_decay: float = _recipe("W", "L2 on all parameters (default: by dataset)")
    seed: int = _recipe("N", "of weights, order and augmentation", 1)
    swa_start: float = _averaging(
        "FRACTION", "swa and swa-cyclic: fraction of the epochs after which averaging begins", 0.75
    )
    swa_lr: float = _averaging("RATE", "swa: constant rate while averaging (default: by dataset)")
    swa_every: int = _averaging("N", "swa: epochs between captures", 1)
    swa_from: str = _averaging(
        "NAME",
        "swa: scratch (its own run, which decays to --swa-lr, as the authors' code) or sgd (goes "
        "on from the conventional run, as the paper words it) (default: scratch, which needs "
        "--lr-schedule paper; else sgd)",
    )
    cycle_epochs: int | None = _averaging("N", "swa-cyclic: epochs per cycle, required", None)
    cycle_shape: str = _averaging(
        "NAME",
        "swa-cyclic: linear, or cosine, which repeats a stretch of the cosine schedule",
        "linear",
    )
    cycle_lr_max: float = _averaging("RATE", "swa-cyclic: largest rate of a cycle", 0.05)
    cycle_lr_min: float = _averaging("RATE", "swa-cyclic: least rate of a cycle", 0.0005)
    include_initial: bool | None = _averaging(
        "",
        "whether the weights that averaging starts from count (default: only those of a fully "
        "trained or pretrained network)",
        None,
    )
    fge_start: float = _averaging(
        "FRACTION", "fge: fraction of the epochs after which the ensembling begins", 0.8
    )
    fge_cycle: int = _averaging("N", "fge: epochs per cycle, an even number", 2)
    fge_lr_max: float = _averaging("RATE", "fge: largest rate of a cycle", 0.05)
    fge_lr_min: float = _averaging("RATE", "fge: least rate of a cycle", 0.0005)
    ema_epochs: float = _averaging(
        "N",
        "ema: time constant of the average in epochs; with n steps per epoch the decay is "
        "1 - 1/(N*n) at each step",
        1.0,
    )
    fixed_lr: float = _averaging("RATE", "swa-fixed: the constant rate from the first step", 0.05)
    fixed_start: float = _averaging(
        "FRACTION", "swa-fixed: fraction of the epochs after which averaging begins", 0.7
    )
    bn_estimator: str = _averaging(
        "NAME",
        "BatchNorm statistics of averages: weighted (the authors' rule), torch or pooled, see "
        "swa_fast.update_bn",
        "weighted",
    )
    backend: str | None = _averaging("NAME", "averaging backend (default: chosen by device)", None)
    device: str = _machine("NAME", "auto, cpu, cuda or cuda:N", "auto")
    amp: str = _machine(
        "TYPE",
        "mixed precision: none, bf16 (slow on CPUs without bf16 units), or fp16 on CUDA",
        "none",
    )
    channels_last: bool = _machine("", "memory format of images and weights", True)
    compile: bool = _machine("", "torch.compile the network's training step", False)
    sync_bn: bool = _machine("", "several processes: BatchNorm over all of them in training", False)
    threads: int = _machine("N", "CPU threads (default: torch's choice)")
    eval_every: int = _output(
        "N", "epochs between evaluations; those that are reported are always evaluated", 1
    )

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
        expect_name("dataset", dataset, DATASETS)
        defaults = dict(DEFAULTS[dataset])
        if options.get("model", defaults["model"]) != defaults["model"]:
            defaults.pop("width", None)  # in the unit of another model
        given = {**defaults, **options}
        expect_name("model", given["model"], MODELS)
        spec = MODELS[given["model"]]
        values: dict[str, Any] = {
            field.name: default
            for field in dataclasses.fields(cls)
            if (default := field.metadata["default"]) is not RESOLVED
        }
        values.update(
            dataset=dataset,
            normalise=spec.normalise if dataset in _NAMED_NORMALISATION else "dataset",
            workers=min(4, os.cpu_count() or 1),
            width=spec.width,
            threads=torch.get_num_threads(),
        )
        values.update(given)
        values.setdefault("swa_from", "scratch" if values["lr_schedule"] == "paper" else "sgd")
        values["device"] = resolve_device(values["device"])
        return cls(**with_absolute_paths(values))

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
        tuples = {name: tuple(values[name]) for name in ("methods", "budgets")}
        return cls(**{**values, **tuples, "device": resolve_device(values["device"])})

    def to_json(self) -> dict[str, Any]:
        """Settings by name, as JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def last_epoch(self) -> int:
        """The epoch with which the largest budget is spent."""
        return budget_epoch(self.epochs, max(self.budgets))

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings that differ and matter; where the data lie does not (their content
        is compared by itself)."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name != "data_dir" and getattr(self, field.name) != getattr(other, field.name)
        ]

    def __post_init__(self) -> None:
        check_config(self)


# Datasets on which the paper's networks were trained, so that its constants apply.
_NAMED_NORMALISATION = ("cifar10", "cifar100", "imagenet")


def with_absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with the paths among them made absolute."""
    found = dict(options)
    for field in ("data_dir", "pretrained"):
        if found.get(field) not in (None, "torchvision"):
            found[field] = str(Path(found[field]).absolute())
    return found


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
