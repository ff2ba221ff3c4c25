"""The methods by name, and defaults of settings by dataset."""

from __future__ import annotations

from typing import Any

#: Training methods by name, with the titles that tables give their results.
METHODS: dict[str, str] = {
    "sgd": "SGD",
    "ema": "EMA",
    "fge": "FGE",
    "swa": "SWA",
    "swa-cyclic": "SWA, cyclic",
    "swa-fixed": "SWA, fixed rate",
    "swa-power": "SWA, power",
    "lawa": "LAWA",
    "swag": "SWAG",
}

#: The titles of all results: fge also leaves the average of its members.
TITLES = {**METHODS, "fge-average": "FGE, average of members"}

#: Those that average along one trajectory, at the constant rate of SWA.
ALONG_SWA = ("swa", "swa-power", "lawa", "swag")

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
        # The share that the SWAG authors' code takes for ImageNet.
        "curve_data": 0.1,
    },
}

#: Settings that came later than files of runs that can still be read, with what those runs did.
LATER: dict[str, Any] = {
    **{"power_gamma": -0.5, "lawa_last": 5, "keep_captures": False},
    **{"validation": False, "bn_gamma": "ones", "curve_data": 1.0},
    **{"test_fraction": None, "noise": 0.0, "optimizer": "sgd", "warmup_epochs": 0.0},
    **{"label_smoothing": 0.0, "accumulate": 1},
}
