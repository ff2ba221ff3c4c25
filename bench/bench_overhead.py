"""What averaging adds to a training run: the same loop with torch.optim.swa_utils and with
swa_fast.

    python bench/bench_overhead.py                          about a minute on two cores
    python bench/bench_overhead.py --models preresnet164 --steps 8 --out overhead.csv

A loop of forward and backward, SGD step, averaging, and at the end of each epoch the BatchNorm pass
for the average; on random images. Averaging runs after every step (EMA) or once an epoch (SWA).
Both libraries train from the same weights on the same batches, and take turns epoch by epoch. Their
averages are compared at the end. The table says what share of an epoch each phase takes; the pass
reads every batch of the epoch once, as torch's tutorial does.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import OtherWork, facts
from rows import write_table
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast.train.models import build_model

__all__ = ["Trainer", "main"]

PHASES = ("forward/backward", "optimiser", "averaging", "BN pass")
DECAY = 0.999
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIBRARIES = {"torch": swa_utils, "swa_fast": swa_fast}
COLUMNS = [
    "model", "rule", "library", "batch", "steps", "epochs", *(f"{p}, s" for p in PHASES),
    "epoch, s", "overhead, %", "device", "threads", "clock", "torch", "commit", "date", "others",
]  # fmt: skip


class Trainer:
    """One network, its optimiser and its average, with either library."""

    def __init__(
        self, model: nn.Module, library: Any, every_step: bool, clock: Callable[[], float]
    ) -> None:
        self.model = copy.deepcopy(model)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        function = library.get_ema_multi_avg_fn(DECAY) if every_step else None
        self.averaged = library.AveragedModel(self.model, multi_avg_fn=function)
        self.update_bn: Callable[..., Any] = library.update_bn
        self.every_step, self.clock = every_step, clock
        self.epochs: list[dict[str, float]] = []

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]], synchronise: Any) -> None:
        """One epoch; keeps the seconds of each phase. ``synchronise`` waits for the device."""
        spent = dict.fromkeys(PHASES, 0.0)
        last = self.clock()

        def lap(phase: str) -> None:
            nonlocal last
            synchronise()
            now = self.clock()
            spent[phase] += now - last
            last = now

        self.model.train()
        for images, labels in batches:
            self.optimiser.zero_grad()
            nn.functional.cross_entropy(self.model(images), labels).backward()
            lap("forward/backward")
            self.optimiser.step()
            lap("optimiser")
            if self.every_step:
                self.averaged.update_parameters(self.model)
                lap("averaging")
        if not self.every_step:
            self.averaged.update_parameters(self.model)
            lap("averaging")
        self.update_bn(batches, self.averaged)
        lap("BN pass")
        self.epochs.append(spent)

    def medians(self) -> dict[str, float]:
        """The median of each phase over the epochs; the first is left out, because it warms up."""
        rest = self.epochs[1:] or self.epochs
        return {phase: statistics.median(e[phase] for e in rest) for phase in PHASES}


def overhead(medians: dict[str, float]) -> float:
    """Averaging and the pass in percent of training alone."""
    training = medians["forward/backward"] + medians["optimiser"]
    return 100 * (medians["averaging"] + medians["BN pass"]) / training


def largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Between the parameters of two averages."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def compare(
    name: str, batch: int, steps: int, epochs: int, device: torch.device, clock: str
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = build_model(name, in_channels=3, num_classes=10, width=16).to(device)
    batches = [
        (torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device))
        for _ in range(steps)
    ]
    synchronise = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    rows = []
    for rule in ("EMA every step", "SWA once an epoch"):
        trainers = {
            library: Trainer(model, module, rule.startswith("EMA"), CLOCKS[clock])
            for library, module in LIBRARIES.items()
        }
        beside = OtherWork()
        for number in range(epochs + 1):
            order = list(trainers) if number % 2 else list(reversed(trainers))
            for library in order:
                trainers[library].epoch(batches, synchronise)
        others = beside.share()
        off = largest_difference(
            trainers["swa_fast"].averaged.module, trainers["torch"].averaged.module
        )
        assert off < 1e-3, f"the two averages differ by {off:.2g}"
        print(f"\n{name}, {rule}, {steps} steps of {batch} an epoch, medians of {epochs} epochs")
        print(f"  {'':12}" + "".join(f"{p + ', s':>21}" for p in PHASES) + f"{'overhead':>12}")
        for library, trainer in trainers.items():
            medians = trainer.medians()
            print(
                f"  {library:12}" + "".join(f"{medians[p]:21.4f}" for p in PHASES)
                + f"{overhead(medians):10.1f} %"
            )  # fmt: skip
            rows.append(
                {
                    "model": name, "rule": rule, "library": library, "batch": batch,
                    "steps": steps, "epochs": epochs,
                    **{f"{p}, s": f"{medians[p]:.4g}" for p in PHASES},
                    "epoch, s": f"{sum(medians.values()):.4g}",
                    "overhead, %": f"{overhead(medians):.4g}", "clock": clock, **facts(device),
                    "others": "" if others is None else f"{others:.2g}",
                }
            )  # fmt: skip
        sys.stdout.flush()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["preresnet20", "preresnet164"])
    parser.add_argument("--batch", type=int, default=32, help="images of a step (default 32)")
    parser.add_argument("--steps", type=int, default=4, help="of an epoch (default 4)")
    parser.add_argument("--epochs", type=int, default=3, help="after one that warms up (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: its own choice)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: the CPU time of the process, for a machine that is shared; with --threads 1",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        parser.error("--clock cpu needs --threads 1 and --device cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        rows += compare(
            name, options.batch, options.steps, options.epochs, torch.device(options.device),
            options.clock,
        )  # fmt: skip
    if options.out is not None:
        write_table(options.out, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
