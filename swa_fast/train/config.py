"""The settings of a training run: defaults, help and ranges of all, and their form on disk."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..schedules import budget_epoch, first_capture
from .data import DATASETS, NORMALISATIONS, check_data_options
from .defaults import ALONG_SWA, DEFAULTS, LATER, METHODS
from .distributed import resolve_device
from .errors import TrainError
from .models import MODELS, spec_of
from .options import (
    COUNT,
    DECAY,
    MOMENTUM,
    RATE,
    RESOLVED,
    SEED,
    START,
    THREADS,
    Kind,
    expect,
    one_of,
    one_of_or_own,
    option,
    option_name,
)

_data, _recipe, _averaging, _machine, _output = (
    partial(option, group) for group in ("data", "recipe", "averaging", "machine", "output")
)


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine the outcome of a run, checked on construction.

    Two runs with equal configurations, data and machine end in the same bits. ``device`` and
    ``threads`` are resolved (no "auto", no None), because results depend on them. Each field is a
    command-line option, with the name of its value, its help and its default.

    Raises:
        TrainError: a value is out of its range, or settings contradict each other; the message
            names the command-line option, the value found and what is expected.
    """

    dataset: str = _data(
        one_of_or_own(*DATASETS),
        f"one of {', '.join(DATASETS)}, or package.module:factory, a function that returns a "
        "training and a test set with their own transforms (default: digits, part of scikit-learn)",
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
        one_of("dataset", *NORMALISATIONS),
        f"pixel mean and deviation: dataset (measured) or one of {', '.join(NORMALISATIONS)} "
        "(default: the paper's for the model on cifar10, cifar100 and imagenet, else dataset)",
    )
    fraction: float = _data("F", "share of every class that is used", 1.0)
    test_fraction: float | None = _data(
        "F", "that of the test images (default: as --fraction)", None
    )
    noise: float = _data(
        "S",
        "standard deviation of Gaussian noise that is added to all images once and for all, of 255 "
        "grey values: makes an easy task harder",
        0.0,
    )
    validation: bool = _data(
        "",
        "measure on the last tenth of the training images (5,000 of CIFAR's; of folders, the last "
        "of every class), which is held out, and never look at the test set: to choose settings by",
        False,
    )
    workers: int = _data(
        Kind("N", "an integer from 0 to 1024", lambda x: 0 <= x <= 1024),
        "processes that decode images, for imagenet (default: as many as cores, 4 at most)",
    )
    model: str = _recipe(
        one_of_or_own(*MODELS),
        f"one of {', '.join(MODELS)}, or package.module:factory, a function that returns a network "
        "and may take num_classes, in_channels and width (default: by dataset)",
    )
    width: int = _recipe(
        COUNT, "width of the model, in the unit of its paper (default: its paper's)"
    )
    pretrained: str | None = _recipe(
        "FILE",
        "initial weights: torchvision, or a file with a state_dict (default: random; imagenet: "
        "torchvision)",
        None,
    )
    bn_gamma: str = _recipe(
        one_of("ones", "uniform"),
        "initial scales of BatchNorm: ones, or uniform in [0, 1), PyTorch's default when the "
        "authors ran WRN-28-10 and VGG16 with BatchNorm",
        "ones",
    )
    methods: tuple[str, ...] = _recipe(
        "NAMES", f"what to compare, separated by commas: {', '.join(METHODS)}", ("sgd", "swa")
    )
    epochs: int = _recipe(COUNT, "budget of a conventional run (default: by dataset)")
    budgets: tuple[float, ...] = _recipe(
        "LIST", "budgets after which averages are reported, separated by commas", (1.0,)
    )
    batch_size: int = _recipe(COUNT, "over all processes (default: by dataset)")
    lr: float = _recipe(RATE, "initial rate (default: by dataset)")
    lr_schedule: str = _recipe(
        one_of("paper", "cosine", "steps", "constant"),
        "of the conventional run: paper, cosine, steps, constant",
        "paper",
    )
    momentum: float = _recipe(MOMENTUM, "", 0.9)
    nesterov: bool = _recipe("", "Nesterov's momentum", False)
    weight_decay: float = _recipe(
        DECAY, "L2 on all parameters, with adamw decoupled from the gradients (default: by dataset)"
    )
    optimizer: str = _recipe(
        one_of("sgd", "adamw"), "sgd, or adamw with betas of 0.9 and 0.999", "sgd"
    )
    warmup_epochs: float = _recipe(
        DECAY._replace(metavar="N"),
        "epochs in which the rate rises linearly from 0 to what it would be without this",
        0.0,
    )
    label_smoothing: float = _recipe(
        Kind("E", "a number in [0, 1)", lambda x: 0 <= x < 1),
        "in the training loss: share of the target that is spread over all classes",
        0.0,
    )
    accumulate: int = _recipe(
        COUNT,
        "parts in which a batch goes through the network, whose gradients add up; BatchNorm sees a "
        "part at a time",
        1,
    )
    seed: int = _recipe(SEED, "of weights, order and augmentation", 1)
    swa_start: float = _averaging(
        START, "swa and swa-cyclic: fraction of the epochs after which averaging begins", 0.75
    )
    swa_lr: float = _averaging(RATE, "swa: constant rate while averaging (default: by dataset)")
    swa_every: int = _averaging(COUNT, "swa: epochs between captures", 1)
    swa_from: str = _averaging(
        one_of("scratch", "sgd"),
        "swa: scratch (its own run, which decays to --swa-lr, as the authors' code) or sgd (goes "
        "on from the conventional run, as the paper words it) (default: scratch, which needs "
        "--lr-schedule paper; else sgd)",
    )
    cycle_epochs: int | None = _averaging("N", "swa-cyclic: epochs per cycle, required", None)
    cycle_shape: str = _averaging(
        one_of("linear", "cosine"),
        "swa-cyclic: linear, or cosine, which repeats a stretch of the cosine schedule",
        "linear",
    )
    cycle_lr_max: float = _averaging(RATE, "swa-cyclic: largest rate of a cycle", 0.05)
    cycle_lr_min: float = _averaging(RATE, "swa-cyclic: least rate of a cycle", 0.0005)
    include_initial: bool | None = _averaging(
        "",
        "whether the weights that averaging starts from count (default: only those of a fully "
        "trained or pretrained network)",
        None,
    )
    fge_start: float = _averaging(
        START, "fge: fraction of the epochs after which the ensembling begins", 0.8
    )
    fge_cycle: int = _averaging("N", "fge: epochs per cycle, an even number", 2)
    fge_lr_max: float = _averaging(RATE, "fge: largest rate of a cycle", 0.05)
    fge_lr_min: float = _averaging(RATE, "fge: least rate of a cycle", 0.0005)
    ema_epochs: float = _averaging(
        Kind("N", RATE.expected, RATE.holds),
        "ema: time constant of the average in epochs; with n steps per epoch the decay is "
        "1 - 1/(N*n) at each step",
        1.0,
    )
    fixed_lr: float = _averaging(RATE, "swa-fixed: the constant rate from the first step", 0.05)
    fixed_start: float = _averaging(
        START, "swa-fixed: fraction of the epochs after which averaging begins", 0.7
    )
    power_gamma: float = _averaging(
        Kind("G", "a finite number above -1", lambda x: math.isfinite(x) and x > -1),
        "swa-power: weights grow with the number of captures to this power; -0.5 stands for a rate "
        "that decays as 1 - sqrt(x)",
        -0.5,
    )
    lawa_last: int = _averaging(
        Kind("N", "a number from 1 to 15", lambda x: 1 <= x <= 15),
        "lawa: captures that are averaged, the last ones",
        5,
    )
    bn_estimator: str = _averaging(
        one_of("weighted", "torch", "pooled"),
        "BatchNorm statistics of averages: weighted (the authors' rule), torch or pooled, see "
        "swa_fast.update_bn",
        "weighted",
    )
    backend: str | None = _averaging("NAME", "averaging backend (default: chosen by device)", None)
    device: str = _machine("NAME", "auto, cpu, cuda or cuda:N", "auto")
    amp: str = _machine(
        Kind("TYPE", *one_of("none", "bf16", "fp16")[1:]),
        "mixed precision: none, bf16 (slow on CPUs without bf16 units), or fp16 on CUDA",
        "none",
    )
    channels_last: bool = _machine("", "memory format of images and weights", True)
    compile: bool = _machine("", "torch.compile the network's training step", False)
    sync_bn: bool = _machine("", "several processes: BatchNorm over all of them in training", False)
    shard: str = _machine(
        one_of("none", "fsdp2"),
        "several processes: divide weights, gradients and momenta among them (fsdp2), or none",
        "none",
    )
    threads: int = _machine(THREADS, "CPU threads (default: torch's choice)")
    eval_every: int = _output(
        COUNT,
        "epochs between evaluations; the first and those that are reported are always evaluated",
        1,
    )
    curve_data: float = _output(
        Kind("F", "a number in [0, 1]", lambda x: 0 <= x <= 1),
        "share of the training batches in BatchNorm passes that only curves need; 0 leaves these "
        "points of the averages out. Reported results have the whole pass",
        1.0,
    )
    keep_captures: bool = _output(
        "", "leave the weights of every capture of the swa run, for swa-fast merge", False
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
        expect("dataset", dataset, one_of_or_own(*DATASETS))
        defaults = dict(DEFAULTS.get(dataset, DEFAULTS["images"]))
        if options.get("model", defaults["model"]) != defaults["model"]:
            defaults.pop("width", None)  # in the unit of another model
        given = {**defaults, **options}
        expect("model", given["model"], one_of_or_own(*MODELS))
        spec = spec_of(given["model"])
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
        expected, values = {field.name for field in dataclasses.fields(cls)}, {**LATER, **values}
        if set(values) != expected:
            missing = ", ".join(sorted(expected - set(values))) or "none"
            unknown = ", ".join(sorted(set(values) - expected)) or "none"
            raise TrainError(
                f"expected the settings of this version; missing: {missing}; unknown: {unknown}"
            )
        try:
            tuples = {name: tuple(values[name]) for name in ("methods", "budgets")}
            return cls(**{**values, **tuples, "device": resolve_device(values["device"])})
        # Conditions ask what only values of the right type can answer.
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise TrainError(f"a setting is of the wrong type ({error})") from error

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
        for field in dataclasses.fields(self):
            expect(field.name, getattr(self, field.name), field.metadata["kind"])
        for name in ("cycle_lr", "fge_lr"):
            most, least = getattr(self, f"{name}_max"), getattr(self, f"{name}_min")
            limit = f"{most} ({option_name(name)}-max) at most"
            expect(f"{name}_min", least, limit, least <= most)
        if self.nesterov:
            expect("momentum", self.momentum, "a number above 0 with --nesterov", self.momentum > 0)
        limit = f"{self.batch_size} (--batch-size) at most"
        expect("accumulate", self.accumulate, limit, self.accumulate <= self.batch_size)
        _check_methods(self)
        _check_machine(self)
        data = (self.image_size, self.fraction, self.test_fraction, self.noise, self.normalise)
        check_data_options(self.dataset, self.data_dir, *data)
        if self.pretrained == "torchvision" and spec_of(self.model).image_size != 224:
            raise TrainError(
                f"--pretrained: torchvision has weights of resnet50, resnet152 and densenet161, "
                f"found --model {self.model}"
            )
        limit = "ones with --pretrained, whose scales are trained"
        expect("bn_gamma", self.bn_gamma, limit, self.pretrained is None or self.bn_gamma == "ones")


def _check_methods(config: TrainConfig) -> None:
    methods, budgets = config.methods, config.budgets
    if not methods or len(set(methods)) != len(methods):
        raise TrainError(
            f"--methods: expected different names of {', '.join(METHODS)}, found "
            f"{','.join(methods) or 'nothing'}"
        )
    for method in methods:
        expect("methods", method, one_of(*METHODS))
    if (
        any(method in ALONG_SWA for method in methods)
        and config.swa_from == "scratch"
        and config.lr_schedule != "paper"
    ):
        # The authors' schedule of a run of its own belongs to their conventional one.
        raise TrainError(
            f"--swa-from: expected sgd with --lr-schedule {config.lr_schedule}, found scratch"
        )
    if not budgets or not all(math.isfinite(b) and 0 < b <= 100 for b in budgets):
        raise TrainError(
            f"--budgets: expected numbers in (0, 100], found "
            f"{', '.join(str(b) for b in budgets) or 'nothing'}"
        )
    expect("budgets", budgets, "rising numbers", list(budgets) == sorted(set(budgets)))
    for field, method in (
        *(("swa_start", method) for method in ALONG_SWA),
        ("swa_start", "swa-cyclic"),
        ("fge_start", "fge"),
        ("fixed_start", "swa-fixed"),
    ):
        if method in methods:
            _check_start(config, field, method)
    if "swa-cyclic" in methods:
        _check_cycle(config)
    if "fge" in methods:
        cycle, left = config.fge_cycle, _left(config, config.epochs, config.fge_start)
        expect("fge_cycle", cycle, "an even number of epochs", cycle >= 2 and cycle % 2 == 0)
        limit = f"a half cycle within the {left} epochs that are left after --fge-start"
        expect("fge_cycle", cycle, limit, cycle // 2 <= left)


def _left(config: TrainConfig, end: int, start: float) -> int:
    """Epochs up to ``end`` that begin after a fraction of the conventional run."""
    return end - (first_capture(config.epochs, start) - 1)


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
    if method in ("swa-cyclic", "fge") or (method in ALONG_SWA and config.swa_from == "sgd"):
        limit = f"1 at most for {method}, which continues the SGD run"
        expect(field, start, limit, start <= 1)


def _check_cycle(config: TrainConfig) -> None:
    cycle = config.cycle_epochs
    if cycle is None:
        raise TrainError("--cycle-epochs: expected with the method swa-cyclic, found none")
    expect("cycle_epochs", cycle, COUNT)
    if config.cycle_shape == "cosine":
        limit = f"at most half of the {config.epochs} epochs with --cycle-shape cosine"
        expect("cycle_epochs", cycle, limit, 2 * cycle <= config.epochs)
    left = _left(config, config.last_epoch, config.swa_start)
    limit = f"at most the {left} epochs that are left after --swa-start"
    expect("cycle_epochs", cycle, limit, cycle <= left)


def _check_machine(config: TrainConfig) -> None:
    if config.shard != "none" and config.compile:
        raise TrainError("--shard: expected it without --compile, found both")
    if config.shard != "none" and "swag" in config.methods:
        raise TrainError("--shard: expected methods other than swag, whose samples are whole")
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


# Datasets on which the paper's networks were trained, so that its constants apply.
_NAMED_NORMALISATION = ("cifar10", "cifar100", "imagenet")


def with_absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with the paths among them made absolute."""
    found = dict(options)
    for field in ("data_dir", "pretrained"):
        if found.get(field) not in (None, "torchvision"):
            found[field] = str(Path(found[field]).absolute())
    return found
