"""The averaging update of whole models: swa_fast, its competitors, and what the memory allows.

    make bench                                    each contender by itself (pytest-benchmark)
    python bench/bench_average.py                 ratios: contenders take turns within every round
    python bench/bench_average.py --growth        time against parameters and against tensors
    python bench/bench_average.py --json FILE     the same, one JSON row a line

``lerp_flat`` is the limit: one in-place lerp_ over one flat tensor with as many elements as the
model has parameters. Every contender's average is checked before it is timed. Competitors that are
not installed (timm, diffusers, ema-pytorch) are left out and named.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, tensors_of_equal_size
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast import EMA, SWA, Averager

DECAY = 0.999

# Makes an update of one model: a function without arguments, and where the averages are.
Update = Callable[[], object]
Made = tuple[Update, Callable[[], dict[str, Tensor]]]


def _averager(rules: dict[str, Any], model: nn.Module, buffers: str = "copy") -> Made:
    averager = Averager(model, rules, buffers=buffers)
    return averager.update, lambda: averager.averages[next(iter(rules))]


def _module(make: Callable[[nn.Module], nn.Module], model: nn.Module) -> Made:
    averaged: Any = make(model)
    return lambda: averaged.update_parameters(model), lambda: averaged.module.state_dict()


def _lerp_flat(model: nn.Module) -> Made:
    source = torch.cat([p.detach().flatten() for p in model.parameters()])
    average = torch.randn_like(source)
    return lambda: average.lerp_(source, 1 - DECAY), lambda: {}


def _timm(model: nn.Module) -> Made:
    from timm.utils.model_ema import ModelEmaV3

    averaged = ModelEmaV3(model, decay=DECAY)
    return lambda: averaged.update(model), lambda: averaged.module.state_dict()


def _diffusers(model: nn.Module) -> Made:
    from diffusers.training_utils import EMAModel

    parameters = list(model.parameters())
    averaged = EMAModel(parameters, decay=DECAY, min_decay=DECAY, foreach=True)
    names = [name for name, _ in model.named_parameters()]
    return (
        lambda: averaged.step(parameters),
        lambda: dict(zip(names, averaged.shadow_params, strict=True)),
    )


def _ema_pytorch(model: nn.Module) -> Made:
    from ema_pytorch import EMA as EmaPytorch

    averaged = EmaPytorch(
        model, beta=DECAY, min_value=DECAY, update_after_step=-1, update_every=1, use_foreach=True
    )
    averaged.update()  # the first one copies
    return averaged.update, lambda: averaged.ema_model.state_dict()


# name: (makes an update, whether it weighs equally; None for the limit).
CONTENDERS: dict[str, tuple[Callable[[nn.Module], Made], bool | None]] = {
    "lerp_flat": (_lerp_flat, None),
    "Averager SWA": (functools.partial(_averager, {"swa": SWA()}), True),
    "Averager EMA": (functools.partial(_averager, {"ema": EMA(DECAY)}), False),
    # Like diffusers' EMAModel, which knows no buffers.
    "Averager EMA, no buffers": (
        functools.partial(_averager, {"ema": EMA(DECAY)}, buffers="skip"),
        False,
    ),
    "AveragedModel": (functools.partial(_module, swa_fast.AveragedModel), True),
    "torch AveragedModel": (functools.partial(_module, swa_utils.AveragedModel), True),
    "torch foreach SWA": (
        functools.partial(
            _module,
            lambda m: swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
        ),
        True,
    ),
    "torch foreach EMA": (
        functools.partial(
            _module,
            lambda m: swa_utils.AveragedModel(
                m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)
            ),
        ),
        False,
    ),
    "timm ModelEmaV3": (_timm, False),
    "diffusers EMAModel foreach": (_diffusers, False),
    "ema-pytorch foreach": (_ema_pytorch, False),
}


def check(name: str, model: nn.Module) -> None:
    """Raises unless three updates of a contender give the average of its rule."""
    make, equal = CONTENDERS[name]
    if equal is None:
        return
    model = copy.deepcopy(model)
    update, averages = make(model)
    exact: dict[str, Tensor] = {}
    if not equal:
        exact = {k: p.detach().double().clone() for k, p in model.named_parameters()}
        update()
    for n in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        update()
        weight = 1 / (n + 1) if equal else 1 - DECAY
        for k, p in model.named_parameters():
            exact[k] = torch.lerp(exact.get(k, p.detach().double()), p.detach().double(), weight)
    found = averages()
    for k, value in exact.items():
        torch.testing.assert_close(
            found[k].double(), value, rtol=1e-5, atol=1e-6, msg=f"{name} {k}"
        )


def available() -> list[str]:
    """The contenders that are installed; the others are named on standard error."""
    names = []
    for name in CONTENDERS:
        try:
            check(name, nn.Linear(3, 2))
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
        else:
            names.append(name)
    return names


def interleaved(updates: dict[str, Update], rounds: int, cold: bool) -> dict[str, list[float]]:
    """Seconds of each update in every round. All take turns within a round, so that a machine that
    drifts favours none. A turn begins with an update that is not timed; ``cold`` then fills the
    caches with other memory, as the steps of a training run do."""
    other = torch.zeros(32 << 20)  # 128 MiB
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds):
        for name, update in updates.items():
            update()
            if cold:
                other.add_(1)
            start = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


@functools.cache
def _facts() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    return {
        "device": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or None,
        "date": datetime.date.today().isoformat(),
    }


def rows_of(
    model_name: str, model: nn.Module, names: list[str], rounds: int, cold: bool
) -> list[dict[str, Any]]:
    """One row for each contender: quartiles in seconds, bytes moved at least, GB/s and ratios."""
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(3 * p.numel() * p.element_size() for p in model.parameters())
    updates = {name: CONTENDERS[name][0](model)[0] for name in names}
    seconds = interleaved(updates, rounds, cold)
    rows = []
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        # Of the same round, so that both sides met the same machine.
        limit = statistics.median(
            t / base for t, base in zip(times, seconds["lerp_flat"], strict=True)
        )
        rows.append(
            {
                "op": "update", "contender": name, "model": model_name, "dtype": "float32",
                "parameters": parameters, "cache": "cold" if cold else "warm", "rounds": rounds,
                "median": median,
                "quartiles": [low, high], "bytes": size, "GB/s": size / median / 1e9,
                "times_lerp_flat": limit, **_facts(),
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    ours = next((r["median"] for r in rows if r["contender"] == "Averager SWA"), None)
    r = rows[0]
    print(
        f"\n{r['model']}: {r['parameters']:,} parameters, {r['device']}, {r['threads']} threads, "
        f"torch {r['torch']}, {r['rounds']} rounds, {r['cache']} caches"
    )
    print(f"  {'':28}{'median':>11}  {'quartiles':>23} {'x lerp_flat':>12} {'x Averager':>11}")
    for r in rows:
        low, high = (1e3 * q for q in r["quartiles"])
        relative = "" if ours is None else f"{r['median'] / ours:11.2f}"
        print(
            f"  {r['contender']:28}{1e3 * r['median']:8.3f} ms  {low:10.3f} -{high:8.3f} ms "
            f"{r['times_lerp_flat']:12.3f} {relative}"
        )


def host_time(tensors: int = 494, rounds: int = 200) -> float:
    """Median seconds of an update of ``tensors`` unchanged one-element tensors: what the host does
    whatever their size."""
    update = Averager([torch.randn(1) for _ in range(tensors)], {"swa": SWA()}).update
    return statistics.median(interleaved({"update": update}, rounds, cold=False)["update"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30, help="at least 20 (default: 30)")
    parser.add_argument(
        "--cold", action="store_true", help="fill the caches with other memory before every update"
    )
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json", type=Path, help="append rows to this file, one a line")
    options = parser.parse_args()
    if options.rounds < 20:
        parser.error(f"--rounds: expected at least 20, found {options.rounds}")
    names, rows = available(), []
    if options.growth:
        names = ["lerp_flat", "Averager SWA", "AveragedModel"]
        for exponent in range(4, 9):
            rows.append(
                rows_of(f"1 tensor, 10^{exponent}", tensors_of_equal_size(1, 10**exponent), names,
                        options.rounds, options.cold)
            )  # fmt: skip
        for count in (1, 10, 100, 1000, 10_000):
            rows.append(
                rows_of(f"{count} tensors", tensors_of_equal_size(count, 10**7), names,
                        options.rounds, options.cold)
            )  # fmt: skip
    else:
        for name in options.models:
            model = MODELS[name]()
            for contender in names:
                check(contender, model)
            rows.append(rows_of(name, model, names, options.rounds, options.cold))
    for table in rows:
        show(table)
    print(f"\nhost time of an update of 494 unchanged tensors: {1e6 * host_time():.1f} us")
    if options.json is not None:
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for table in rows for row in table)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_update(benchmark: Any, model: str, contender: str) -> None:
    module = MODELS[model]()
    try:
        check(contender, nn.Linear(3, 2))
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.group = model
    benchmark.pedantic(CONTENDERS[contender][0](module)[0], rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    main()
