"""How far other packages' averages are from ours, for the migration table.

    python bench/differences.py             prints the rows
    python bench/differences.py --record    writes them to bench/results/differences.csv

Both sides see the same 2,000 states of a small network, whose weights walk at random in fp32. The
difference is that of the two averages' parameters by the way that ours has gone from the first
state, both as Euclidean norms. Of BatchNorm and SWAG it is the relative one of the variances. What
is not installed is left out of the rows, with a line: pip install -e ".[bench,integrations]".
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from precise_bn_reference import update_bn_stats
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast import EMA, SWA, SWAG, AveragedModel, Averager, Power
from swa_fast.precise_bn import update_bn_stats as ours_update_bn_stats

RESULTS = Path(__file__).resolve().parent / "results" / "differences.csv"
UPDATES = 2000
DECAY = 0.999

# What a side makes of a model: what to call after each step, and how to get the parameters.
Side = tuple[Callable[[], Any], Callable[[], Sequence[Tensor]]]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))


def walk(model: nn.Module) -> Iterator[None]:
    """Steps as of a training: large at first, then around a place that moves slowly."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.999).add_(torch.randn(p.shape, generator=generator), alpha=0.01)
        yield


def averager(rule: Any) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        found = Averager(model, {"a": rule})
        names = [name for name, _ in model.named_parameters()]
        return found.update, lambda: [found.averages["a"][name] for name in names]

    return make


def averaged(kind: Any, **options: Any) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        found = kind(model, **options)
        return lambda: found.update_parameters(model), lambda: list(found.module.parameters())

    return make


def ema_loop(model: nn.Module) -> Side:
    """What NeMo, d2go, composer and many scripts do."""
    average = [p.detach().clone() for p in model.parameters()]

    def update() -> None:
        with torch.no_grad():
            for a, p in zip(average, model.parameters(), strict=True):
                a.mul_(DECAY).add_(p, alpha=1 - DECAY)

    return update, lambda: average


def from_the_start(rule: Any) -> Callable[[nn.Module], Side]:
    """Ours, counted as updated once by the weights that there are."""

    def make(model: nn.Module) -> Side:
        found = averager(rule)(model)
        found[0]()
        return found

    return make


def moving_average(model: nn.Module) -> Side:
    """The formula of timgaripov/swa."""
    average = [torch.zeros_like(p) for p in model.parameters()]
    n = 0

    def update() -> None:
        nonlocal n
        alpha = 1.0 / (n + 1)
        with torch.no_grad():
            for a, p in zip(average, model.parameters(), strict=True):
                a.mul_(1.0 - alpha).add_(p, alpha=alpha)
        n += 1

    return update, lambda: average


def torchcontrib_swa(model: nn.Module) -> Side:
    from torchcontrib.optim import SWA as Stock

    optimizer = Stock(torch.optim.SGD(model.parameters(), lr=0.0))

    def parameters() -> list[Tensor]:
        return [optimizer.state[p]["swa_buffer"] for p in model.parameters()]

    return optimizer.update_swa, parameters


def timm_v3(module: str) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        kind = getattr(__import__(module, fromlist=["ModelEmaV3"]), "ModelEmaV3")  # noqa: B009
        # timm's training counts a step before it updates.
        found, step = kind(model, decay=DECAY, use_warmup=True), itertools.count(1)
        return lambda: found.update(model, step=next(step)), lambda: list(found.module.parameters())

    return make


def diffusers_ema(module: str) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        kind = getattr(__import__(module, fromlist=["EMAModel"]), "EMAModel")  # noqa: B009
        found = kind(model.parameters(), decay=DECAY)
        return lambda: found.step(model.parameters()), lambda: found.shadow_params

    return make


def ema_pytorch(module: str, **options: Any) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        kind = getattr(__import__(module, fromlist=["EMA"]), "EMA")  # noqa: B009
        found = kind(model, beta=DECAY, **options)
        return found.update, lambda: list(found.ema_model.parameters())

    return make


def karras(**options: Any) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        from ema_pytorch.post_hoc_ema import KarrasEMA

        found = KarrasEMA(model, sigma_rel=0.05, **options)
        return found.update, lambda: list(found.ema_model.parameters())

    return make


def torch_ema(module: str) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        name = "ExponentialMovingAverage"
        found = getattr(__import__(module, fromlist=[name]), name)(model.parameters(), decay=DECAY)
        return found.update, lambda: found.shadow_params

    return make


def ultralytics_ema(module: str) -> Callable[[nn.Module], Side]:
    def make(model: nn.Module) -> Side:
        kind = getattr(__import__(module, fromlist=["ModelEMA"]), "ModelEMA")  # noqa: B009
        found = kind(model, decay=DECAY)
        return lambda: found.update(model), lambda: list(found.ema.parameters())

    return make


def difference(theirs: Callable[[nn.Module], Side], ours: Callable[[nn.Module], Side]) -> float:
    """See the top of this file."""
    model = network()
    start = [p.detach().double().clone() for p in model.parameters()]
    (their_update, their_average), (our_update, our_average) = theirs(model), ours(model)
    for _ in walk(model):
        their_update()
        our_update()

    def norm(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
        pairs = zip(first, second, strict=True)
        return (
            sum(float((a.detach().double() - b.detach()).square().sum()) for a, b in pairs) ** 0.5
        )

    return norm(their_average(), our_average()) / norm(our_average(), start)


def variances(
    theirs: Callable[[Any, nn.Module], Any], ours: Callable[[Any, nn.Module], Any]
) -> float:
    """Of the running variances after a pass over 20 batches with a short last one."""
    torch.manual_seed(0)
    batches = [torch.randn(128 if i < 19 else 16, 3, 6, 6) for i in range(20)]
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    second = copy.deepcopy(first)
    theirs(batches, first)
    ours(batches, second)
    a, b = (m[1].running_var.double() for m in (first, second))  # type: ignore[index]
    return float((a - b).norm() / b.norm())


def swag_variance() -> float:
    """Weights of 0.1 that scatter by 1e-4: a mean of squares less the square of the mean, in fp32,
    beside ours, which is the fp64 variance but for rounding."""
    model = nn.Linear(100, 100, bias=False)
    generator = torch.Generator().manual_seed(1)
    found = SWAG(model, k=20)
    mean, square = torch.zeros(100, 100), torch.zeros(100, 100)
    for n in range(100):
        with torch.no_grad():
            model.weight.copy_(0.1 + 1e-4 * torch.randn(100, 100, generator=generator))
            mean += (model.weight - mean) / (n + 1)
            square += (model.weight**2 - square) / (n + 1)
        found.update()
    theirs, ours = (square - mean**2).double(), found.variance()["weight"].double()
    return float((theirs - ours).norm() / ours.norm())


INTEGRATED = "swa_fast.integrations."
# (theirs, ours, the two of them, why they differ by more than rounding)
PAIRS: list[tuple[str, str, Callable[[], float], str]] = [
    ("torch: AveragedModel(model)", "AveragedModel(model)",
     lambda: difference(averaged(swa_utils.AveragedModel), averaged(AveragedModel)), ""),
    ("torch: get_ema_multi_avg_fn(0.999)", "get_ema_multi_avg_fn(0.999)",
     lambda: difference(
         averaged(swa_utils.AveragedModel, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)),
         averaged(AveragedModel, multi_avg_fn=swa_fast.get_ema_multi_avg_fn(DECAY))), ""),
    ("torch: update_bn", "update_bn",
     lambda: variances(swa_utils.update_bn, swa_fast.update_bn), ""),
    ("torch: update_bn", "update_bn(estimator='pooled')",
     lambda: variances(swa_utils.update_bn,
                       lambda b, m: swa_fast.update_bn(b, m, estimator="pooled")),
     "torch's weighs a short last batch as a full one, and leaves out how batches scatter"),
    ("fvcore: update_bn_stats", "swa_fast.precise_bn.update_bn_stats",
     lambda: variances(lambda b, m: update_bn_stats(m.train(), b, len(b)),
                       lambda b, m: ours_update_bn_stats(m.train(), b, len(b))),
     ""),
    ("timgaripov/swa: moving_average", "SWA()",
     lambda: difference(moving_average, averager(SWA())), ""),
    ("torchcontrib: SWA(optimizer)", "SWA()",
     lambda: difference(torchcontrib_swa, averager(SWA())), ""),
    ("mul_(d).add_(w, alpha=1 - d)", "EMA(d), updated once before training",
     lambda: difference(ema_loop, from_the_start(EMA(DECAY))), ""),
    ("mul_(d).add_(w, alpha=1 - d)", "EMA(d)",
     lambda: difference(ema_loop, averager(EMA(DECAY))),
     "ours begins at the first state that it is given, theirs at the initial weights"),
    ("timm: ModelEmaV3(use_warmup=True)", "integrations.timm.ModelEmaV3",
     lambda: difference(timm_v3("timm.utils"), timm_v3(INTEGRATED + "timm")), ""),
    ("timm: ModelEmaV3(use_warmup=True)", "EMA(d, warmup='timm')",
     lambda: difference(timm_v3("timm.utils"), averager(EMA(DECAY, warmup="timm"))), ""),
    ("diffusers: EMAModel", "integrations.diffusers.EMAModel",
     lambda: difference(diffusers_ema("diffusers.training_utils"),
                        diffusers_ema(INTEGRATED + "diffusers")), ""),
    ("diffusers: EMAModel", "EMA(d, warmup='diffusers')",
     lambda: difference(diffusers_ema("diffusers.training_utils"),
                        averager(EMA(DECAY, warmup="diffusers"))), ""),
    ("ultralytics: ModelEMA", "integrations.ultralytics.ModelEMA",
     lambda: difference(ultralytics_ema("ultralytics.utils.torch_utils"),
                        ultralytics_ema(INTEGRATED + "ultralytics")), ""),
    ("ultralytics: ModelEMA", "EMA(d, warmup='ultralytics')",
     lambda: difference(ultralytics_ema("ultralytics.utils.torch_utils"),
                        averager(EMA(DECAY, warmup="ultralytics"))), ""),
    ("torch-ema: ExponentialMovingAverage", "integrations.torch_ema.ExponentialMovingAverage",
     lambda: difference(torch_ema("torch_ema"), torch_ema(INTEGRATED + "torch_ema")), ""),
    ("ema-pytorch: EMA", "integrations.ema_pytorch.EMA",
     lambda: difference(ema_pytorch("ema_pytorch"), ema_pytorch(INTEGRATED + "ema_pytorch")), ""),
    ("ema-pytorch: EMA(update_every=1)", "EMA(d, warmup='ema-pytorch')",
     lambda: difference(ema_pytorch("ema_pytorch", update_every=1),
                        averager(EMA(DECAY, warmup="ema-pytorch"))), ""),
    ("ema-pytorch: EMA", "EMA(d, warmup='ema-pytorch')",
     lambda: difference(ema_pytorch("ema_pytorch"), averager(EMA(DECAY, warmup="ema-pytorch"))),
     "theirs updates at every tenth call with the decay of one; ours at every one"),
    ("ema-pytorch: KarrasEMA(sigma_rel=0.05, update_every=1)", "Power(sigma_rel=0.05)",
     lambda: difference(karras(update_every=1), averager(Power(sigma_rel=0.05))),
     "theirs counts the first state twice"),
    ("ema-pytorch: KarrasEMA(sigma_rel=0.05)", "Power(sigma_rel=0.05)",
     lambda: difference(karras(), averager(Power(sigma_rel=0.05))),
     "theirs updates at every hundredth call with the decay of one step"),
    ("swa_gaussian: variance of SWAG", "SWAG(model).variance", swag_variance,
     "E[w²] - E[w]² in fp32 cancels; here weights are 0.1 and scatter by 1e-4"),
]  # fmt: skip


def shown(value: float) -> str:
    """In percent, or as a power of ten where that is all that can be said."""
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"{100 * value:.2g} %"


def rows() -> list[dict[str, str]]:
    found = []
    for theirs, ours, measure, why in PAIRS:
        try:
            value = measure()
        except ImportError as error:
            print(f"{theirs}: {error}", file=sys.stderr)
            continue
        found.append({
            "theirs": theirs, "ours": ours, "difference": shown(value),
            "why": why, "torch": torch.__version__,
        })  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    found = rows()
    if options.record:
        with RESULTS.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    for row in found:
        print(f"{row['theirs']:55} {row['ours']:55} {row['difference']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
