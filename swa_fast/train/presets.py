"""The paper's experiments by name: settings, published results, and smaller versions of them.

Sources: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
UAI 2018, arXiv 1803.05407, with its authors' code; FGE settings and results: Garipov et al.,
NeurIPS 2018, arXiv 1802.10026; Shake-Shake: Gastaldi, arXiv 1705.07485; PyramidNet: Han et al.,
CVPR 2017, arXiv 1610.02915.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..schedules import first_capture
from .config import TrainConfig
from .defaults import DEFAULTS
from .errors import TrainError
from .methods import plan
from .models import build_model, forward_macs, spec_of

#: Accuracy and its standard deviation, by method (None for a pretrained network) and budget.
Published = Mapping[tuple[str | None, float], tuple[float, float | None]]


@dataclass(frozen=True)
class Preset:
    """An experiment of the paper.

    Attributes:
        options: settings by name, as for :meth:`TrainConfig.from_options`.
        published: test accuracies in percent, where the paper gives any.
    """

    options: Mapping[str, Any]
    published: Published = field(default_factory=dict)


# What the authors' code has in common for VGG, PreResNet and WRN, and what it has not.
_COMMON: dict[str, Any] = {
    "batch_size": 128,
    "momentum": 0.9,
    "budgets": (1.0, 1.25, 1.5),
    "methods": ("sgd", "fge", "swa"),
    "fge_lr_min": 5e-4,
    "eval_every": 5,
}
# The FGE paper gives cycles and members (22, 12 and 6 in one budget): so it starts 44, 48 and 24
# epochs before the end.
_RATES = ("lr", "weight_decay", "swa_start", "swa_lr", "fge_start", "fge_cycle", "fge_lr_max")
_CODE: dict[str, dict[str, Any]] = {
    row[0]: {**_COMMON, **dict(zip(("model", "epochs", *_RATES), row, strict=True))}
    for row in (
        ("vgg16", 200, 0.05, 5e-4, 160 / 200, 0.01, 156 / 200, 2, 0.01),
        ("preresnet164", 150, 0.1, 3e-4, 125 / 150, 0.05, 102 / 150, 4, 0.05),
        ("preresnet110", 150, 0.1, 3e-4, 125 / 150, 0.05, 102 / 150, 4, 0.05),
        ("wrn28-10", 200, 0.1, 5e-4, 160 / 200, 0.05, 176 / 200, 4, 0.05),
    )
}
_PRERESNET, _WRN = _CODE["preresnet164"], _CODE["wrn28-10"]

# Long runs that end before the averaging begins, with cycles from the trained network on.
_CYCLIC: dict[str, Any] = {
    "methods": ("sgd", "swa-cyclic"),
    "budgets": (1.25, 1.5),
    "batch_size": 128,
    "nesterov": True,
    "weight_decay": 1e-4,
    "swa_start": 1.0,
}
_PYRAMIDNET: dict[str, Any] = {
    **_CYCLIC,
    "model": "pyramidnet272",
    "epochs": 300,
    # Published for CIFAR-100 with four GPUs; that of the paper's own run is not known.
    "lr": 0.5,
    "lr_schedule": "steps",
    "cycle_epochs": 3,
    "cycle_lr_max": 0.05,
    "cycle_lr_min": 0.001,
    "eval_every": 5,
}
_SHAKE_SHAKE: dict[str, Any] = {
    **_CYCLIC,
    "model": "shakeshake26-2x64d",
    "epochs": 1800,
    "lr": 0.2,
    "lr_schedule": "cosine",
    "cycle_epochs": 100,
    "cycle_shape": "cosine",
    "eval_every": 25,
}
_CIFAR = {**_CODE, "pyramidnet272": _PYRAMIDNET, "shakeshake26-2x64d": _SHAKE_SHAKE}

# The paper's tables: test accuracies with their standard deviations, of SGD, then of the average at
# every budget of the recipe, and of FGE, for which none is given. PreResNet-110 is in the authors'
# repository only.
_PUBLISHED = """
cifar100 vgg16               72.55 0.10   73.91 0.12   74.17 0.15   74.27 0.25   74.26
cifar100 preresnet164        78.49 0.36   79.77 0.17   80.18 0.23   80.35 0.16   79.84
cifar100 preresnet110        76.77 0.38   78.75 0.16   78.91 0.29   79.10 0.21
cifar100 wrn28-10            80.82 0.23   81.46 0.23   81.91 0.27   82.15 0.27   82.27
cifar100 pyramidnet272       83.41 0.21   83.93 0.18   84.16 0.15
cifar10  vgg16               93.25 0.16   93.59 0.16   93.70 0.22   93.64 0.18   93.52
cifar10  preresnet164        95.28 0.10   95.56 0.11   95.77 0.04   95.83 0.03   95.45
cifar10  preresnet110        95.03 0.05   95.51 0.10   95.65 0.03   95.82 0.03
cifar10  wrn28-10            96.18 0.11   96.45 0.11   96.64 0.08   96.79 0.05   96.36
cifar10  shakeshake26-2x64d  96.93 0.10   97.16 0.10   97.12 0.06
"""
# FGE in its authors' repository: of one budget, and of the members of two and three runs together;
# and the network by itself.
_PUBLISHED_FGE = """
vgg16         72.5 0.1   74.6 0.1   76.1   76.6   0.01
preresnet164  78.4 0.1   80.3 0.2   81.3   81.7   0.05
wrn28-10      80.8 0.3   82.3 0.2   82.9   83.2   0.05
"""
# For ImageNet: the pretrained network, and the average after half a budget and a whole one.
_PUBLISHED_IMAGENET = """
resnet50     76.15   76.83 0.01   76.97 0.05
resnet152    78.31   78.82 0.01   78.94 0.07
densenet161  77.65   78.26 0.09   78.44 0.06
"""


def _tables() -> Iterator[tuple[str, Preset]]:
    for line in _PUBLISHED.strip().splitlines():
        dataset, network, *text = line.split()
        options = {**_CIFAR[network], "dataset": dataset}
        if network.startswith("preresnet") and dataset == "cifar10":
            options["swa_lr"] = 0.01
        average, numbers = options["methods"][-1], [float(number) for number in text]
        keys = [("sgd", 1.0), *((average, budget) for budget in options["budgets"])]
        published: dict[tuple[str | None, float], tuple[float, float | None]] = {
            key: (numbers[2 * i], numbers[2 * i + 1]) for i, key in enumerate(keys)
        }
        if len(numbers) > 2 * len(keys):
            published["fge", 1.0] = (numbers[-1], None)
        yield f"{dataset}-{network}", Preset(options, published)
    for line in _PUBLISHED_IMAGENET.strip().splitlines():
        model, *text = line.split()
        before, half, half_std, whole, whole_std = map(float, text)
        yield (
            f"imagenet-{model}",
            Preset(
                {**DEFAULTS["imagenet"], "dataset": "imagenet", "model": model},
                {
                    (None, 0.0): (before, None),
                    ("swa-cyclic", 0.5): (half, half_std),
                    ("swa-cyclic", 1.0): (whole, whole_std),
                },
            ),
        )


def _studies() -> Iterator[tuple[str, Preset]]:
    def preset(base: Mapping[str, Any], *methods: str, **options: Any) -> Preset:
        return Preset({**base, "dataset": "cifar100", "methods": methods, **options})

    # FGE as its authors' repository runs it: from epoch 160 of 200, 20 members.
    for line in _PUBLISHED_FGE.strip().splitlines():
        model, *text = line.split()
        sgd, sgd_std, one, one_std, two, three, high = map(float, text)
        options = {"epochs": 200, "fge_start": 160 / 200, "fge_cycle": 2, "budgets": (1.0,)}
        rates = {"fge_lr_max": high, "fge_lr_min": 0.01}
        found = preset(_CODE[model], "sgd", "fge", **options, **rates)
        published: Published = {
            ("sgd", 1.0): (sgd, sgd_std),
            ("fge", 1.0): (one, one_std),
            ("fge", 2.0): (two, None),
            ("fge", 3.0): (three, None),
        }
        yield f"cifar100-{model}-fge", Preset(found.options, published)
    # The paper's study of the learning rate: curves over all epochs.
    curves: dict[str, Any] = {"eval_every": 1, "curve_data": 0.1}
    study = {**_PRERESNET, **curves, "budgets": (1.0,), "swa_from": "sgd", "cycle_epochs": 5}
    for high in (0.1, 0.05, 0.01, 0.005):
        cycle = {"cycle_lr_max": high, "cycle_lr_min": high / 100}
        yield (
            f"cifar100-preresnet164-cyclic-{high:g}",
            preset(study, "sgd", "swa-cyclic", **cycle),
        )
    for rate in (0.1, 0.05, 0.01, 0.001):
        yield f"cifar100-preresnet164-constant-{rate:g}", preset(study, "sgd", "swa", swa_lr=rate)
    # A fixed rate from scratch; that of PreResNet is in the appendix.
    curves["budgets"] = (1.5,)
    fixed = preset(_WRN, "swa-fixed", fixed_lr=0.05, fixed_start=139 / 200, **curves)
    yield "cifar100-wrn28-10-fixed", Preset(fixed.options, {("swa-fixed", 1.5): (81.7, None)})
    yield (
        "cifar100-preresnet164-fixed",
        preset(_PRERESNET, "swa-fixed", fixed_lr=0.1, fixed_start=199 / 150, **curves),
    )
    # The rate of the paper's text, where its code has 0.05.
    for dataset in ("cifar100", "cifar10"):
        yield (
            f"{dataset}-wrn28-10-lower",
            preset(_WRN, "sgd", "swa", swa_lr=0.01, dataset=dataset),
        )
    # An exponential moving average with one update per step.
    yield "cifar100-preresnet164-ema", preset(_PRERESNET, "sgd", "ema")
    # Everything at once, for machines that the paper's networks would keep busy for months.
    small = {**_PRERESNET, "swa_start": 0.75, "fge_start": 0.75, "swa_lr": 0.01}
    small.update(cycle_epochs=2, fge_cycle=2, methods=("sgd", "ema", "fge", "swa", "swa-cyclic"))
    for dataset, model, decay in (
        ("cifar10", "preresnet20", 3e-4),
        ("fashion-mnist", "wrn28-2", 5e-4),
    ):
        options = {"dataset": dataset, "model": model, "weight_decay": decay}
        yield f"{dataset}-{model}", Preset({**small, **options})
    # The claims of the paper on two CPU cores: a network that a quarter of an hour trains by all
    # methods, on a tenth of CIFAR-10 at half its side.
    yield (
        "cifar10-small",
        Preset(
            {
                **{"dataset": "cifar10", "image_size": 16, "fraction": 0.1, "test_fraction": 1.0},
                **{"model": "preresnet14", "width": 16, "epochs": 80, "batch_size": 32},
                **{"lr": 0.05, "weight_decay": 5e-4, "budgets": (1.0, 1.25, 1.5)},
                "methods": ("sgd", "ema", "fge", "swa", "swa-cyclic", "swa-fixed"),
                **{"swa_from": "sgd", "swa_start": 0.75, "swa_lr": 0.02},
                **{"cycle_epochs": 2, "cycle_lr_max": 0.05, "cycle_lr_min": 5e-4},
                **{"fge_start": 0.75, "fge_cycle": 2, "fge_lr_max": 0.05, "fge_lr_min": 5e-4},
                **{"fixed_lr": 0.05, "fixed_start": 0.7, "eval_every": 5, "keep_captures": True},
            }
        ),
    )
    # What `make demo` runs: two hundred of scikit-learn's digits under noise, and all test images.
    yield (
        "digits",
        Preset(
            {
                **{"dataset": "digits", "fraction": 0.14, "test_fraction": 1.0, "noise": 60.0},
                **{"model": "preresnet8", "width": 8, "epochs": 60, "batch_size": 32},
                **{"lr": 0.1, "weight_decay": 5e-4, "swa_lr": 0.05, "swa_from": "sgd"},
                **{"methods": ("sgd", "ema", "swa"), "budgets": (1.0,), "eval_every": 6},
            }
        ),
    )


#: The presets by name, in the order of the paper.
PRESETS: dict[str, Preset] = {**dict(_tables()), **dict(_studies())}

# Settings that tell runs of one experiment apart: its repetitions, and where they were made.
REPETITION = ("seed", "data_dir", "threads", "device", "eval_every", "workers", "backend")

# Images of the datasets that are not counted before they are loaded.
_IMAGES = {"imagenet": 1_281_167, "fashion-mnist": 60_000, "digits": 1437, "synthetic": 2000}
_CIFAR_IMAGES = 50_000


def scaled(options: Mapping[str, Any], scale: float) -> dict[str, Any]:
    r"""Settings of a smaller experiment of the same form.

    Epochs and cycles shrink by ``scale``, the data to ``scale`` times the 50,000 images of CIFAR,
    the network's width by its square root, and so do images of 224 pixels, and smaller ones below a
    scale of 0.05. Rates, the batch size and all fractions stay. Below full scale pretrained weights
    do not fit and are left out.

    What makes the method stays: there are as many epochs as it takes for the first capture to come
    after the rate has become constant, and for four captures (or all, where there are fewer) by the
    first budget that is reported, of FGE four members or a third of all; 8 epochs (or all) at
    least. Cycles have one epoch at least, FGE's an even number; networks a width of 4; images 8
    pixels, or what the network is meant for. Some images of every class remain.

    Args:
        options: settings by name.
        scale: in (0, 1].

    Raises:
        TrainError: ``scale`` is not in (0, 1].
    """
    if not 0 < scale <= 1:
        raise TrainError(f"--scale: expected a number in (0, 1], found {scale}")
    found = dict(options)
    if scale == 1:
        return found
    spec = spec_of(found["model"])
    side = math.sqrt(scale)
    if "fge_cycle" in found:
        found["fge_cycle"] = max(2, 2 * round(found["fge_cycle"] * scale / 2))
    found["eval_every"] = max(1, round(found.get("eval_every", 1) * scale))
    found["width"] = max(4, round(found.get("width", spec.width) * side))
    images = _IMAGES.get(found["dataset"], _CIFAR_IMAGES)
    found["fraction"] = min(1.0, found.get("fraction", 1.0) * scale * _CIFAR_IMAGES / images)
    if spec.image_size == 224:
        found["image_size"] = max(32, 32 * round(224 * side / 32))
        found["pretrained"] = None
    elif scale < 0.05 and found["dataset"] != "digits":
        found["image_size"] = max(spec.min_size, 8 * round(4 * math.sqrt(scale / 0.05)))
    least, epochs = _captures(_config(options)), options["epochs"]
    for found["epochs"] in range(max(min(epochs, 8), round(epochs * scale)), epochs + 1):
        if found.get("cycle_epochs") is not None:
            cycle = max(1, round(options["cycle_epochs"] * scale))
            found["cycle_epochs"] = min(cycle, found["epochs"] // 2)
        with suppress(TrainError):  # too few epochs for a capture
            config = _config(found)
            kept = _captures(config)
            enough = all(
                kept[key] >= min(4, n // 3 if key.startswith("fge") else n)
                for key, n in least.items()
            )
            if enough and first_rate(config) == config.swa_lr:
                break
    return found


def _captures(config: TrainConfig) -> dict[str, int]:
    """How many weights every method has captured by the first budget that it reports, without the
    initial ones."""
    return {
        method: sum(
            captured(e) for e in range(each.begin + 1, min(each.marks[method].values()) + 1)
        )
        for each in plan(config)
        for method, captured in each.captures.items()
        if captured is not None
    }


def first_rate(config: TrainConfig) -> float:
    """The rate of the last steps before swa's first capture, which is ``swa_lr`` unless the epochs
    are so few that it is still falling."""
    first = first_capture(config.epochs, config.swa_start)
    for trajectory in plan(config):
        if trajectory.name == "swa":
            rate = trajectory.rate(first - 1, 0, 1)
            return config.swa_lr if math.isclose(rate, config.swa_lr) else rate
    return config.swa_lr


def changes(preset: Preset, config: TrainConfig) -> dict[str, list[Any]]:
    """What a run of a preset does otherwise than the preset: its value and the run's, of settings
    that decide what is measured, and of the captures by the first budget."""
    options = preset.options
    before, after = _config(options).to_json(), config.to_json()
    found = {
        field: [before[field], after[field]]
        for field in after
        if before[field] != after[field] and field not in REPETITION
    }
    own = _captures(config)
    for method, count in _captures(_config(options)).items():
        if method in own and own[method] != count:
            found[f"captures of {method}"] = [count, own[method]]
    if (rate := first_rate(config)) != config.swa_lr:
        found["rate at the first capture of swa"] = [config.swa_lr, rate]
    return found


def format_changes(found: Mapping[str, Sequence[Any]]) -> str:
    """What :func:`changes` gives, in words."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {shown(a)} -> {shown(b)}" for name, (a, b) in found.items())


def _config(options: Mapping[str, Any]) -> TrainConfig:
    """For its plan: where the data lie does not matter."""
    needed = {"data_dir": "." if options["dataset"] in ("images", "imagenet") else None}
    return TrainConfig.from_options({**options, **needed})


def flop(config: TrainConfig) -> float:
    """Floating-point operations of all training steps of a configuration: six for each
    multiply-add of a forward pass, two forward and four backward; evaluation is not counted."""
    spec = spec_of(config.model)
    side = config.image_size or spec.image_size
    classes = {"cifar100": 100, "imagenet": 1000}.get(config.dataset, 10)
    channels = 1 if config.dataset in ("digits", "fashion-mnist") else 3
    macs = _macs(config.model, channels, classes, config.width, side)
    images = _IMAGES.get(config.dataset, _CIFAR_IMAGES) * config.fraction
    epochs = sum(trajectory.end - trajectory.begin for trajectory in plan(config))
    return 6.0 * macs * images * epochs


@functools.cache
def _macs(name: str, channels: int, classes: int, width: int, side: int) -> int:
    """Multiply-adds of a forward pass of a network of :data:`MODELS`."""
    with torch.device("meta"):
        model = build_model(name, in_channels=channels, num_classes=classes, width=width)
    return forward_macs(model, (channels, side, side))
