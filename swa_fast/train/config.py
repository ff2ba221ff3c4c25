"""The settings of a training run: options, defaults, checks, and their form on disk."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..schedules import budget_epoch, first_capture
from .data import DATASETS, NORMALISATIONS
from .errors import TrainError
from .models import MODELS

__all__ = [
    "DEFAULTS",
    "METHODS",
    "TrainConfig",
    "option_name",
    "resolve_device",
    "with_absolute_paths",
]

#: Training methods by name, with the titles that tables give their results.
METHODS: dict[str, str] = {
    "sgd": "SGD",
    "ema": "EMA",
    "fge": "FGE",
    "swa": "SWA",
    "swa-cyclic": "SWA, cyclic",
    "swa-fixed": "SWA, fixed rate",
}

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
    "digits": {
        "model": "preresnet14",
        "width": 8,
        "epochs": 30,
        "batch_size": 32,
        "lr": 0.1,
        "swa_lr": 0.05,
        "weight_decay": 5e-4,
    },
    "synthetic": {
        "model": "preresnet8",
        "width": 8,
        "epochs": 12,
        "batch_size": 128,
        "lr": 0.1,
        "swa_lr": 0.05,
        "weight_decay": 5e-4,
    },
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

_AMP = ("none", "bf16", "fp16")
_SCHEDULES = ("paper", "cosine", "steps", "constant")


def option_name(field: str) -> str:
    """The command-line option that sets a field, for messages."""
    return "--" + field.replace("_", "-")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"expected numbers separated by commas, found {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _option(group: str, help: str, metavar: str, parse: Callable[[str], Any] | None = str) -> Any:
    """A field that is a command-line option; ``parse`` None makes it a switch (--x, --no-x)."""
    return dataclasses.field(
        metadata={"group": group, "help": help, "metavar": metavar, "parse": parse}
    )


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine the outcome of a run, checked on construction.

    Two runs with equal configurations, data and machine end in the same bits. ``device`` and
    ``threads`` are resolved (no "auto", no None), because results depend on them. Each field's
    metadata is the help of its command-line option.

    Raises:
        TrainError: a value is out of its range, or settings contradict each other; the message
            names the command-line option, the value found and what is expected.
    """

    dataset: str = _option(
        "data", f"one of {', '.join(DATASETS)} (default: digits, part of scikit-learn)", "NAME"
    )
    data_dir: str | None = _option(
        "data",
        "where the data lie or, for torchvision's datasets, are downloaded to (default: "
        "data/<dataset>); for images a folder with train/<class>/ and test/<class>/; for imagenet "
        "one with train/<class>/ and val/<class>/",
        "DIR",
    )
    image_size: int | None = _option(
        "data", "resize all images to NxN (default: as they are; imagenet: 224)", "N", int
    )
    normalise: str = _option(
        "data",
        f"pixel mean and deviation: dataset (measured) or one of {', '.join(NORMALISATIONS)} "
        "(default: the paper's for the model on cifar10, cifar100 and imagenet, else dataset)",
        "NAME",
    )
    fraction: float = _option("data", "share of every class that is used (default: 1)", "F", float)
    workers: int = _option(
        "data",
        "processes that decode images, for imagenet (default: as many as cores, 4 at most)",
        "N",
        int,
    )
    model: str = _option("recipe", f"one of {', '.join(MODELS)} (default: by dataset)", "NAME")
    width: int = _option(
        "recipe", "width of the model, in the unit of its paper (default: its paper's)", "N", int
    )
    pretrained: str | None = _option(
        "recipe",
        "initial weights: torchvision, or a file with a state_dict (default: random; imagenet: "
        "torchvision)",
        "FILE",
    )
    methods: tuple[str, ...] = _option(
        "recipe",
        f"what to compare, separated by commas: {', '.join(METHODS)} (default: sgd,swa)",
        "NAMES",
        _names,
    )
    epochs: int = _option("recipe", "budget of a conventional run (default: by dataset)", "N", int)
    budgets: tuple[float, ...] = _option(
        "recipe",
        "budgets after which averages are reported, separated by commas (default: 1)",
        "LIST",
        _numbers,
    )
    batch_size: int = _option("recipe", "over all processes (default: by dataset)", "N", int)
    lr: float = _option("recipe", "initial rate (default: by dataset)", "RATE", float)
    lr_schedule: str = _option(
        "recipe",
        f"of the conventional run: {', '.join(_SCHEDULES)} (default: paper)",
        "NAME",
    )
    momentum: float = _option("recipe", "(default: 0.9)", "M", float)
    nesterov: bool = _option("recipe", "Nesterov's momentum (default: off)", "", None)
    weight_decay: float = _option(
        "recipe", "L2 on all parameters (default: by dataset)", "W", float
    )
    seed: int = _option("recipe", "of weights, order and augmentation (default: 1)", "N", int)
    swa_start: float = _option(
        "averaging",
        "swa and swa-cyclic: fraction of the epochs after which averaging begins (default: 0.75)",
        "FRACTION",
        float,
    )
    swa_lr: float = _option(
        "averaging", "swa: constant rate while averaging (default: by dataset)", "RATE", float
    )
    swa_every: int = _option("averaging", "swa: epochs between captures (default: 1)", "N", int)
    swa_from: str = _option(
        "averaging",
        "swa: scratch (its own run, which decays to --swa-lr, as the authors' code) or sgd (goes "
        "on from the conventional run, as the paper words it) (default: scratch, which needs "
        "--lr-schedule paper; else sgd)",
        "NAME",
    )
    cycle_epochs: int | None = _option(
        "averaging", "swa-cyclic: epochs per cycle, required", "N", int
    )
    cycle_shape: str = _option(
        "averaging",
        "swa-cyclic: linear, or cosine, which repeats a stretch of the cosine schedule (default: "
        "linear)",
        "NAME",
    )
    cycle_lr_max: float = _option(
        "averaging", "swa-cyclic: largest rate of a cycle (default: 0.05)", "RATE", float
    )
    cycle_lr_min: float = _option(
        "averaging", "swa-cyclic: least rate of a cycle (default: 0.0005)", "RATE", float
    )
    include_initial: bool | None = _option(
        "averaging",
        "whether the weights that averaging starts from count (default: only those of a fully "
        "trained or pretrained network)",
        "",
        None,
    )
    fge_start: float = _option(
        "averaging",
        "fge: fraction of the epochs after which the ensembling begins (default: 0.8)",
        "FRACTION",
        float,
    )
    fge_cycle: int = _option(
        "averaging", "fge: epochs per cycle, an even number (default: 2)", "N", int
    )
    fge_lr_max: float = _option(
        "averaging", "fge: largest rate of a cycle (default: 0.05)", "RATE", float
    )
    fge_lr_min: float = _option(
        "averaging", "fge: least rate of a cycle (default: 0.0005)", "RATE", float
    )
    ema_epochs: float = _option(
        "averaging",
        "ema: time constant of the average in epochs; with n steps per epoch the decay is "
        "1 - 1/(N*n) at each step (default: 1)",
        "N",
        float,
    )
    fixed_lr: float = _option(
        "averaging",
        "swa-fixed: the constant rate from the first step (default: 0.05)",
        "RATE",
        float,
    )
    fixed_start: float = _option(
        "averaging",
        "swa-fixed: fraction of the epochs after which averaging begins (default: 0.7)",
        "FRACTION",
        float,
    )
    bn_estimator: str = _option(
        "averaging",
        "BatchNorm statistics of averages: weighted (the authors' rule), torch or pooled, see "
        "swa_fast.update_bn (default: weighted)",
        "NAME",
    )
    backend: str | None = _option(
        "averaging", "averaging backend (default: chosen by device)", "NAME"
    )
    device: str = _option("machine", "auto, cpu, cuda or cuda:N (default: auto)", "NAME")
    amp: str = _option(
        "machine",
        "mixed precision: none, bf16 (slow on CPUs without bf16 units), or fp16 on CUDA (default: "
        "none)",
        "TYPE",
    )
    channels_last: bool = _option(
        "machine", "memory format of images and weights (default: on)", "", None
    )
    compile: bool = _option(
        "machine", "torch.compile the network's training step (default: off)", "", None
    )
    sync_bn: bool = _option(
        "machine",
        "several processes: BatchNorm over all of them in training (default: off)",
        "",
        None,
    )
    threads: int = _option("machine", "CPU threads (default: torch's choice)", "N", int)
    eval_every: int = _option(
        "output",
        "epochs between evaluations; those that are reported are always evaluated (default: 1)",
        "N",
        int,
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
        _expect_name("dataset", dataset, DATASETS)
        model = options.get("model", DEFAULTS[dataset]["model"])
        _expect_name("model", model, MODELS)
        spec = MODELS[model]
        values: dict[str, Any] = {
            "dataset": dataset,
            "data_dir": None,
            "image_size": None,
            "normalise": spec.normalise if dataset in _NAMED_NORMALISATION else "dataset",
            "fraction": 1.0,
            "workers": min(4, os.cpu_count() or 1),
            "width": spec.width,
            "pretrained": None,
            "methods": ("sgd", "swa"),
            "budgets": (1.0,),
            "lr_schedule": "paper",
            "momentum": 0.9,
            "nesterov": False,
            "seed": 1,
            "swa_start": 0.75,
            "swa_every": 1,
            "cycle_epochs": None,
            "cycle_shape": "linear",
            "cycle_lr_max": 0.05,
            "cycle_lr_min": 0.0005,
            "include_initial": None,
            "fge_start": 0.8,
            "fge_cycle": 2,
            "fge_lr_max": 0.05,
            "fge_lr_min": 0.0005,
            "ema_epochs": 1.0,
            "fixed_lr": 0.05,
            "fixed_start": 0.7,
            "bn_estimator": "weighted",
            "backend": None,
            "device": "auto",
            "amp": "none",
            "channels_last": True,
            "compile": False,
            "sync_bn": False,
            "threads": torch.get_num_threads(),
            "eval_every": 1,
        }
        defaults = dict(DEFAULTS[dataset])
        if "model" in options and options["model"] != defaults["model"]:
            defaults.pop("width", None)  # in the unit of another model
        values.update(defaults)
        values.update(options)
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
        _expect_name("dataset", self.dataset, DATASETS)
        _expect_name("model", self.model, MODELS)
        _expect_name("normalise", self.normalise, ("dataset", *NORMALISATIONS))
        _expect_name("amp", self.amp, _AMP)
        _expect_name("lr_schedule", self.lr_schedule, _SCHEDULES)
        _expect_name("swa_from", self.swa_from, ("scratch", "sgd"))
        _expect_name("cycle_shape", self.cycle_shape, ("linear", "cosine"))
        _expect_name("bn_estimator", self.bn_estimator, ("weighted", "torch", "pooled"))
        for field in ("width", "epochs", "batch_size", "threads", "eval_every", "swa_every"):
            _expect(field, self, getattr(self, field) >= 1, "1 or more")
        _expect("workers", self, self.workers >= 0, "0 or more")
        for field in (
            "lr",
            "swa_lr",
            "fixed_lr",
            "cycle_lr_max",
            "cycle_lr_min",
            "fge_lr_max",
            "fge_lr_min",
        ):
            value = getattr(self, field)
            _expect(field, self, math.isfinite(value) and value > 0, "a finite number above 0")
        for field in ("cycle_lr", "fge_lr"):
            largest = getattr(self, f"{field}_max")
            _expect(
                f"{field}_min",
                self,
                getattr(self, f"{field}_min") <= largest,
                f"{largest} ({option_name(field)}-max) at most",
            )
        _expect(
            "weight_decay",
            self,
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "a finite number of 0 or more",
        )
        _expect("momentum", self, 0 <= self.momentum < 1, "a number in [0, 1)")
        if self.nesterov:
            _expect("momentum", self, self.momentum > 0, "a number above 0 with --nesterov")
        _expect("seed", self, 0 <= self.seed < 2**63, "an integer in [0, 2^63)")
        _expect("fraction", self, 0 < self.fraction <= 1, "a number in (0, 1]")
        _expect(
            "ema_epochs",
            self,
            math.isfinite(self.ema_epochs) and self.ema_epochs > 0,
            "a finite number above 0",
        )
        self._check_methods()
        self._check_machine()
        self._check_data()

    def _check_methods(self) -> None:
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise TrainError(
                f"--methods: expected different names of {', '.join(METHODS)}, found "
                f"{','.join(self.methods) or 'nothing'}"
            )
        for method in self.methods:
            _expect_name("methods", method, METHODS)
        if "swa" in self.methods and self.swa_from == "scratch" and self.lr_schedule != "paper":
            # The authors' schedule of a run of its own belongs to their conventional one.
            raise TrainError(
                f"--swa-from: expected sgd with --lr-schedule {self.lr_schedule}, found scratch"
            )
        if not self.budgets or not all(math.isfinite(b) and 0 < b <= 100 for b in self.budgets):
            raise TrainError(
                f"--budgets: expected numbers in (0, 100], found "
                f"{', '.join(str(b) for b in self.budgets) or 'nothing'}"
            )
        _expect("budgets", self, list(self.budgets) == sorted(set(self.budgets)), "rising numbers")
        for field in ("swa_start", "fge_start", "fixed_start"):
            start = getattr(self, field)
            _expect(field, self, math.isfinite(start) and start >= 0, "a fraction of 0 or more")
        for field, method in (
            ("swa_start", "swa"),
            ("swa_start", "swa-cyclic"),
            ("fge_start", "fge"),
            ("fixed_start", "swa-fixed"),
        ):
            if method in self.methods:
                self._check_start(field, method)
        if "swa-cyclic" in self.methods:
            if self.cycle_epochs is None:
                raise TrainError("--cycle-epochs: expected with the method swa-cyclic, found none")
            _expect("cycle_epochs", self, self.cycle_epochs >= 1, "1 or more")
            if self.cycle_shape == "cosine":
                _expect(
                    "cycle_epochs",
                    self,
                    2 * self.cycle_epochs <= self.epochs,
                    f"at most half of the {self.epochs} epochs with --cycle-shape cosine",
                )
            begin = first_capture(self.epochs, self.swa_start) - 1
            if begin + self.cycle_epochs > self.last_epoch:
                raise TrainError(
                    f"--cycle-epochs: expected at most the {self.last_epoch - begin} epochs that "
                    f"are left after --swa-start, found {self.cycle_epochs}"
                )
        if "fge" in self.methods:
            _expect(
                "fge_cycle",
                self,
                self.fge_cycle >= 2 and self.fge_cycle % 2 == 0,
                "an even number of epochs",
            )
            left = self.epochs - (first_capture(self.epochs, self.fge_start) - 1)
            if self.fge_cycle // 2 > left:
                raise TrainError(
                    f"--fge-cycle: expected a half cycle within the {left} epochs that are left "
                    f"after --fge-start, found {self.fge_cycle}"
                )

    def _check_start(self, field: str, method: str) -> None:
        start = getattr(self, field)
        first = first_capture(self.epochs, start)
        end = self.epochs if method == "fge" else self.last_epoch
        if first > end:
            raise TrainError(
                f"{option_name(field)}: expected a fraction that leaves an epoch to average, found "
                f"{start}, i.e. a first average after epoch {first} of {end} ({method})"
            )
        # These go on from the conventional run, which has `epochs` epochs.
        continues = method in ("swa-cyclic", "fge") or (method == "swa" and self.swa_from == "sgd")
        if continues:
            _expect(field, self, start <= 1, f"1 at most for {method}, which continues the SGD run")

    def _check_machine(self) -> None:
        if self.amp == "fp16" and torch.device(self.device).type != "cuda":
            raise TrainError(
                f"--amp: fp16 needs a CUDA device, found device {self.device}; expected none or "
                f"bf16 here"
            )
        if self.sync_bn and torch.device(self.device).type != "cuda":
            raise TrainError(
                f"--sync-bn: torch's SyncBatchNorm needs a CUDA device, found device {self.device}"
            )

    def _check_data(self) -> None:
        if self.image_size is not None:
            _expect("image_size", self, self.image_size >= 8, "8 or more pixels")
        if self.dataset in ("images", "imagenet"):
            if self.data_dir is None:
                parts = "train/<class>/ and test/<class>/"
                if self.dataset == "imagenet":
                    parts = "train/<class>/ and val/<class>/"
                raise TrainError(
                    f"--data-dir: expected a folder with {parts} for --dataset {self.dataset}, "
                    f"found nothing"
                )
        elif self.dataset in ("digits", "synthetic") and self.data_dir is not None:
            raise TrainError(
                f"--data-dir: expected only with datasets that are files, found it with --dataset "
                f"{self.dataset}"
            )
        if self.pretrained == "torchvision" and MODELS[self.model].image_size != 224:
            raise TrainError(
                f"--pretrained: torchvision has weights of resnet50, resnet152 and densenet161, "
                f"found --model {self.model}"
            )


# Datasets on which the paper's networks were trained, so that its constants apply.
_NAMED_NORMALISATION = ("cifar10", "cifar100", "imagenet")


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
