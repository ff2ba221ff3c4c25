"""The pass that re-estimates BatchNorm statistics: swa_fast beside torch.

    python bench/bench_update_bn.py                        # random images, see bench/harness.py
    python bench/bench_update_bn.py --run runs/NAME/seed1  # a trained network: time and accuracy
    python bench/bench_update_bn.py --alone                # each in a process of its own; --out

The limit of the first is the forward alone, with the layers in eval mode: what convolutions and
activations cost without any statistics. The second is the whole pass over the training images of a
``swa-fast`` run by torch, by swa_fast, and by swa_fast with a tolerance, and the test accuracy
after each. The third is what a user finds: a fresh process for each contender in which nothing is
set, and beside it the same with malloc set alike for all by glibc's environment variables, which
update_bn respects.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    Case,
    Contender,
    OtherWork,
    Run,
    Size,
    Suite,
    Work,
    device_name,
    facts,
    main,
    pytest_cases,
)
from precise_bn_reference import update_bn_stats
from rows import OURS, write_table
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast.batch_norm.malloc import KeptMemory
from swa_fast.train.data import Dataset, Placement, load_dataset
from swa_fast.train.data.memory import MemoryDataset
from swa_fast.train.models import MODELS, build_model

BF16 = torch.bfloat16
Pass = Callable[[list[Tensor], nn.Module], Any]


def autocast(on: bool = True) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", BF16) if on else contextlib.nullcontext()


def channels_last(batches: list[Tensor]) -> list[Tensor]:
    return [x.contiguous(memory_format=torch.channels_last) for x in batches]


def in_bf16(update: Pass) -> Pass:
    def run(batches: list[Tensor], model: nn.Module) -> Any:
        with autocast():
            return update(batches, model)

    return run


def keep_layout(batches: list[Tensor], model: nn.Module) -> Any:
    return swa_fast.update_bn(batches, model, channels_last=False)


# Name: what runs, and whether its batches are handed over in channels-last format already.
CONTENDERS: dict[str, tuple[Pass, bool]] = {
    "torch": (swa_utils.update_bn, False),
    "swa_fast, same layout": (keep_layout, False),
    "swa_fast": (swa_fast.update_bn, False),
    "swa_fast, bf16 autocast": (in_bf16(swa_fast.update_bn), False),
    "torch, channels-last": (swa_utils.update_bn, True),
    "swa_fast, channels-last given": (swa_fast.update_bn, True),
    "torch, bf16 autocast": (in_bf16(swa_utils.update_bn), False),
}


def make(model: str, batch: int, count: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    side = MODELS[model].image_size
    network = build_model(model, in_channels=3, num_classes=1000 if side == 224 else 10)
    return network, [torch.randn(batch, 3, side, side) for _ in range(count)]


# ----------------------------------------------------------------------------- trained networks


def accuracy(model: nn.Module, dataset: Dataset, in_autocast: bool) -> float:
    model.eval()
    correct = 0
    test = dataset.test_batches(500, Placement(torch.device("cpu")))
    with torch.no_grad(), autocast(in_autocast):
        for images, labels in test():
            correct += int((model(images).argmax(1) == labels).sum())
    return 100 * correct / len(dataset.test_labels)


def trained(arguments: argparse.Namespace) -> None:
    """Time of the pass and accuracy after it, for the run's average (or its SGD network)."""
    folder = Path(arguments.run)
    config = json.loads((folder / "results.json").read_text())["config"]
    dataset = load_dataset(
        config["dataset"],
        arguments.data or config["data_dir"],
        image_size=config["image_size"],
        normalise=config["normalise"],
        fraction=config["fraction"],
    )
    if not isinstance(dataset, MemoryDataset):
        raise SystemExit(
            f"--run: expected a dataset that fits into memory, found {config['dataset']}"
        )
    file = folder / "model_swa.pt"
    if not file.exists():
        file = folder / "model_sgd.pt"
    weights = torch.load(file, weights_only=True)
    if any(name.startswith("module.") for name in weights):
        weights = {k.removeprefix("module."): v for k, v in weights.items() if k != "n_averaged"}
    model = build_model(
        config["model"],
        in_channels=dataset.train_images.shape[1],
        num_classes=len(dataset.classes),
        width=config["width"],
    )
    model.load_state_dict(weights)
    data = dataset.train_batches(config["batch_size"], Placement(torch.device("cpu"), False))
    contenders: dict[str, tuple[bool, Callable[[Any, nn.Module], Any]]] = {
        "torch": (False, swa_utils.update_bn),
        "swa_fast": (False, swa_fast.update_bn),
        "swa_fast, bf16 autocast": (True, swa_fast.update_bn),
    }
    for tolerance in arguments.tolerance:

        def update(loader: Any, model: nn.Module, tolerance: float = tolerance) -> Any:
            return swa_fast.update_bn(loader, model, tolerance=tolerance)

        contenders[f"swa_fast, bf16, tolerance {tolerance:g}"] = (True, update)
    rows: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "accuracy": [], "batches": []} for name in contenders
    }
    for number in range(arguments.rounds):
        for name, (in_autocast, update) in contenders.items():
            network = copy.deepcopy(model)
            with autocast(in_autocast):
                start = time.perf_counter()
                report = update((images for images, _ in data.epoch(number)), network)
                rows[name]["seconds"].append(time.perf_counter() - start)
            rows[name]["batches"].append(len(data) if report is None else report.batches)
            # All are evaluated alike, so that the statistics alone make the difference.
            rows[name]["accuracy"].append(accuracy(network, dataset, False))
    base = rows["torch"]
    base_seconds = statistics.median(base["seconds"])
    print(f"{folder.name}, {file.name}: {len(data)} batches of {config['batch_size']}")
    print(
        f"{'':36}{'batches':>9}{'s':>9}{'torch / this':>14}{'accuracy %':>12}{'spread':>8}"
        f"{'difference: mean':>18}{'largest':>9}"
    )
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        differences = [a - b for a, b in zip(row["accuracy"], base["accuracy"], strict=True)]
        print(
            f"{name:36}{statistics.median(row['batches']):9g}{median:9.2f}"
            f"{base_seconds / median:14.2f}{statistics.mean(row['accuracy']):12.2f}"
            f"{max(row['accuracy']) - min(row['accuracy']):8.2f}"
            f"{statistics.mean(differences):+18.2f}{max(differences, key=abs):+9.2f}"
        )


# ------------------------------------------------------------------- in rounds (bench/harness.py)

LIMIT = "forward, layers in eval mode"


def _by_fvcore(batches: list[Tensor], model: nn.Module) -> None:
    update_bn_stats(model, batches, len(batches))


def _forward(batches: list[Tensor], model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train()


def _pooled(batches: list[Tensor], model: nn.Module) -> Any:
    return swa_fast.update_bn(batches, model, estimator="pooled")


# name: (pass, channels-last batches, estimator, side).
PASSES: dict[str, tuple[Pass, bool, str, str]] = {
    LIMIT: (_forward, False, "none", "limit"),
    **{
        name: (update, last, "torch", OURS if name.startswith("swa_fast") else "competitor")
        for name, (update, last) in CONTENDERS.items()
    },
    "swa_fast, pooled": (_pooled, False, "pooled", OURS),
    "fvcore-style PreciseBN": (_by_fvcore, False, "biased", "competitor"),
}
Statistics = dict[str, tuple[Tensor, Tensor]]  # by layer: mean and variance


@dataclasses.dataclass(frozen=True)
class Shared:
    model: nn.Module
    batches: list[Tensor]
    exact: dict[str, Statistics]  # by estimator, in fp64
    bf16_error: float  # of torch's own pass under bf16 autocast


@torch.no_grad()
def exact_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, Statistics]:
    """Mean and variance of every layer in fp64 for each estimator: estimator, layer."""
    network = copy.deepcopy(model).double().train()
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def remember(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].movedim(1, 0).flatten(1)
        variance, mean = torch.var_mean(x, 1, correction=0)
        seen.setdefault(name, []).append((x.shape[1], mean, variance))

    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(functools.partial(remember, name))
    for batch in batches:
        network(batch.double())
    exact: dict[str, Statistics] = {"torch": {}, "pooled": {}, "biased": {}}
    for name, values in seen.items():
        count = sum(m for m, _, _ in values)
        mean = sum(m * mu for m, mu, _ in values) / count
        biased = sum(m * (v + (mu - mean) ** 2) for m, mu, v in values) / count
        exact["biased"][name] = (mean, biased)
        exact["pooled"][name] = (mean, biased * count / (count - 1))
        exact["torch"][name] = (
            sum(mu for _, mu, _ in values) / len(values),
            sum(v * m / (m - 1) for m, _, v in values) / len(values),
        )
    return exact


def largest_error(model: nn.Module, exact: Statistics) -> tuple[float, str]:
    """The largest error of a layer's mean, in standard deviations, or of its variance, relative to
    it; and the layer's name."""
    layers: dict[str, Any] = dict(model.named_modules())
    errors = [(0.0, "no layer")]
    for name, (mean, variance) in exact.items():
        layer = layers[name]
        deviation = (layer.running_mean - mean).abs() / (variance + layer.eps).sqrt()
        ratio = (layer.running_var - variance).abs() / (variance + layer.eps)
        errors.append((max(float(deviation.max()), float(ratio.max())), name))
    return max(errors)


def _shared(name: str, batch: int, count: int, device: torch.device) -> Shared:
    model, batches = make(name, batch, count)
    model, batches = model.to(device), [x.to(device) for x in batches]
    exact = exact_statistics(model, batches)
    error = 0.0
    if device.type == "cpu":
        in_bf16(swa_utils.update_bn)(batches, model)
        error, _ = largest_error(model, exact["torch"])
    return Shared(model, batches, exact, error)


def _contender(name: str) -> Contender:
    update, last, estimator, side = PASSES[name]

    def work(shared: Shared) -> Work:
        given = channels_last(shared.batches) if last else shared.batches
        # Errors add up over the layers: of a few thousand fp32 roundings; in bf16 twice torch's own
        # is allowed, and one rounding.
        tolerance = 2 * shared.bf16_error + 2**-8 if "bf16" in name else 1e-3

        def run() -> Any:
            return update(given, shared.model)

        def check(run: Run, done: int) -> None:
            # ``run`` was the last one to write the statistics.
            error, layer = largest_error(shared.model, shared.exact.get(estimator, {}))
            assert error <= tolerance, f"{layer} is off by {error:.2g}, allowed {tolerance:.2g}"

        return Work(run, check, graph=False)

    return Contender(side, work)


@contextlib.contextmanager
def equal_pages(on: bool) -> Iterator[None]:
    """Memory that is kept for all, as a process that has trained has it, so that none waits for
    new pages and none profits from those that another has left: by chance that is up to half of
    torch's time."""
    with KeptMemory(on):
        before = os.environ.get("SWA_FAST_KEEP_MEMORY")
        os.environ["SWA_FAST_KEEP_MEMORY"] = "0"  # or ours would end it after its first turn
        try:
            yield
        finally:
            del os.environ["SWA_FAST_KEEP_MEMORY"]
            if before is not None:
                os.environ["SWA_FAST_KEEP_MEMORY"] = before


def cases(device: torch.device) -> list[Case]:
    def size(shared: Shared) -> Size:
        return Size(sum(x.numel() for x in shared.batches), len(shared.exact["torch"]), None)

    return [
        Case(
            "update_bn", f"{model}, {count} x {batch}", "float32",
            functools.partial(_shared, model, batch, count, device), size,
            {n: _contender(n) for n in PASSES if device.type == "cpu" or "bf16" not in n},
            quick=model == "preresnet20", copies=0, modes=("warm",),
            around=functools.partial(equal_pages, device.type == "cpu"),
        )
        for model, batch, count in (
            ("preresnet20", 64, 2),
            ("preresnet164", 128, 2),
            ("resnet50", 16, 2),
        )
    ]  # fmt: skip


SUITE = Suite("BatchNorm pass", cases)
test_pass = pytest_cases(SUITE)


def trained_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(trained.__doc__))
    parser.add_argument("--run", required=True, help="folder of a swa-fast run")
    parser.add_argument("--data", help="image folder, if it is not where the run found it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.05, 0.03, 0.02])
    options = parser.parse_args(arguments)
    with equal_pages(True):
        trained(options)
    return 0


# glibc's malloc as update_bn sets it for the time of its pass.
_EQUAL_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
_ALONE = (LIMIT, *(name for name in CONTENDERS if "bf16" not in name))
_ALONE_COLUMNS = [
    "contender", "model", "batches", "images", "rounds", "as found, ms", "equal malloc, ms",
    "others", "device", "threads", "torch", "commit", "date",
]  # fmt: skip


def alone_main(arguments: Sequence[str]) -> int:
    """Times every contender in a process of its own, as found and at equal malloc."""
    parser = argparse.ArgumentParser(description=str(alone_main.__doc__))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--model", default="preresnet164")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="passes of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    parser.add_argument("--contender", choices=_ALONE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.contender is not None:
        update, last, _, _ = PASSES[options.contender]
        model, batches = make(options.model, options.batch, options.count)
        given = channels_last(batches) if last else batches
        update(given, model)  # loads what is loaded when first used
        seconds, others = [], OtherWork()
        for _ in range(options.rounds):
            start = time.perf_counter()
            update(given, model)
            seconds.append(time.perf_counter() - start)
        print(json.dumps([statistics.median(seconds), others.share()]))
        return 0
    malloc = ("MALLOC_", "GLIBC_TUNABLES", "SWA_FAST_KEEP_MEMORY")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(malloc)}
    print(
        f"{device_name(torch.device('cpu'))}, {options.threads} threads, torch {torch.__version__}"
    )
    print(
        f"{options.model}, {options.count} x {options.batch} images: milliseconds a pass, median "
        f"of {options.rounds}"
    )
    print(f"{'':36}{'as found':>12}{'equal malloc':>14}{'others':>9}")
    rows: list[dict[str, Any]] = []
    for name in _ALONE:
        found = []
        for extra in ({}, _EQUAL_MALLOC):
            answer = subprocess.run(
                [sys.executable, __file__, *arguments, "--contender", name],
                env={**clean, **extra}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found.append(json.loads(answer.stdout))
        (as_found, others), (equal, more) = found
        others = None if others is None or more is None else max(others, more)
        print(
            f"{name:36}{1e3 * as_found:12.0f}{1e3 * equal:14.0f}"
            f"{'?' if others is None else f'{others:.0%}':>9}",
            flush=True,
        )
        rows.append(
            {
                "contender": name, "model": options.model, "batches": options.count,
                "images": options.batch, "rounds": options.rounds,
                "as found, ms": f"{1e3 * as_found:.4g}",
                "equal malloc, ms": f"{1e3 * equal:.4g}",
                "others": "" if others is None else f"{others:.3f}",
                **facts(torch.device("cpu")),
            }
        )  # fmt: skip
    if options.out is not None:
        write_table(options.out, _ALONE_COLUMNS, rows)
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    if "--alone" in given:
        sys.exit(alone_main(given))
    with_run = any(word.split("=")[0] == "--run" for word in given)
    sys.exit(trained_main(given) if with_run else main([SUITE], str(__doc__)))
