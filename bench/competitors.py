"""Everything that averages weights, behind one face: ours, the competitors, and the limit.

Each function makes from a model what ``Averaged`` describes. Packages that are not installed raise
ImportError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from harness import CHECKED_RUNS, Contender, NotServed, Run, Work, close, simulated
from rows import OURS
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast
from swa_fast import EMA, SWA, Averager

__all__ = [
    "AVERAGERS",
    "DECAY",
    "Averaged",
    "Expected",
    "averaging",
    "check_average",
    "check_averages",
    "lerp_flat",
]

DECAY = 0.999
# Tensors up to which an update is compiled: C++ for so many takes the compiler half a minute.
COMPILED = {"cpu": 100, "cuda": 1000}
PIECE = (
    1 << 22
)  # elements that are compared at a time: fp64 copies of large models are larger still


@dataclasses.dataclass(frozen=True)
class Averaged:
    """One average of a model."""

    update: Run
    averages: Callable[[], Mapping[str, Tensor]]  # by the names of the model's state_dict
    # The average's values in the model for the time of a block; None: there is no such thing.
    applied: Callable[[], contextlib.AbstractContextManager[Any]] | None = None


def averager(
    model: nn.Module, rule: Any = None, *, backend: str | None = None, **options: Any
) -> Averaged:
    found = Averager(model, {"average": rule or SWA()}, backend=backend, **options)
    return Averaged(
        found.update, lambda: found.averages["average"], lambda: found.applied("average")
    )


def averaged_model(model: nn.Module, backend: str | None = None) -> Averaged:
    found = swa_fast.AveragedModel(model, backend=backend)
    return Averaged(
        lambda: found.update_parameters(model),
        lambda: found.module.state_dict(),
        lambda: found.applied(model),
    )


def _torch(model: nn.Module, multi_avg_fn: Any = None) -> Averaged:
    found = swa_utils.AveragedModel(model, multi_avg_fn=multi_avg_fn)
    return Averaged(lambda: found.update_parameters(model), lambda: found.module.state_dict())


def _timm(model: nn.Module) -> Averaged:
    from timm.utils.model_ema import ModelEmaV3

    found = ModelEmaV3(model, decay=DECAY)
    return Averaged(lambda: found.update(model), lambda: found.module.state_dict())


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _diffusers(model: nn.Module) -> Averaged:
    from diffusers.training_utils import EMAModel

    parameters, names = list(model.parameters()), _names(model)
    found = EMAModel(parameters, decay=DECAY, min_decay=DECAY, foreach=True)

    @contextlib.contextmanager
    def applied() -> Any:
        found.store(parameters)
        found.copy_to(parameters)
        yield
        found.restore(parameters)

    return Averaged(
        lambda: found.step(parameters),
        lambda: dict(zip(names, found.shadow_params, strict=True)),
        applied,
    )


def _foreach_cached(model: nn.Module) -> Averaged:
    """What an expert writes: one foreach function over lists that are made once."""
    parameters = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in parameters]
    names = _names(model)
    return Averaged(
        lambda: torch._foreach_lerp_(averages, parameters, 1 - DECAY),
        lambda: dict(zip(names, averages, strict=True)),
    )


def _foreach_by_state(model: nn.Module) -> Averaged:
    """torchtitan's way: averages are an optimizer's state, and both lists are made at each update
    by a walk over the model, so that they hold whatever parameters it has by then."""
    state = {p: {"average": p.detach().clone()} for p in model.parameters()}
    names = _names(model)

    @torch.no_grad()
    def update() -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        averages = [state[p]["average"] for p in parameters]
        torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    return Averaged(
        update,
        lambda: dict(zip(names, (s["average"] for s in state.values()), strict=True)),
    )


def _foreach_compiled(model: nn.Module) -> Averaged:
    """The expert's function, compiled for these tensors."""
    parameters = [p.detach() for p in model.parameters()]
    if len(parameters) > COMPILED[parameters[0].device.type]:
        raise NotServed(f"to compile {len(parameters)} tensors takes minutes")
    if simulated():
        raise NotServed("the compiler's Triton kernels are timed on real devices only")
    averages = [p.clone() for p in parameters]
    names = _names(model)

    def lerp(averages: list[Tensor], parameters: list[Tensor]) -> None:
        torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    compiled = torch.compile(lerp, dynamic=False)
    return Averaged(
        lambda: compiled(averages, parameters), lambda: dict(zip(names, averages, strict=True))
    )


def _lerp_loop(model: nn.Module) -> Averaged:
    """The shortest loop, over lists that are made once."""
    parameters = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in parameters]
    names = _names(model)

    def update() -> None:
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter, 1 - DECAY)

    return Averaged(update, lambda: dict(zip(names, averages, strict=True)))


def _ema_pytorch(model: nn.Module) -> Averaged:
    from ema_pytorch import EMA as EmaPytorch

    found = EmaPytorch(
        model, beta=DECAY, min_value=DECAY, update_after_step=-1, update_every=1, use_foreach=True
    )
    return Averaged(found.update, lambda: found.ema_model.state_dict())


def _torch_ema(model: nn.Module) -> Averaged:
    from torch_ema import ExponentialMovingAverage

    names = _names(model)
    found = ExponentialMovingAverage(model.parameters(), decay=DECAY, use_num_updates=False)
    return Averaged(
        found.update, lambda: dict(zip(names, found.shadow_params, strict=True)),
        found.average_parameters,
    )  # fmt: skip


# name: (side, how to make it, whether it weighs equally).
AVERAGERS: dict[str, tuple[str, Callable[[nn.Module], Averaged], bool]] = {
    "Averager SWA": (OURS, averager, True),
    "Averager EMA": (OURS, functools.partial(averager, rule=EMA(DECAY)), False),
    # Like diffusers' EMAModel and torch-ema, which know no buffers.
    "Averager EMA, no buffers": (
        OURS,
        functools.partial(averager, rule=EMA(DECAY), buffers="skip"),
        False,
    ),
    "AveragedModel": (OURS, averaged_model, True),
    "torch AveragedModel": ("competitor", _torch, True),
    "torch foreach SWA": (
        "competitor",
        lambda model: _torch(model, swa_utils.get_swa_multi_avg_fn()),
        True,
    ),
    "torch foreach EMA": (
        "competitor",
        lambda model: _torch(model, swa_utils.get_ema_multi_avg_fn(DECAY)),
        False,
    ),
    "foreach_lerp_, cached lists": ("competitor", _foreach_cached, False),
    "foreach_lerp_, compiled": ("competitor", _foreach_compiled, False),
    "foreach_lerp_, torchtitan's way": ("competitor", _foreach_by_state, False),
    "lerp_ loop, cached lists": ("competitor", _lerp_loop, False),
    "timm ModelEmaV3": ("competitor", _timm, False),
    "diffusers EMAModel foreach": ("competitor", _diffusers, False),
    "ema-pytorch foreach": ("competitor", _ema_pytorch, False),
    "torch-ema": ("competitor", _torch_ema, False),
}


def lerp_flat(model: nn.Module) -> Work:
    """The limit: one in-place lerp_ over flat tensors with as many elements as the model has
    parameters, in fp32."""
    source = torch.cat([p.detach().flatten() for p in model.parameters()]).float()
    average = source.clone()
    weight = 1 - DECAY

    def check(run: Run, done: int) -> None:
        average.zero_()
        run()
        for found, expected in zip(average.split(PIECE), source.split(PIECE), strict=True):
            close(found, expected.double() * weight, 1e-6, "lerp_flat")
        for _ in range(CHECKED_RUNS - 1):
            run()

    return Work(lambda: average.lerp_(source, weight), check, bytes=12 * source.numel())


# The product is 1, and powers of two are exact in every type: afterwards the weights are as before.
STEPS = (0.5, 4.0, 0.5)


def _groups(names: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Consecutive names whose tensors hold about PIECE elements together."""
    group: list[str] = []
    held = 0
    for name, size in zip(names, sizes, strict=True):
        if group and held + size > PIECE:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _joined(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in names])


@dataclasses.dataclass(frozen=True)
class Expected:
    """One average and its rule: equal weights, or a decay."""

    found: Averaged
    equal: bool
    decay: float = DECAY

    def weight(self, n: int) -> float:
        return 1 / (n + 1) if self.equal else 1 - self.decay


@torch.no_grad()
def check_averages(model: nn.Module, averages: Sequence[Expected], run: Run, done: int) -> None:
    """Scales the weights before each of CHECKED_RUNS updates and compares every average with fp64.

    Element by element to a few roundings of the average's type; below fp32 also the sum of all
    movements, because an average that does not move at all is within a rounding of where it
    should be. Small tensors are compared together, or a model of thousands would take longer to
    check than to time.
    """
    assert len(STEPS) == CHECKED_RUNS
    parameters = dict(model.named_parameters())
    starts: list[dict[str, Tensor] | None] = [None] * len(averages)
    if done > 1:
        values = [each.found.averages() for each in averages]
        starts = [{k: value[k].detach().clone() for k in parameters} for value in values]
    for factor in STEPS:
        torch._foreach_mul_(list(parameters.values()), factor)
        run()
    for each, before in zip(averages, starts, strict=True):
        _compare(model, each, before, done)


def _compare(
    model: nn.Module, each: Expected, before: Mapping[str, Tensor] | None, done: int
) -> None:
    parameters = dict(model.named_parameters())
    averages = each.found.averages()
    moved = expected = 0.0
    coarse = any(torch.finfo(averages[name].dtype).bits < 32 for name in parameters)
    for names in _groups(list(parameters), [p.numel() for p in parameters.values()]):
        joined = _joined(averages, names)
        source = _joined(parameters, names)
        # After its first update every average equals the weights.
        begin = source if before is None else _joined(before, names)
        what = f"the average of {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
        pieces = zip(joined.split(PIECE), source.split(PIECE), begin.split(PIECE), strict=True)
        for found_piece, source_piece, begin_piece in pieces:
            exact_source, start = source_piece.double(), begin_piece.double()
            exact, scale = start, 1.0
            for n, factor in enumerate(STEPS, done):
                scale *= factor
                exact = torch.lerp(exact, exact_source * scale, each.weight(n))
            close(found_piece, exact, 8 * torch.finfo(joined.dtype).eps, what)
            if coarse:
                step = exact - start
                moved += float((step * (found_piece.double() - start)).sum())
                expected += float((step * step).sum())
    if coarse:
        share = moved / expected
        assert 0.9 < share < 1.1, f"the average moved {100 * share:.0f} % of its way"
    for name, buffer in model.named_buffers():
        # They do not change here, so that copying and averaging agree; averaging rounds each time.
        if name in averages and buffer.is_floating_point():
            tolerance = (8 + done) * torch.finfo(averages[name].dtype).eps
            close(averages[name], buffer.double(), tolerance, f"the buffer {name}")


def check_average(
    model: nn.Module, found: Averaged, equal: bool, run: Run, done: int, decay: float = DECAY
) -> None:
    """:func:`check_averages` of one."""
    check_averages(model, [Expected(found, equal, decay)], run, done)


def averaging(
    make: Callable[[nn.Module], Averaged], equal: bool, side: str, decay: float = DECAY
) -> Contender:
    """A contender whose work is the update of one average."""

    def work(model: nn.Module) -> Work:
        found = make(model)

        def check(run: Run, done: int) -> None:
            check_average(model, found, equal, run, done, decay)

        return Work(found.update, check)

    return Contender(side, work)
